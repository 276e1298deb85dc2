"""Follow-up questions: does a picture that the first turn has pruned still answer the second?

python scripts/revisit.py [--scenes 400] [--budgets 0.5,0.4,0.3] [--jobs 2] [--out docs/results/revisit]

Each held-out scene is two conversations through `Llava.create_chat_completion`. The first turn is a question, or
`Describe the image.`, whose long answer gives annealing time; then the model's own answer, and a question about another
object. `never` leaves the picture as the first turn left it, `turn` prunes it anew, `off` drops nothing. The second
question alone, in a conversation of its own, stands beside them. Greedy answers, right on exact match; differences are
paired by scene, with bootstrap 95 % intervals. Every picture is encoded once.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import measuring
import numpy as np
from quality_tables import BOOTSTRAP, f1, interval, write

sys.path.append(str(measuring.ROOT / "scripts" / "embedded_model"))
import questions
import scenes

from st3_edge import Llava, ST3Config
from st3_edge.native.machine import provenance, usable_cpus

FIRSTS = ("question", "description")
MAX_TOKENS = {"question": 10, "description": 130}


@dataclass(frozen=True)
class Row:
    """A row of the table: off, or a budget and what becomes of the picture at the second question."""

    name: str
    budget: float | None = None
    revisit: str = "never"


@dataclass
class Asked:
    """What a conversation came to: (right, asked), objects for a description; visual tokens that a layer held after
    the prompt that pruned them, mean; and that turn's prefill in positions and operations."""

    first: tuple[int, int]
    second: tuple[int, int]
    alone: tuple[int, int]
    held: float
    prefilled: int
    flops: int


def rows(budgets: tuple[float, ...]) -> list[Row]:
    """The table's rows, in order."""
    return [Row("off"), *(Row(f"{revisit} @ {b:g}", b, revisit) for b in budgets for revisit in ("never", "turn"))]


_llavas: dict[float | None, Llava] = {}
_rows: list[Row] = []


def start_worker(table: list[Row], cache: str) -> None:
    """Loads the embedded model once a budget; all share the encoded pictures in a folder."""
    _rows.extend(table)
    for row in table:
        if row.budget not in _llavas:
            config = ST3Config(preset="off") if row.budget is None else ST3Config(budget=row.budget)
            _llavas[row.budget] = Llava.demo(config, n_ctx=1024, n_threads=1, image_cache_dir=cache)


def talk(index: int) -> dict[tuple[str, str], Asked] | None:
    """The conversations about one scene, by first turn and row; None where it has one object."""
    pair = questions.held_out_pair(index)
    if pair is None:
        return None
    scene = scenes.scene(index)
    out, alone = {}, {}

    def ask(llava: Llava, messages: list[dict[str, Any]], revisit: str, limit: int) -> Any:
        return llava.create_chat_completion(messages, temperature=0, max_tokens=limit, revisit=revisit)

    def user(text: str, *pictures: Any) -> dict[str, Any]:
        shown = [{"type": "image", "image": p} for p in pictures]
        return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}

    def right(response: Any, question: questions.Question) -> tuple[int, int]:
        return int(questions.answer_right(response["st3"]["answer"], question.answer)), 1

    first, second = pair
    for row in _rows:
        llava, limit = _llavas[row.budget], MAX_TOKENS["question"]
        if row.budget not in alone:
            llava.reset()
            alone[row.budget] = right(ask(llava, [user(second.text, scene.image)], row.revisit, limit), second)
        for kind in FIRSTS:
            opening = user(first.text if kind == "question" else questions.CAPTION_QUESTION, scene.image)
            llava.reset()
            one = ask(llava, [opening], row.revisit, MAX_TOKENS[kind])
            two = ask(llava, [opening, one["choices"][0]["message"], user(second.text)], row.revisit, limit)
            said, report = one["st3"]["answer"], two["st3"]
            out[kind, row.name] = Asked(
                right(one, first) if kind == "question" else f1(*questions.caption_objects(said, scene)),
                right(two, second),
                alone[row.budget],
                statistics.mean(report["visual_tokens"]["per_layer"]),
                two["usage"]["prompt_tokens"] - report["reused"],
                report["flops"]["prefill"],
            )
    return out


def table(done: list[dict[tuple[str, str], Asked]], names: list[Row], kind: str) -> list[dict[str, Any]]:
    """One entry a row: shares right in per cent, differences in points, what the second turn costs."""

    def right(name: str, key: str) -> np.ndarray:
        return np.array([getattr(asked[kind, name], key) for asked in done], float)

    out = []
    for row in names:
        entry: dict[str, Any] = asdict(row)
        for key in ("first", "second", "alone"):
            n_right, n_asked = right(row.name, key).sum(0)
            entry[key] = round(float(100 * n_right / n_asked), 2)
        others = {"off": "off", "never": f"never @ {row.budget:g}" if row.revisit == "turn" else ""}
        for word, other in others.items():
            if other and other != row.name:
                difference = interval(right(row.name, "second"), right(other, "second"), np.random.default_rng(1))
                entry[f"second - {word}"] = difference
        entry["held"] = round(statistics.mean(asked[kind, row.name].held for asked in done), 1)
        for key in ("prefilled", "flops"):
            entry[key] = statistics.median(getattr(asked[kind, row.name], key) for asked in done)
        out.append(entry)
    return out


def markdown(tables: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> str:
    """The tables as a page."""

    def span(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:+.1f} [{value[1]:+.1f}, {value[2]:+.1f}]"

    lines = [
        "# Follow-up questions on the embedded model",
        "",
        f"{about['scenes']} held-out scenes, and for each a first turn, the model's answer, and a second question "
        "about another object. Per cent right (F1 of the objects, for descriptions), greedy. `@`: the budget; `never`: "
        "the picture stays as the first turn left it; `turn`: it is pruned anew by the second question; `alone`: the "
        "second question in a conversation of its own; `held`: visual tokens that a layer held after the prompt that "
        f"pruned them, mean. Differences in points with 95 % intervals (paired by scene, {BOOTSTRAP} bootstrap draws). "
        "Prefill of the second turn: medians.",
        "",
        "The embedded model never saw a second turn in training: its questions shared a picture and could not see each "
        "other. What a first turn costs the second with nothing dropped is the difference of `off` to its `alone`.",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['processor']}.",
    ]
    for kind, entries in tables.items():
        lines += [
            "",
            f"## The first turn is a {kind}",
            "| | first | second | alone | second - off | second - never | held | positions prefilled | MFLOP |",
            "|---" * 9 + "|",
        ]
        for e in entries:
            cells = [e["name"], *(f"{e[key]:.1f}" for key in ("first", "second", "alone"))]
            cells += [span(e.get("second - off")), span(e.get("second - never")), f"{e['held']:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{e['prefilled']:.0f}", f"{e['flops'] / 1e6:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, hold the conversations, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=measuring.count, default=400, help="held-out scenes; those with one object are left out"
    )
    parser.add_argument("--budgets", type=measuring.budgets, default="0.5,0.4,0.3")
    parser.add_argument("--jobs", type=measuring.count, default=usable_cpus(), help="worker processes, one thread each")
    parser.add_argument("--out", type=measuring.result_file, default=measuring.ROOT / "docs" / "results" / "revisit")
    args = parser.parse_args()
    names = rows(args.budgets)
    done = []
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(args.jobs, mp.get_context("spawn"), start_worker, (names, cache)) as pool,
    ):
        for n, result in enumerate(pool.map(talk, range(args.scenes)), 1):
            if result is not None:
                done.append(result)
            print(f"\r{n}/{args.scenes}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if not done:
        raise SystemExit("none of these scenes has two objects")
    about = {"scenes": len(done), **provenance()}
    tables = {kind: table(done, names, kind) for kind in FIRSTS}
    page = markdown(tables, about)
    write(args.out, {**about, **tables}, page)
    print(page)


if __name__ == "__main__":
    measuring.run(main)
