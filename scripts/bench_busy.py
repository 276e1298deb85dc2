"""Time builds beside each other on an idle and on a busy machine: how well their threads wait.

python scripts/bench_busy.py NAME=FOLDER[,VARIABLE=VALUE...] ... [--shape llava-1.5-7b] [--type Q4_0]
                             [--busy 0 1 2 4] [--pairs 5] [--generate 32] [--json OUT]

FOLDER holds the libraries of a build, VARIABLE is set in its process. Each side prefills a prompt and decodes an
answer, in turn; without --shape it is the embedded model and a picture. Before that --busy endless loops are started.
They are of the same session as the sides, since Linux shares a CPU among sessions first. "By fair" is the time by what
a fair share of the CPUs would take: the first side's with the fewest loops, times the threads and loops to a CPU (at
least 1), by their number there.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring

from st3_edge import demo
from st3_edge.commands.bench.shapes import SHAPES
from st3_edge.commands.bench.sides import Side
from st3_edge.commands.bench.worker import Job
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
        model=str(measuring.random_model(args)) if shape else model,
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
            more = max(1, (threads + row["busy"]) / cpus) / max(1, (threads + rows[0]["busy"]) / cpus)
            by_fair = statistics.median(values) / (idle[what] * more)
            cells.append(f"{measuring.spread(values)} | {by_fair:.2f}")
        lines.append(f"| {row['busy']} | {row['build']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER[,VARIABLE=VALUE...]")
    measuring.add_shape(parser)
    parser.add_argument("--budget", type=measuring.budget, default=0.30)
    parser.add_argument("--off", action="store_true", help="without pruning")
    parser.add_argument("--busy", type=measuring.whole(0, 1000), nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--pairs", type=measuring.count, default=5)
    parser.add_argument("--generate", type=measuring.count, default=32)
    parser.add_argument("--threads", type=measuring.count, default=machine.usable_cpus())
    parser.add_argument("--json", type=measuring.result_file, help="write the figures here as well")
    args = parser.parse_args()
    work, environments = job(args), {}
    for build in args.builds:
        name, _, rest = build.partition("=")
        folder, *variables = rest.split(",")
        if name in environments or not folder or not all("=" in variable for variable in variables):
            parser.error(f"not NAME=FOLDER[,VARIABLE=VALUE...], each name once: {build!r}")
        environments[name] = {"ST3_LIB_DIR": folder, **dict(variable.split("=", 1) for variable in variables)}
    sides = [Side(name, work, environment, new_session=False) for name, environment in environments.items()]
    rows = []
    try:
        for side in sides:
            side.open()
        for busy in sorted(set(args.busy)):
            with contextlib.ExitStack() as loops:
                for _ in range(busy):
                    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    loops.callback(loop.wait)
                    loops.callback(loop.kill)
                time.sleep(0.5)
                found = measure(sides, args.pairs, args.generate)
            rows += [{"busy": busy, "build": name, "ms": ms} for name, ms in found.items()]
            print(f"{busy} busy threads: measured", file=sys.stderr)
    finally:
        for side in sides:
            side.close()
    cpus = machine.usable_cpus()
    print("\n".join(table(rows, args.threads, cpus)))
    if args.json:
        setup = {"threads": args.threads, "cpus": cpus, "model": Path(work.model).name, "rows": rows}
        measuring.write_json(args.json, {**setup, **machine.provenance()})


if __name__ == "__main__":
    measuring.run(main)
