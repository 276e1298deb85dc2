"""Answers on held-out scenes with ST3 on, off, and with the baselines that cost the same.

python scripts/quality.py [--scenes 1000] [--questions 6] [--captions 200] [--grid full|issue|small|anneal] [--work DIR]
python scripts/quality.py --grid anneal --scenes 200 --questions 0 --budgets 0.3 --out docs/results/anneal

Runs the embedded model: every picture is encoded once and shared by all configurations. Single facts count as
right on exact match, caption objects when colour, shape and place are named. Results go line by line to --work,
so that a run that was stopped goes on where it was; tables go to --out (JSON and Markdown). Differences (to `off`,
to `random`, and to the same without annealing) are paired by scene, with bootstrap 95 % intervals. The grid `anneal`
is about captions: annealing alone and after a pruned prefill, beside random removal at the same counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import native_runtime
import numpy as np

from st3_edge._machine import commit, processor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "embedded_model"))
import scenes  # noqa: E402

BUDGETS = (0.5, 0.4, 0.3)
SCORES = (
    "last-mean",
    "last-mean-sum",
    "text-max",
    "text-max-sum",
    "text-mean",
    "text-mean-sum",
    "last-mean-sum+text-max",
)
COVERAGES = (0.0, 0.25, 0.5)
CURVES, FLOORS, LENGTHS = ("linear", "cosine", "exponential"), (0.5, 0.3, 0.1), (32, 64, 128)
ANNEAL_SCORES = ("last-mean", "last-max", "text-mean")  # beside the default, which is the schedule's own
UNITS = {"facts": "single facts", "captions": "caption objects"}
LEGEND = "`c` is coverage, `@` the budget."
ANNEAL_LEGEND = (
    "`all kept`: nothing dropped in prefill; `budget`: a pruned prefill. Then the curve, the floor that it falls to, "
    "and the generated tokens T over which it does; `random`: as many tokens leave, but drawn by lot. `held` is the "
    "share of visual tokens left when the caption ends, mean over layers; `tokens` is the length of the captions."
)
CHUNK = 20  # scenes of one task
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
    """What a worker needs besides a task."""

    model: Path
    embeddings: Path
    width: int
    threads: int
    style: str
    captions: int
    questions: int


def config(name: str, against: dict[str, str] | None = None, **keys: native_runtime.Value) -> Config:
    """A configuration by its keys without their prefix."""
    return Config(name, tuple((f"st3.{k}", v) for k, v in keys.items()), against or {})


def grid(size: str, shape: dict[str, int], budgets: tuple[float, ...] = BUDGETS) -> list[Config]:
    """The configurations: `issue` has every score and coverage, `small` one score in each family, `full` more."""
    out = [config("off")]
    scores = SCORES if size != "small" else ("last-mean", "last-mean-sum", "text-max")
    coverages = COVERAGES if size != "small" else (0.0, 0.5)
    for b in budgets:
        both = {"off": "off", "random": f"random @ {b:g}"}
        out.append(config(f"random @ {b:g}", {"off": "off"}, preset="random", budget=b, **shape))
        out.append(config(f"downsample @ {b:g}", both, preset="downsample", budget=b, **shape))
        for s in scores:
            for c in coverages:
                keys = {"preset": "pvtp", "budget": b, "score": s, "coverage": c, **shape}
                out.append(config(f"{s} c{c:g} @ {b:g}", both, **keys))
        if size == "full":
            for s in ("last-max", "last-max-sum", "last-mean-sum+text-max-sum", "text-max+text-mean"):
                for c in coverages:
                    keys = {"preset": "pvtp", "budget": b, "score": s, "coverage": c, **shape}
                    out.append(config(f"{s} c{c:g} @ {b:g}", both, **keys))
    return out


def anneal_grid(shape: dict[str, int], budgets: tuple[float, ...]) -> list[Config]:
    """Annealing alone and after a pruned prefill: every curve and floor, then other lengths and scores."""
    out = [config("off")]
    middle = CURVES[0], FLOORS[1], LENGTHS[1]
    curves = [(c, f, LENGTHS[1]) for c in CURVES for f in FLOORS]
    curves += [(*middle[:2], t) for t in LENGTHS if t != LENGTHS[1]]
    for base, kept in [("all kept", {"keep": 1.0}), *((f"budget {b:g}", {"budget": b}) for b in budgets)]:
        keys = {"preset": "st3", **kept, **shape}
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


class Reader:
    """Greedy answers of one configuration."""

    def __init__(self, rt: native_runtime.Runtime, job: Job, keys: dict[str, native_runtime.Value]) -> None:
        self.model = native_runtime.Model(rt, job.model, keys)
        self.ctx = native_runtime.Context(self.model, n_ctx=1024, threads=job.threads)
        L = rt.llama
        self.before = [L.llama_vocab_bos(self.model.vocab), *self.model.tokenize("USER: ")]
        self.eos = L.llama_vocab_eos(self.model.vocab)

    def answer(self, image: native_runtime.Image, question: str, limit: int) -> list[int]:
        """The tokens of the answer to a question about one image. Raises SystemExit where decoding fails."""
        after = self.model.tokenize(f"\n{question} ASSISTANT:")
        self.ctx.clear()
        code = self.ctx.prefill([self.before, image, after])
        if code:
            raise SystemExit(f"prefill failed ({code}): {self.ctx.rt.last_error()}")
        at, said = len(self.before) + len(image.embd) + len(after), []
        while len(said) < limit:
            token = int(np.argmax(self.ctx.logits()))
            if token == self.eos:
                break
            said.append(token)
            if self.ctx.decode([token], at):  # one by one: annealing counts such steps
                raise SystemExit("decode failed")
            at += 1
        return said

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


def run(task: tuple[str, dict[str, native_runtime.Value], range]) -> tuple[str, list[dict]]:
    """Answer every question about the scenes of one task."""
    assert _worker is not None
    rt, job = _worker
    name, keys, indices = task
    if "random" in (keys.get("st3.preset"), keys.get("st3.anneal_score")):
        keys = {**keys, "st3.seed": indices.start}  # one draw a chunk: no lucky seed
    count = job.embeddings.stat().st_size // (4 * 576 * job.width)
    table = np.memmap(job.embeddings, np.float32, "r", shape=(count, 576, job.width))
    reader = Reader(rt, job, keys)
    out = []
    for i in indices:
        image = native_runtime.Image(np.array(table[i]), 24, 24)
        asked = scenes.held_out_questions(i, job.style)
        asked = [asked[(i + k) % len(asked)] for k in range(min(job.questions, len(asked)))]
        row: dict = {"scene": i, "facts": [], "caption": None}
        for q in asked:
            said = reader.model.text(reader.answer(image, q.text, FACT_TOKENS))
            row["facts"].append([q.kind, scenes.answer_right(said, q.answer)])
        if i < job.captions:
            tokens = reader.answer(image, scenes.CAPTION_QUESTION, CAPTION_TOKENS)
            right = scenes.caption_objects_right(reader.model.text(tokens), scenes.scene(i, style=job.style))
            row |= {"caption": right, "tokens": len(tokens), "held": round(reader.held(), 4)}
        out.append(row)
    report = reader.ctx.report()
    reader.close()
    schedule = ("mode", "cuts", "counts", "budget", "keep", "anneal")
    out[0]["schedule"] = {k: report[k] for k in schedule if k in report}
    return name, out


def encode(rt: native_runtime.Runtime, args: argparse.Namespace, n: int, path: Path) -> int:
    """Write the embeddings of n scenes, float32 [n, 576, width], going on where a file ends; returns the width."""
    with native_runtime.Model(rt, args.model) as model:
        size = 4 * 576 * model.n_embd
        have = path.stat().st_size // size if path.is_file() else 0
        if have >= n:
            return model.n_embd
        vision = native_runtime.Vision(model, args.mmproj, args.jobs)
        with path.open("r+b" if have else "wb") as f:
            f.seek(have * size)
            for i in range(have, n):
                picture = np.asarray(scenes.scene(i, style=args.style).image)
                f.write(vision.encode(picture).embd.astype(np.float32).tobytes())
                if i % 20 == 19:
                    print(f"\rencoded {i + 1}/{n}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        vision.close()
        return model.n_embd


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


def file_of(work: Path, name: str) -> Path:
    """The file of a configuration."""
    return work / (name.replace(" ", "_").replace("@", "at") + ".jsonl")


def tasks(configs: list[Config], done: dict[str, dict[int, dict]], n: int, captions: int) -> Iterator[tuple]:
    """Chunks that are not done, chunk by chunk over all configurations, so that a stopped run compares fairly."""
    for first in range(0, n, CHUNK):
        indices = range(first, min(first + CHUNK, n))
        for c in configs:
            rows = done[c.name]
            if not all(i in rows and (i >= captions or rows[i]["caption"]) for i in indices):
                yield c.name, dict(c.keys), indices


def tally(rows: dict[int, dict], scene_ids: list[int]) -> dict[str, np.ndarray]:
    """Right and asked by scene: arrays [n, 2] for facts, for each kind, and for captions."""
    out = {k: np.zeros((len(scene_ids), 2)) for k in ("facts", "captions", *scenes.KINDS)}
    for at, i in enumerate(scene_ids):
        for kind, ok in rows[i]["facts"]:
            for k in ("facts", kind):
                out[k][at] += (bool(ok), 1)
        if rows[i]["caption"]:
            out["captions"][at] += rows[i]["caption"]
    return out


def interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> list[float]:
    """a's share right minus b's, in points, with the bootstrap 95 % interval over scenes."""
    difference = a[:, 0] - b[:, 0]
    drawn = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), BOOTSTRAP)
    samples = 100 * (drawn @ difference) / (drawn @ a[:, 1])
    low, high = np.percentile(samples, [2.5, 97.5])
    return [round(float(x), 2) for x in (100 * difference.sum() / a[:, 1].sum(), low, high)]


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
            row[k] = round(float(100 * v[:, 0].sum() / max(1.0, v[:, 1].sum())), 2)
            row.setdefault("asked", {})[k] = int(v[:, 1].sum())
        told = [r for r in (done[c.name][i] for i in ids) if "tokens" in r]
        if told:
            lengths = [r["tokens"] for r in told]
            row["tokens"] = {"mean": round(float(np.mean(lengths)), 1), "min": min(lengths), "max": max(lengths)}
            row["held"] = round(100 * float(np.mean([r["held"] for r in told])), 1)
        for word, other in c.against.items():
            for k in UNITS:
                if other in tallies and t[k].any():
                    row[f"{k} - {word}"] = interval(t[k], tallies[other][k], np.random.default_rng(1))
        rows.append(row)
    return rows, len(ids)


def markdown(rows: list[dict], about: dict, title: str, legend: str) -> str:
    """The table as a page."""

    def span(row: dict, key: str) -> str:
        value = row.get(key)
        return f"{value[0]:+.1f} [{value[1]:+.1f}, {value[2]:+.1f}]" if value else ""

    asked = rows[0]["asked"]
    shares = [k for k, n in asked.items() if n]
    spans = list(dict.fromkeys(k for row in rows for k in row if " - " in k))
    told = about["grid"] == "anneal"
    head = ["configuration", *shares, *(["held", "tokens"] if told else []), *spans]
    out = [
        f"# {title}",
        "",
        f"{about['scenes']} held-out scenes ({about['style']} style), "
        + ", ".join(f"{asked[k]} {what}" for k, what in UNITS.items() if asked[k])
        + "; greedy answers. Per cent right; differences in points with 95 % "
        f"intervals (paired by scene, {BOOTSTRAP} bootstrap draws). {legend}",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['processor']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        cells = [row["name"], *(f"{row[k]:.1f}" for k in shares)]
        if told:
            cells += [
                f"{row['held']:.0f} %",
                f"{row['tokens']['mean']:.0f} ({row['tokens']['min']}-{row['tokens']['max']})",
            ]
        out.append("| " + " | ".join([*cells, *(span(row, k) for k in spans)]) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Parse the command line, run what is missing, write the tables."""
    demo = ROOT / "st3_edge" / "data" / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo / "st3-demo-q8_0.gguf")
    parser.add_argument("--mmproj", type=Path, default=demo / "mmproj-st3-demo-q8_0.gguf")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=200, help="describe the first so many scenes as well")
    parser.add_argument("--questions", type=int, default=6, help="at most so many of a scene's, in turns by kind")
    parser.add_argument("--style", choices=sorted(scenes.STYLES), default="known")
    parser.add_argument("--grid", choices=("small", "issue", "full", "anneal"), default="issue")
    parser.add_argument("--budgets", default=",".join(f"{b:g}" for b in BUDGETS))
    parser.add_argument("--only", default="", help="only configurations whose name contains one of these, and off")
    parser.add_argument("--start", type=int, help="st3.start of all configurations")
    parser.add_argument("--stride", type=int, help="st3.stride of all configurations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "st3-edge-quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "quality")
    args = parser.parse_args()
    folder = native_runtime.lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package or set ST3_LIB_DIR")
    shape = {k: v for k, v in (("start", args.start), ("stride", args.stride)) if v is not None}
    budgets = tuple(float(b) for b in args.budgets.split(","))
    anneal = args.grid == "anneal"
    configs = anneal_grid(shape, budgets) if anneal else grid(args.grid, shape, budgets)
    wanted = [w for w in args.only.split(",") if w]
    configs = [c for c in configs if not wanted or c.name == "off" or any(w in c.name for w in wanted)]
    digest = hashlib.sha256(args.model.read_bytes() + args.mmproj.read_bytes()).hexdigest()[:12]
    base = args.work / f"{digest}-{args.style}"
    work = base / "-".join([f"questions{args.questions}", *(f"{k}{v}" for k, v in shape.items())])
    work.mkdir(parents=True, exist_ok=True)
    embeddings = base / "embeddings.f32"
    width = encode(native_runtime.Runtime(folder), args, args.scenes, embeddings)
    done = {c.name: lines_of(file_of(work, c.name)) for c in configs}
    left = list(tasks(configs, done, args.scenes, args.captions))
    job = Job(args.model, embeddings, width, 1, args.style, args.captions, args.questions)
    print(f"{len(configs)} configurations, {len(left)} chunks of {CHUNK} scenes to run", file=sys.stderr)
    begin = time.monotonic()
    with mp.get_context("spawn").Pool(args.jobs, start_worker, (job,)) as pool:
        for n, (name, rows) in enumerate(pool.imap_unordered(run, left), 1):
            with file_of(work, name).open("a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
            done[name].update((row["scene"], row) for row in rows)
            seconds = time.monotonic() - begin
            rest = seconds / n * (len(left) - n)
            print(
                f"\r{n}/{len(left)} {seconds:.0f} s, {rest:.0f} s left, {name:<40}", end="", file=sys.stderr, flush=True
            )
    print(file=sys.stderr)
    rows, n = table(configs, done)
    told = {k: getattr(args, k) for k in ("scenes", "questions", "captions", "style", "grid", "budgets")}
    command = "python scripts/quality.py " + " ".join(f"--{k} {v}" for k, v in told.items())
    command += "".join(f" --{k} {v}" for k, v in shape.items()) + (f" --only {args.only}" if args.only else "")
    about = {
        "scenes": n,
        "style": args.style,
        "grid": args.grid,
        "command": command,
        "commit": commit(),
        "processor": processor(),
        "model": args.model.name,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    title = "Captions under annealing, embedded model" if anneal else "Quality on the embedded model"
    page = markdown(rows, about, title, ANNEAL_LEGEND if anneal else LEGEND) if rows else "nothing done yet\n"
    args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
