"""Answers on held-out scenes at each budget: ST3, other methods, and the baselines that cost the same.

python scripts/quality.py [--grid quality|methods|choices|anneal|tiles|long] [--scenes N] [--first N] [--jobs 2]
python scripts/quality.py --short   # some minutes: a few scenes, two budgets; prints and writes nothing

Runs the embedded model, or with --smol the SmolLM2 of scripts/smol_llava, on scenes of every drawing style; all but
`known` are styles that it never saw in training. Every picture is encoded once and shared by all configurations.
Single facts, and the second question of a conversation, count as right on exact match. An object of a caption is right
when its name is (the embedded model's: when colour, shape and place are); what a caption misses, repeats and invents
counts against it alike (F1: twice the right ones by the named ones and those that are there). The KL divergence needs
no right answers: it is that of next-token distributions from the full model's, along its own greedy answers. Answers
go line by line to --work, so that a run that was stopped goes on where it was; tables go to --out (JSON and Markdown).
Differences are paired by scene, with bootstrap 95 % intervals. quality_subjects.py has the models and what they are
asked, quality_grids.py the configurations, quality_answers.py how they answer, quality_tables.py what is made of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measuring
import native_runtime
import quality_answers
from quality_answers import CHUNK, Job, Task
from quality_grids import GRIDS, Config, Grid
from quality_subjects import Embedded, Smol, Subject
from quality_tables import Rows, markdown, table, write

from st3_edge.native.machine import provenance, usable_cpus

SHORT = (20, (0.3, 0.1))  # scenes of each style, budgets


def digest(*files: Path) -> str:
    """A name for what these files hold."""
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()[:12]


def rows_of(path: Path, style: str) -> Rows:
    """What the file of a configuration and style holds; a torn last line is left out, and of what was asked of a scene
    at different times, each part counts."""
    out: Rows = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        add(out, style, row)
    return out


def add(rows: Rows, style: str, row: dict) -> None:
    """Join a row to what is known of its scene."""
    old = rows.setdefault((style, row["scene"]), {"measures": []})
    measures = [*old["measures"], *row["measures"]]
    rows[style, row["scene"]] = {**old, **row, "measures": measures}


def file_of(folder: Path, c: Config) -> Path:
    """The file of a configuration: grids share what is the same."""
    return folder / ("_".join(f"{k.removeprefix('st3.')}={v}" for k, v in c.keys) + ".jsonl" if c.keys else "off.jsonl")


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The options that `chosen` takes."""
    parser.add_argument("--model", type=Path, help="another text model of the same training")
    parser.add_argument("--mmproj", type=Path, help="its mmproj")
    parser.add_argument("--smol", type=Path, metavar="STATE", help="ask the SmolLM2 whose assets are in this folder")


def chosen(model: Path | None, mmproj: Path | None, smol: Path | None) -> Subject:
    """Whom to ask. Raises SystemExit where a file is missing."""
    if smol and not (model and mmproj):
        raise SystemExit("--smol goes with --model and --mmproj: scripts/smol_llava/pair.py gguf writes them")
    files = {k: v for k, v in (("model", model), ("mmproj", mmproj)) if v}
    subject: Subject = Smol(**files, state=smol) if smol else Embedded(**files)
    if missing := [str(f) for f in (*subject.files, *([smol / "assets.npz"] if smol else [])) if not f.is_file()]:
        raise SystemExit(f"no such file: {', '.join(missing)}")
    return subject


def tasks(
    configs: list[Config], done: dict[str, Rows], styles: list[str], numbers: range, grid: Grid
) -> Iterator[Task]:
    """What is not done, chunk by chunk over all configurations, so that a stopped run compares fairly."""
    for first in numbers[::CHUNK]:
        for style in styles:
            indices = range(first, min(first + CHUNK, numbers.stop))
            for c in configs:
                have = [done[c.name].get((style, i), {"measures": []})["measures"] for i in indices]
                left = tuple(m for m in grid.measures if not all(m in measures for measures in have))
                if left:
                    yield Task(style, c.name, dict(c.keys), indices, left)


def main() -> None:
    """Parse the command line, run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--grid", choices=GRIDS, default="quality")
    parser.add_argument("--scenes", type=measuring.count, help="of each style; default: the grid's own")
    parser.add_argument("--first", type=measuring.whole(0, 10**9), default=20_000, help="number of the first scene")
    parser.add_argument("--styles", help="with commas between; default: all")
    parser.add_argument("--budgets", type=measuring.budgets, help="with commas between; default: the grid's own")
    parser.add_argument("--only", default="", help="only configurations whose name contains one of these, and off")
    parser.add_argument("--short", action="store_true", help="a few scenes, two budgets; writes no page")
    parser.add_argument("--jobs", type=measuring.count, default=usable_cpus(), help="worker processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "st3-edge-quality")
    parser.add_argument("--out", type=measuring.result_file, help="default: docs/results, by the grid")
    args = parser.parse_args()
    folder = native_runtime.built()
    subject = chosen(args.model, args.mmproj, args.smol)
    styles = args.styles.split(",") if args.styles else list(subject.styles)
    if unknown := set(styles) - set(subject.styles):
        raise SystemExit(f"no such style: {', '.join(sorted(unknown))}; there are {', '.join(subject.styles)}")
    grid = GRIDS[args.grid]
    n, budgets = SHORT if args.short else (grid.scenes, grid.budgets)
    budgets = args.budgets or budgets
    numbers = range(args.first, args.first + (args.scenes or n))
    wanted = [w for w in args.only.split(",") if w]
    configs = grid.made(budgets, subject.layers)
    configs = [c for c in configs if not wanted or c.name == "off" or any(w in c.name for w in wanted)]
    if len(configs) == 1:
        raise SystemExit(f"the grid {args.grid} has no other configuration than off for {', '.join(wanted) or budgets}")

    # answers to other questions, or of other libraries, must not be mixed with these
    text, mmproj = subject.files
    asked = [text, *subject.drawn_by, *subject.asked_by, Path(quality_answers.__file__)]
    seen = digest(mmproj, *subject.drawn_by)
    stock, ours = digest(*asked), digest(*asked, *sorted(folder.glob("lib*")))
    job = Job(subject, args.work / f"pictures-{seen}")
    job.embeddings.mkdir(parents=True, exist_ok=True)
    path = {}
    for style in styles:
        for c in configs:
            # off is stock llama.cpp bit for bit (tests/native/test_off_is_stock.py), whatever else the libraries hold
            path[style, c.name] = file_of(args.work / f"{seen}-{ours if c.keys else stock}" / style, c)
            path[style, c.name].parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Rows] = {c.name: {} for c in configs}
    for (style, name), file in path.items():
        done[name] |= {key: row for key, row in rows_of(file, style).items() if key[1] in numbers}
    left = list(tasks(configs, done, styles, numbers, grid))
    print(f"{len(configs)} configurations, {len(left)} chunks of {CHUNK} scenes to run", file=sys.stderr)
    begin = time.monotonic()
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn"), quality_answers.start_worker, (job,)) as pool:
        for k, (task, rows) in enumerate(pool.map(quality_answers.run, left), 1):
            with path[task.style, task.name].open("a") as f:
                f.writelines("\n" + json.dumps(row) for row in rows)  # behind a line that is torn, too
            for row in rows:
                add(done[task.name], task.style, row)
            seconds = time.monotonic() - begin
            rest = seconds / k * (len(left) - k)
            print(f"\r{k}/{len(left)} {seconds:.0f} s, {rest:.0f} s left", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = table(configs, done, styles, subject)
    about = {"styles": styles, "first": args.first, "grid": args.grid, **provenance(), "model": text.name}
    page = markdown(results, about, subject)
    if not args.short:
        out = args.out or measuring.ROOT / "docs" / "results" / (f"smol-{args.grid}" if args.smol else args.grid)
        write(out, {**about, "rows": results}, page)
    print(page)


if __name__ == "__main__":
    measuring.run(main)
