"""Follow-up questions: does a picture that the first question has pruned still answer the second?

python scripts/revisit.py [--scenes 400] [--budgets 0.5,0.4,0.3] [--jobs 2] [--out docs/results/revisit]

Each held-out scene is one conversation through `Llava.create_chat_completion`: a question, the model's own answer,
then a question about another object. `never` leaves the picture as the first question pruned it, `turn` prunes it
anew, `off` drops nothing. The second question alone, in a conversation of its own, stands beside them. Greedy answers,
right on exact match; differences are paired by scene, with bootstrap 95 % intervals. Every picture is encoded once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_prefill import commit, processor
from quality import BOOTSTRAP, interval

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "embedded_model")]
import scenes  # noqa: E402

from st3_edge import Llava, ST3Config  # noqa: E402

MAX_TOKENS = 10


@dataclass(frozen=True)
class Row:
    """A row of the table: off, or a budget and what becomes of the picture at the second question."""

    name: str
    budget: float | None = None
    revisit: str = "never"


@dataclass
class Asked:
    """What a conversation came to: shares right, and the second turn's prefill in positions and operations."""

    first: bool
    second: bool
    alone: bool
    prefilled: int
    flops: int


def rows(budgets: list[float]) -> list[Row]:
    """The table's rows, in order."""
    return [Row("off"), *(Row(f"{revisit} @ {b:g}", b, revisit) for b in budgets for revisit in ("never", "turn"))]


def pair(index: int) -> tuple[scenes.Question, scenes.Question] | None:
    """Two questions about different objects of a held-out scene, the kinds in turns; None if it has none."""
    asked = scenes.held_out_questions(index)
    pairs = [(a, b) for a in asked for b in asked if a.about and b.about and not set(a.about) & set(b.about)]
    return pairs[index % len(pairs)] if pairs else None


_llavas: dict[float | None, Llava] = {}
_rows: list[Row] = []


def start_worker(table: list[Row]) -> None:
    """Loads the embedded model once a budget; all share the pictures' embeddings."""
    _rows.extend(table)
    for row in table:
        if row.budget not in _llavas:
            config = ST3Config(preset="off") if row.budget is None else ST3Config(budget=row.budget)
            _llavas[row.budget] = Llava.demo(config, n_ctx=1024, n_threads=1)
            _llavas[row.budget]._embeddings = _llavas[table[0].budget]._embeddings


def talk(index: int) -> tuple[int, str, dict[str, Asked]] | None:
    """The conversation about one scene, by every row."""
    questions = pair(index)
    if questions is None:
        return None
    first, second = questions
    picture = scenes.scene(index).image
    out, alone = {}, {}

    def ask(llava: Llava, messages: list[dict[str, Any]], revisit: str) -> Any:
        return llava.create_chat_completion(messages, temperature=0, max_tokens=MAX_TOKENS, revisit=revisit)

    def user(question: scenes.Question, *pictures: Any) -> dict[str, Any]:
        shown = [{"type": "image", "image": p} for p in pictures]
        return {"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}

    for row in _rows:
        llava = _llavas[row.budget]
        if row.budget not in alone:
            llava.reset()
            said = ask(llava, [user(second, picture)], row.revisit)["st3"]["answer"]
            alone[row.budget] = scenes.answer_right(said, second.answer)
        llava.reset()
        one = ask(llava, [user(first, picture)], row.revisit)
        two = ask(llava, [user(first, picture), one["choices"][0]["message"], user(second)], row.revisit)
        out[row.name] = Asked(
            scenes.answer_right(one["st3"]["answer"], first.answer),
            scenes.answer_right(two["st3"]["answer"], second.answer),
            alone[row.budget],
            two["usage"]["prompt_tokens"] - two["st3"]["reused"],
            two["st3"]["flops"]["prefill"],
        )
    return index, f"{first.kind}, {second.kind}", out


def table(done: list[tuple[int, str, dict[str, Asked]]], names: list[Row]) -> list[dict[str, Any]]:
    """One entry a row: shares right in per cent, differences in points, medians of the second turn's prefill."""

    def right(name: str, key: str) -> np.ndarray:
        return np.array([[getattr(asked[name], key), 1.0] for _, _, asked in done])

    out = []
    for row in names:
        entry: dict[str, Any] = asdict(row)
        for key in ("first", "second", "alone"):
            entry[key] = round(100 * float(right(row.name, key)[:, 0].mean()), 2)
        others = {"off": "off", "never": f"never @ {row.budget:g}" if row.revisit == "turn" else ""}
        for word, other in others.items():
            if other and other != row.name:
                difference = interval(right(row.name, "second"), right(other, "second"), np.random.default_rng(1))
                entry[f"second - {word}"] = difference
        for key in ("prefilled", "flops"):
            entry[key] = statistics.median(getattr(asked[row.name], key) for _, _, asked in done)
        out.append(entry)
    return out


def markdown(entries: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table as a page."""

    def span(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:+.1f} [{value[1]:+.1f}, {value[2]:+.1f}]"

    lines = [
        "# Follow-up questions on the embedded model",
        "",
        f"{about['scenes']} held-out scenes, each one conversation: a question, the model's answer, a question about "
        "another object. Per cent right on exact match, greedy. `@`: the budget; `never`: the picture stays as the "
        "first question pruned it; `turn`: it is pruned anew by the second. `alone`: the second question in a "
        "conversation of its own. Differences in points with 95 % intervals (paired by scene, "
        f"{BOOTSTRAP} bootstrap draws). Prefill of the second turn: medians.",
        "",
        "The embedded model never saw a second turn in training: its questions shared a picture and could not see each "
        "other. What a first turn costs the second with nothing dropped is the difference of `off` to its `alone`.",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['processor']}.",
        "",
        "| | first | second | second alone | second - off | second - never | positions prefilled | MFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        cells = [e["name"], *(f"{e[key]:.1f}" for key in ("first", "second", "alone"))]
        cells += [span(e.get("second - off")), span(e.get("second - never"))]
        lines.append("| " + " | ".join([*cells, f"{e['prefilled']:.0f}", f"{e['flops'] / 1e6:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, hold the conversations, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes; those with one object are left out")
    parser.add_argument("--budgets", default="0.5,0.4,0.3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "revisit")
    args = parser.parse_args()
    names = rows([float(b) for b in args.budgets.split(",")])
    done = []
    with mp.get_context("spawn").Pool(args.jobs, start_worker, (names,)) as pool:
        for n, result in enumerate(pool.imap_unordered(talk, range(args.scenes)), 1):
            if result is not None:
                done.append(result)
            print(f"\r{n}/{args.scenes}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    done.sort()
    about = {
        "scenes": len(done),
        "command": f"python scripts/revisit.py --scenes {args.scenes} --budgets {args.budgets}",
        "commit": commit(),
        "processor": processor(),
    }
    entries = table(done, names)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({**about, "rows": entries}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(entries, about))
    print(markdown(entries, about))


if __name__ == "__main__":
    main()
