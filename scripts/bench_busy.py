"""Time builds beside each other on an idle and on a busy machine: how well their threads wait.

python scripts/bench_busy.py NAME=FOLDER[,VARIABLE=VALUE...] ... [--shape llava-1.5-7b] [--type Q4_0]
                             [--busy 0 1 2 4] [--pairs 5] [--generate 32] [--json OUT]

FOLDER holds the libraries of a build, VARIABLE is set in its process. Each side prefills a prompt and decodes an
answer, in turn; without --shape it is the embedded model and a picture. Before that --busy endless loops are started.
They are of the same session as the sides, since Linux shares a CPU among sessions first. "By fair" is the time by what
a fair share of the CPUs would take: the first side's with the fewest loops, times (threads + loops) / CPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import native_runtime  # noqa: F401 - puts the package on the path

from st3_edge import demo
from st3_edge.commands.bench.cache import random_text
from st3_edge.commands.bench.shapes import SHAPES, TYPES
from st3_edge.commands.bench.sides import Side
from st3_edge.commands.bench.worker import Job
from st3_edge.files.output import cache_folder
from st3_edge.native import machine

WHAT = {"prefill": "prefill, ms", "decode": "decode, ms a token"}


def job(args: argparse.Namespace) -> Job:
    """What each side does."""
    model, mmproj = map(str, demo.model_paths())
    shape = SHAPES[args.shape] if args.shape else None
    return Job(
        st3=not args.off,
        stock=None,
        keys={"st3.preset": "off"} if args.off else {"st3.preset": "st3", "st3.budget": args.budget},
        model=str(random_text(args.shape, args.type, args.cache)) if shape else model,
        mmproj=None if shape else mmproj,
        pictures=[] if shape else [str(demo.scenes()[0].picture)],
        question=None if shape else "Describe the image.",
        visual=shape.n_visual if shape else 0,
        text=64,
        generate=args.generate,
        n_threads=args.threads,
    )


def measure(sides: list[Side], pairs: int, generate: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of prefills and of decoded tokens by side, [pairs] each, in the order A B, B A, ..."""
    found: dict[str, dict[str, list[float]]] = {side.name: {what: [] for what in WHAT} for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            found[side.name]["prefill"].append(side.call("begin")["prefill_ms"])
            found[side.name]["decode"].append(sum(side.call("decode", n=generate)["steps_ms"]) / generate)
    return found


def table(rows: list[dict[str, Any]], threads: int, cpus: int) -> list[str]:
    """The rows as Markdown: medians (lowest to highest), and these by what a fair share of the CPUs takes."""
    lines = ["| busy threads | build | " + " | ".join(f"{label} | by fair" for label in WHAT.values()) + " |"]
    lines.append("|" + "---|" * (2 + 2 * len(WHAT)))
    idle = {what: statistics.median(rows[0]["ms"][what]) for what in WHAT}
    for row in rows:
        cells = []
        for what in WHAT:
            values = row["ms"][what]
            fair = idle[what] * max(1, (threads + row["busy"]) / cpus)
            middle = statistics.median(values)
            low, middle_text, high = (
                f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (min(values), middle, max(values))
            )
            cells.append(f"{middle_text} ({low} to {high}) | {middle / fair:.2f}")
        lines.append(f"| {row['busy']} | {row['build']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER[,VARIABLE=VALUE...]")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--type", default="Q4_0", choices=TYPES)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--budget", type=float, default=0.30)
    parser.add_argument("--off", action="store_true", help="without pruning")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--threads", type=int, default=machine.usable_cpus())
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    sides = []
    for build in args.builds:
        name, _, rest = build.partition("=")
        folder, *variables = rest.split(",")
        environment = {"ST3_LIB_DIR": folder, **dict(variable.split("=", 1) for variable in variables)}
        sides.append(Side(name, job(args), environment, new_session=False))
    rows = []
    try:
        for side in sides:
            side.open()
        for busy in args.busy:
            loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                time.sleep(0.5)
                found = measure(sides, args.pairs, args.generate)
            finally:
                for loop in loops:
                    loop.kill()
                    loop.wait()
            rows += [{"busy": busy, "build": name, "ms": ms} for name, ms in found.items()]
            print(f"{busy} busy threads: measured", file=sys.stderr)
    finally:
        for side in sides:
            side.close()
    cpus = machine.usable_cpus()
    print("\n".join(table(rows, args.threads, cpus)))
    if args.json:
        setup = {"threads": args.threads, "cpus": cpus, "model": Path(job(args).model).name, "rows": rows}
        args.json.write_text(json.dumps({**setup, **machine.provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
