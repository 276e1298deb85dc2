"""Answers on held-out scenes at each budget: ST3, other methods, and the baselines that cost the same.

python scripts/quality.py [--grid methods|scores|anneal] [--scenes 1000] [--captions 200] [--jobs 2] [--work DIR]
python scripts/quality.py --questions 0 --scenes 200   # captions alone

Runs the embedded model: every picture is encoded once and shared by all configurations. Single facts, and the second
question of a conversation, count as right on exact match. An object of a caption is right when colour, shape and place
are; what a caption misses, repeats and invents counts against it alike (F1: twice the right ones by the named ones and
those that are there). The
KL divergence needs no right answers: it is that of next-token distributions from the full model's, along its own
greedy answers. Results go line by line to --work, so that a run that was stopped goes on where it was; tables go to
--out (JSON and Markdown). Differences are paired by scene, with bootstrap 95 % intervals. The grid `methods` compares
presets, `scores` what the default could select by, and `anneal` annealing alone and after a pruned prefill, beside
random removal at the same counts, on captions.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import native_runtime
import numpy as np

from st3_edge import _native, divergence
from st3_edge._machine import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "embedded_model"))
import scenes  # noqa: E402

CURVES, FLOORS, LENGTHS = ("linear", "cosine", "exponential"), (0.5, 0.3, 0.1), (32, 64, 128)
ANNEAL_SCORES = ("last-mean", "last-max", "text-mean")  # beside the default, which is the schedule's own
UNITS = ("facts", "captions", "second")  # what configurations are compared by
PARTS = ("found", "named")  # of `captions`: right ones by those that are there, and by those that are named
COUNTED = {"facts": "single facts", "found": "caption objects", "second": "second questions of a conversation"}
KL = ("kl facts", "kl captions")
CAPTION_LEGEND = (
    "`captions`: F1 of the objects that they name; of those that are there `found` per cent are named right, and of "
    "those that are `named`. `held`: share of visual tokens left when the caption ends, mean over layers; `tokens`: "
    "length of the captions."
)
CHUNK = 20  # scenes of one task
TURNS, KL_FACTS, KL_CAPTIONS = 200, 200, 40  # scenes
FACT_TOKENS, CAPTION_TOKENS = 10, 130
BOOTSTRAP = 4000


@dataclass(frozen=True)
class Config:
    """One row of the table: a name and the `st3.*` keys behind it."""

    name: str
    keys: tuple[tuple[str, native_runtime.Value], ...]
    against: dict[str, str]  # what it is compared with: the column's word, and that configuration's name


@dataclass(frozen=True)
class Job:
    """What a worker needs besides a task: the numbers of scenes (but `questions`: of a scene) are of each measure."""

    model: Path
    embeddings: Path
    width: int
    threads: int
    style: str
    questions: int
    captions: int
    turns: frozenset[int]
    kl_facts: int
    kl_captions: int


def config(name: str, against: dict[str, str] | None = None, **keys: native_runtime.Value) -> Config:
    """A configuration by its keys without their prefix."""
    return Config(name, tuple((f"st3.{k}", v) for k, v in keys.items()), against or {})


def method_grid(budgets: tuple[float, ...], n_layer: int) -> list[Config]:
    """The presets at each budget. `vtw` has none: it drops all after as many layers as come nearest."""
    out = [config("off")]
    for b in budgets:
        out.append(config(f"st3 @ {b:g}", {"off": "off"}, preset="st3", budget=b))
        against = {"off": "off", "st3": f"st3 @ {b:g}"}
        for preset in ("pvtp", "fastv", "pyramiddrop", "vtw", "random", "downsample"):
            keys = {"budget": b} if preset != "vtw" else {"keep": 0.0, "start": max(1, round(b * n_layer))}
            out.append(config(f"{preset} @ {b:g}", against, preset=preset, **keys))
    return out


def score_grid(budgets: tuple[float, ...], n_layer: int) -> list[Config]:
    """What to select by, at the default's counts in each layer, without annealing."""
    out = [config("off")]
    for b in budgets:
        default = f"text-max c0 @ {b:g}"
        out.append(config(default, {"off": "off"}, preset="pvtp", budget=b))
        against = {"off": "off", "text-max": default}
        for score in ("last-mean-sum", "last-mean-sum+text-max", "text-mean", "last-mean"):
            out.append(config(f"{score} c0 @ {b:g}", against, preset="pvtp", budget=b, score=score))
        for c in (0.25, 0.5):
            out.append(config(f"text-max c{c:g} @ {b:g}", against, preset="pvtp", budget=b, coverage=c))
        for preset in ("random", "downsample"):
            out.append(config(f"{preset} @ {b:g}", against, preset=preset, budget=b))
        out.append(config(f"text-max c0 min_share 0 @ {b:g}", against, preset="pvtp", budget=b, min_share=0.0))
    return out


def anneal_grid(budgets: tuple[float, ...], n_layer: int) -> list[Config]:
    """Annealing alone and after a pruned prefill: every curve and floor, then other lengths and scores."""
    out = [config("off")]
    middle = CURVES[0], FLOORS[1], LENGTHS[1]
    curves = [(c, f, LENGTHS[1]) for c in CURVES for f in FLOORS]
    curves += [(*middle[:2], t) for t in LENGTHS if t != LENGTHS[1]]
    for base, kept in [("all kept", {"keep": 1.0}), *((f"budget {b:g}", {"budget": b}) for b in budgets)]:
        keys = {"preset": "st3", **kept}
        out.append(config(base, {"off": "off"}, anneal="none", **keys))
        against = {"off": "off", "no annealing": base}
        for curve, floor, tokens in curves:
            name = f"{base} {curve} {floor:g} T{tokens}"
            keys |= {"anneal": curve, "anneal_floor": floor, "anneal_tokens": tokens}
            out.append(config(f"{name} random", against, **keys, anneal_score="random"))
            out.append(config(name, {**against, "random": f"{name} random"}, **keys))
            if (curve, floor, tokens) == middle:
                for s in ANNEAL_SCORES:
                    out.append(config(f"{name} {s}", {**against, "random": f"{name} random"}, **keys, anneal_score=s))
    return out


@dataclass(frozen=True)
class Grid:
    """What a page compares: its configurations by budgets and number of layers."""

    configs: Callable[[tuple[float, ...], int], list[Config]]
    budgets: tuple[float, ...]
    out: str
    title: str
    legend: str


GRIDS = {
    "methods": Grid(
        method_grid,
        (0.75, 0.5, 0.4, 0.3, 0.2, 0.1),
        "quality",
        "Answers against budget, embedded model",
        "`@`: the budget that was asked for; `budget`: the one that the runtime reports. `- st3`: to the preset `st3` "
        "at the same budget; below zero, `st3` is better.",
    ),
    "scores": Grid(
        score_grid,
        (0.5, 0.4, 0.3),
        "scores",
        "What to select by, embedded model",
        "All at the counts of `pvtp`, but for the rows `min_share 0`, where no layer is sure of the least. `c` is "
        "coverage, `@` the budget; `- text-max`: to the default at the same budget; below zero, the default is better.",
    ),
    "anneal": Grid(
        anneal_grid,
        (0.5, 0.4, 0.3),
        "anneal",
        "Captions under annealing, embedded model",
        "`all kept`: nothing dropped in prefill; `budget`: a pruned prefill. Then the curve, the floor that it falls "
        "to, and the generated tokens T over which it does; `random`: as many tokens leave, but drawn by lot.",
    ),
}


class Reader:
    """Greedy answers of one configuration."""

    def __init__(self, rt: native_runtime.Runtime, job: Job, keys: dict[str, native_runtime.Value]) -> None:
        self.model = native_runtime.Model(rt, job.model, keys)
        self.ctx = native_runtime.Context(self.model, n_ctx=1024, threads=job.threads)
        L = rt.llama
        self.before = [L.llama_vocab_bos(self.model.vocab), *self.model.tokenize("USER: ")]
        self.eos = L.llama_vocab_eos(self.model.vocab)

    def prompt(self, embd: np.ndarray, question: str) -> list[_native.Piece]:
        """The prompt of a question about one image, float32 [576, width]."""
        after = self.model.tokenize(f"\n{question} ASSISTANT:")
        return [_native.Text(np.array(self.before)), _native.Visual(embd, 24, 24), _native.Text(np.array(after))]

    def answer(self, embd: np.ndarray, question: str, limit: int) -> list[int]:
        """The tokens of the answer to a question about one image. Raises SystemExit where decoding fails."""
        self.ctx.clear()
        code = _native.prefill(self.ctx.ptr, 0, self.prompt(embd, question))
        if code:
            raise SystemExit(f"prefill failed ({code}): {_native.last_error()}")
        return self._say(limit)

    def follow_up(self, question: str, limit: int) -> list[int]:
        """The same for a question that follows the last answer: the picture stays as that left it."""
        self._decode([self.eos, *self.model.tokenize(f"USER: {question} ASSISTANT:")])
        return self._say(limit)

    def _say(self, limit: int) -> list[int]:
        said: list[int] = []
        while len(said) < limit:
            token = int(np.argmax(self.ctx.logits()))
            if token == self.eos:
                break
            said.append(token)
            self._decode([token])  # one by one: annealing counts such steps
        return said

    def _decode(self, tokens: list[int]) -> None:
        if self.ctx.decode(tokens, _native.n_positions(self.ctx.ptr)):
            raise SystemExit("decode failed")

    def held(self) -> float:
        """Share of the last image's visual tokens that are in the cache now, mean over layers; 1 when off."""
        report = self.ctx.report()
        return float(np.mean(report["held"]) / report["given"]) if report.get("held") and report["given"] else 1.0

    def close(self) -> None:
        """Free context and model."""
        self.ctx.close()
        self.model.close()


_worker: tuple[native_runtime.Runtime, Job] | None = None


def start_worker(job: Job) -> None:
    """Load the libraries once a process."""
    global _worker
    folder = native_runtime.lib_dir()
    assert folder is not None
    _worker = native_runtime.Runtime(folder), job


def pictures(job: Job) -> np.ndarray:
    """The embeddings that are on disk, float32 [n, 576, width]."""
    count = job.embeddings.stat().st_size // (4 * 576 * job.width)
    return np.memmap(job.embeddings, np.float32, "r", shape=(count, 576, job.width))


def facts(job: Job, i: int) -> list[scenes.Question]:
    """The single facts that are asked of scene i."""
    asked = scenes.held_out_questions(i, job.style)
    return [asked[(i + k) % len(asked)] for k in range(min(job.questions, len(asked)))]


@functools.lru_cache(maxsize=1)
def full_answers(indices: range) -> dict[int, list[tuple[str, str, list[int], divergence.Logits]]]:
    """What the full model says, by scene: the measure, the question, the answer's tokens, and their logits."""
    assert _worker is not None
    rt, job = _worker
    reader = Reader(rt, job, {})
    out: dict = {}
    for i in indices:
        asked = [("kl facts", q.text, FACT_TOKENS) for q in facts(job, i)] if i < job.kl_facts else []
        asked += [("kl captions", scenes.CAPTION_QUESTION, CAPTION_TOKENS)] if i < job.kl_captions else []
        for measure, question, limit in asked:
            prompt = reader.prompt(np.array(pictures(job)[i]), question)
            tokens, logits = divergence.greedy_answer(reader.ctx.ptr, prompt, limit)
            out.setdefault(i, []).append((measure, question, tokens, logits))
    reader.close()
    return out


def run(task: tuple[str, dict[str, native_runtime.Value], range]) -> tuple[str, list[dict]]:
    """Answer every question about the scenes of one task."""
    assert _worker is not None
    rt, job = _worker
    name, keys, indices = task
    if "random" in (keys.get("st3.preset"), keys.get("st3.anneal_score")):
        keys = {**keys, "st3.seed": indices.start}  # one draw a chunk: no lucky seed
    full = full_answers(indices)
    reader = Reader(rt, job, keys)
    out = []
    for i in indices:
        image = np.array(pictures(job)[i])
        row: dict = {"scene": i, "facts": []}
        for q in facts(job, i):
            said = reader.model.text(reader.answer(image, q.text, FACT_TOKENS))
            row["facts"].append([q.kind, scenes.answer_right(said, q.answer)])
        if i < job.captions:
            tokens = reader.answer(image, scenes.CAPTION_QUESTION, CAPTION_TOKENS)
            said = reader.model.text(tokens)
            objects = scenes.caption_objects(said, scenes.scene(i, style=job.style))
            row |= {"said": said, "objects": objects, "tokens": len(tokens), "held": round(reader.held(), 4)}
        pair = scenes.held_out_pair(i, job.style) if i in job.turns else None
        if pair:
            reader.answer(image, pair[0].text, FACT_TOKENS)
            said = reader.model.text(reader.follow_up(pair[1].text, FACT_TOKENS))
            row["second"] = int(scenes.answer_right(said, pair[1].answer)), 1
        for measure, question, tokens, logits in full.get(i, []):
            pruned = divergence.teacher_forced_logits(reader.ctx.ptr, reader.prompt(image, question), tokens)
            nats, n = row.get(measure, (0.0, 0))
            row[measure] = nats + float(divergence.kl_divergence(logits, pruned).sum()), n + len(tokens)
        out.append(row)
    report = reader.ctx.report()
    reader.close()
    schedule = ("mode", "cuts", "counts", "budget", "keep", "anneal")
    out[0]["schedule"] = {k: report[k] for k in schedule if k in report}
    return name, out


def encode(model: native_runtime.Model, args: argparse.Namespace, path: Path) -> None:
    """Write the embeddings of the scenes, float32 [n, 576, width], going on where a file ends."""
    size = 4 * 576 * model.n_embd
    have = path.stat().st_size // size if path.is_file() else 0
    if have >= args.scenes:
        return
    vision = native_runtime.Vision(model, args.mmproj, args.jobs)
    with path.open("r+b" if have else "wb") as f:
        f.seek(have * size)
        for i in range(have, args.scenes):
            picture = np.asarray(scenes.scene(i, style=args.style).image)
            f.write(vision.encode(picture).embd.astype(np.float32).tobytes())
            if i % 20 == 19:
                print(f"\rencoded {i + 1}/{args.scenes}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    vision.close()


def lines_of(path: Path) -> dict[int, dict]:
    """What a configuration's file holds, by scene; a torn last line is left out."""
    out = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        out[row["scene"]] = row
    return out


def file_of(work: Path, c: Config) -> Path:
    """The file of a configuration: grids share what is the same."""
    return work / ("_".join(f"{k.removeprefix('st3.')}={v}" for k, v in c.keys) + ".jsonl" if c.keys else "off.jsonl")


def tasks(configs: list[Config], done: dict[str, dict[int, dict]], n: int) -> Iterator[tuple]:
    """Chunks that are not done, chunk by chunk over all configurations, so that a stopped run compares fairly."""
    for first in range(0, n, CHUNK):
        indices = range(first, min(first + CHUNK, n))
        for c in configs:
            if not all(i in done[c.name] for i in indices):
                yield c.name, dict(c.keys), indices


def f1(right: int, named: int, there: int) -> tuple[int, int]:
    """The F1 of some objects as a share: numerator and denominator, which add up over scenes."""
    return 2 * right, named + there


def tally(rows: dict[int, dict], scene_ids: list[int]) -> dict[str, np.ndarray]:
    """Right and asked by scene, for KL nats and tokens: arrays [n, 2] for each measure and each kind of fact."""
    out = {k: np.zeros((len(scene_ids), 2)) for k in (*UNITS, *PARTS, *scenes.KINDS, *KL)}
    for at, i in enumerate(scene_ids):
        for kind, ok in rows[i]["facts"]:
            for k in ("facts", kind):
                out[k][at] += (bool(ok), 1)
        right, named, there = rows[i].get("objects", (0, 0, 0))
        for k, pair in (("captions", f1(right, named, there)), ("found", (right, there)), ("named", (right, named))):
            out[k][at] += pair
        for k in ("second", *KL):
            out[k][at] += rows[i].get(k, 0)
    return out


def interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> list[float]:
    """a's share right minus b's, in points, with the bootstrap 95 % interval over scenes."""
    asked = (a[:, 1] > 0) & (b[:, 1] > 0)  # the others would leave some draws with fewer
    a, b = a[asked], b[asked]
    drawn = np.vstack([np.ones(len(a), int), rng.multinomial(len(a), np.full(len(a), 1 / len(a)), BOOTSTRAP)])
    (a_right, a_asked), (b_right, b_asked) = (drawn @ a).T, (drawn @ b).T
    mean, *samples = 100 * (a_right / a_asked - b_right / b_asked)
    return [round(float(x), 2) for x in (mean, *np.percentile(samples, [2.5, 97.5]))]


def table(configs: list[Config], done: dict[str, dict[int, dict]]) -> tuple[list[dict], int]:
    """One row a configuration over the scenes that all have, and how many scenes that are."""
    ids = sorted(set.intersection(*(set(done[c.name]) for c in configs)))
    if not ids:
        return [], 0
    tallies = {c.name: tally(done[c.name], ids) for c in configs}
    rows = []
    for c in configs:
        t = tallies[c.name]
        row: dict = {"name": c.name, "keys": dict(c.keys)}
        row["schedule"] = next((r["schedule"] for r in done[c.name].values() if "schedule" in r), None)
        for k, v in t.items():
            mean = float(v[:, 0].sum() / max(1.0, v[:, 1].sum()))
            row[k] = round(mean, 5) if k in KL else round(100 * mean, 2)
            row.setdefault("asked", {})[k] = int(v[:, 1].sum())
        told = [r for r in (done[c.name][i] for i in ids) if "tokens" in r]
        if told:
            lengths = [r["tokens"] for r in told]
            row["tokens"] = {"mean": round(float(np.mean(lengths)), 1), "min": min(lengths), "max": max(lengths)}
            row["held"] = round(100 * float(np.mean([r["held"] for r in told])), 1)
        for word, other in c.against.items():
            for k in UNITS:
                if other in tallies and row["asked"][k]:
                    row[f"{k} - {word}"] = interval(t[k], tallies[other][k], np.random.default_rng(1))
        rows.append(row)
    return rows, len(ids)


def smallest(rows: list[dict]) -> dict[str, float | None]:
    """The smallest budget of `st3` down to which what was asked of single facts and captions loses at most 1 point
    (`point`), and down to which their intervals end above -2 as well (`interval`); None where the largest budget
    fails."""
    out: dict[str, float | None] = {"point": None, "interval": None}
    st3 = [row for row in rows if row["name"].startswith("st3 @ ")]
    for key, lowest in (("point", -np.inf), ("interval", -2)):
        for row in sorted(st3, key=lambda row: -row["keys"]["st3.budget"]):
            losses = [row[f"{k} - off"] for k in ("facts", "captions") if f"{k} - off" in row]
            if any(mean < -1 or low <= lowest for mean, low, _ in losses):
                break
            out[key] = row["keys"]["st3.budget"]
    return out


def markdown(rows: list[dict], about: dict) -> str:
    """The tables as a page."""
    grid = GRIDS[about["grid"]]
    asked = rows[0]["asked"]
    shares = [k for k in (*UNITS, *PARTS, *scenes.KINDS) if asked[k]]
    kl = [k for k in KL if asked[k]]
    told = "tokens" in rows[0]
    spans = list(dict.fromkeys(k for row in rows for k in row if " - " in k))

    def lines(head: list[str], cells: list[list[str]]) -> list[str]:
        return ["", *("| " + " | ".join(c) + " |" for c in (head, ["---"] * len(head), *cells))]

    def right(row: dict) -> list[str]:
        out = [row["name"], f"{row['schedule'].get('budget', 1):.3f}"]
        out += [f"{row[k]:.1f}" for k in shares] + [f"{row[k]:.4f}" for k in kl]
        if told:
            out += [f"{row['held']:.0f} %", "{mean:.0f} ({min}-{max})".format(**row["tokens"])]
        return out

    def differences(row: dict) -> list[str]:
        values = (row.get(k) for k in spans)
        return [row["name"], *(f"{v[0]:+.1f} [{v[1]:+.1f}, {v[2]:+.1f}]" if v else "" for v in values)]

    counted = ", ".join(f"{asked[k]} {what}" for k, what in COUNTED.items() if asked[k])
    about_them = [
        f"{about['scenes']} held-out scenes ({about['style']} style), {counted}; greedy answers. Per cent right; "
        f"differences in points with 95 % intervals (paired by scene, {BOOTSTRAP} bootstrap draws).",
        grid.legend,
    ]
    if told:
        about_them.append(CAPTION_LEGEND)
    if kl:
        tokens = " and ".join(f"{asked[k]} tokens of its {k.removeprefix('kl ')}" for k in kl)
        about_them.append(f"`kl`: mean KL divergence from the full model in nats a token, along {tokens}.")
    out = [
        f"# {grid.title}",
        "",
        " ".join(about_them),
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['processor']}.",
    ]
    if budgets := about.get("smallest"):
        lost = [k for k in ("facts", "captions") if asked[k]]
        named = {k: "none of these" if b is None else f"{b:g}" for k, b in budgets.items()}
        out += [
            "",
            f"The smallest budget at which `st3` loses at most 1 point of {' and of '.join(lost)}: "
            f"**{named['point']}** by the differences as measured, **{named['interval']}** if their intervals must end "
            "above -2 as well.",
        ]
    out += lines(
        ["configuration", "budget", *shares, *kl, *(["held", "tokens"] if told else [])], [right(row) for row in rows]
    )
    if spans:
        out += lines(["configuration", *spans], [differences(row) for row in rows[1:]])
    return "\n".join(out) + "\n"


def main() -> None:
    """Parse the command line, run what is missing, write the tables."""
    demo = ROOT / "st3_edge" / "data" / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo / "st3-demo-q8_0.gguf")
    parser.add_argument("--mmproj", type=Path, default=demo / "mmproj-st3-demo-q8_0.gguf")
    parser.add_argument("--grid", choices=GRIDS, default="methods")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=200, help="describe the first so many scenes as well")
    parser.add_argument(
        "--questions", type=int, default=1, help="at most so many of a scene's, in turns by kind; 0: captions alone"
    )
    parser.add_argument("--style", choices=sorted(scenes.STYLES), default="known")
    parser.add_argument("--budgets", help="with commas between; default: the grid's own")
    parser.add_argument("--only", default="", help="only configurations whose name contains one of these, and off")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "st3-edge-quality")
    parser.add_argument("--out", type=Path, help="default: docs/results, by the grid")
    args = parser.parse_args()
    folder = native_runtime.lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package or set ST3_LIB_DIR")
    grid = GRIDS[args.grid]
    budgets = tuple(float(b) for b in args.budgets.split(",")) if args.budgets else grid.budgets
    # rows of other questions, or judged otherwise, must not be mixed with these
    files = [args.model, args.mmproj, Path(__file__), Path(scenes.__file__), *sorted(folder.glob("lib*"))]
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()[:12]
    base = args.work / f"{digest}-{args.style}"
    more = args.questions > 0  # else it is about captions
    work = base / f"questions{args.questions}-captions{args.captions}{'-turns-kl' * more}"
    work.mkdir(parents=True, exist_ok=True)
    with native_runtime.Model(native_runtime.Runtime(folder), args.model) as model:
        encode(model, args, base / "embeddings.f32")
        configs, width = grid.configs(budgets, model.n_layer), model.n_embd
    wanted = [w for w in args.only.split(",") if w]
    configs = [c for c in configs if not wanted or c.name == "off" or any(w in c.name for w in wanted)]
    pairs = (i for i in range(args.scenes) if scenes.held_out_pair(i, args.style))
    job = Job(
        args.model,
        base / "embeddings.f32",
        width,
        1,
        args.style,
        args.questions,
        args.captions,
        frozenset(islice(pairs, TURNS * more)),
        KL_FACTS * more,
        KL_CAPTIONS * more,
    )
    done = {c.name: lines_of(file_of(work, c)) for c in configs}
    left = list(tasks(configs, done, args.scenes))
    path = {c.name: file_of(work, c) for c in configs}
    print(f"{len(configs)} configurations, {len(left)} chunks of {CHUNK} scenes to run", file=sys.stderr)
    begin = time.monotonic()
    with mp.get_context("spawn").Pool(args.jobs, start_worker, (job,)) as pool:
        for n, (name, rows) in enumerate(pool.imap_unordered(run, left), 1):
            with path[name].open("a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
            done[name].update((row["scene"], row) for row in rows)
            seconds = time.monotonic() - begin
            rest = seconds / n * (len(left) - n)
            print(
                f"\r{n}/{len(left)} {seconds:.0f} s, {rest:.0f} s left, {name:<40}", end="", file=sys.stderr, flush=True
            )
    print(file=sys.stderr)
    rows, n = table(configs, done)
    if not rows:
        raise SystemExit("no scene that all configurations have")
    about = {
        "scenes": n,
        "style": args.style,
        "grid": args.grid,
        **provenance(),
        "model": args.model.name,
    }
    if any(c.name.startswith("st3 @ ") for c in configs):
        about["smallest"] = smallest(rows)
    out = args.out or ROOT / "docs" / "results" / grid.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    page = markdown(rows, about)
    out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
