"""Time a decode step with annealing on against off, interleaved step by step, on a shape with random weights.

python scripts/bench_annealing.py [--shape llava-1.5-7b] [--type Q4_0] [--budget 0.30] [--steps 64] [--json OUT]

`st3-edge bench` compares with stock; this compares two schedules. Three pairs of models: `pruned` (annealing after a
pruned prefill against the same without), `alone` (annealing alone against ST3 off) and `control` (two equal ones: how
far a pair differs by chance). Both models of a pair are loaded, prefill the same prompt and decode the same tokens;
steps go A B, B A, A B, ... Where repacked weights lie in memory alone changes a model's speed by some per cent, so
weights are read as they are in the file, the same pages by both, and the pair is run in either order of loading.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import native_runtime
import numpy as np
from bench_kv_memory import prompt

from st3_edge import _libs
from st3_edge._files import cache_folder
from st3_edge._machine import commit, compiler, processor
from st3_edge.bench.cache import random_text
from st3_edge.bench.shapes import SHAPES, TYPES

Keys = dict[str, native_runtime.Value]


def pairs(budget: float) -> dict[str, tuple[Keys, Keys]]:
    """The `st3.*` keys of both models of each pair: (off, on)."""
    on: Keys = {"st3.preset": "st3", "st3.budget": budget}
    off: Keys = {**on, "st3.anneal": "none"}
    return {"pruned": (off, on), "alone": ({}, {"st3.preset": "st3", "st3.keep": 1.0}), "control": (off, off)}


def step(ctx: native_runtime.Context, token: int, at: int) -> float:
    """Milliseconds of one decode step, logits included."""
    start = time.perf_counter()
    code = ctx.decode([token], at)
    ctx.rt.llama.llama_get_logits_ith(ctx.ptr, -1)  # waits for them
    if code:
        raise SystemExit(f"decode failed ({code})")
    return 1e3 * (time.perf_counter() - start)


def measure(rt: native_runtime.Runtime, path: Path, keys: list[Keys], args: argparse.Namespace) -> np.ndarray:
    """Milliseconds of each step, float64 [2, steps], of two models in the order of keys."""
    models = [native_runtime.Model(rt, path, k, repack=False) for k in keys]
    visual = SHAPES[args.shape].n_visual
    at = visual + args.text
    contexts = [native_runtime.Context(m, at + args.steps + 1, threads=args.threads) for m in models]
    pieces = prompt(models[0], visual, args.text)
    for ctx in contexts:
        code = ctx.prefill(pieces)
        if code:
            raise SystemExit(f"prefill failed ({code}): {rt.last_error()}")
    said = [int(t) for t in np.random.default_rng(2).integers(3, models[0].n_vocab, args.steps + 1)]
    for ctx in contexts:
        step(ctx, said[0], at)  # warm up: its graph is new
    ms = np.zeros((2, args.steps))
    for t in range(args.steps):
        for which in ((0, 1), (1, 0))[t % 2]:
            ms[which, t] = step(contexts[which], said[t + 1], at + t + 1)
    for it in (*contexts, *models):
        it.close()
    return ms


def summary(ms: np.ndarray) -> dict:
    """Medians of milliseconds float64 [2, n] (off, on), and on / off: of the medians, and of the whole answers."""
    off, on = (round(float(np.median(row)), 3) for row in ms)
    whole = round(float(ms[1].sum() / ms[0].sum()), 4)
    return {"steps": ms.shape[1], "ms_off": off, "ms_on": on, "ratio": round(on / off, 4), "ratio_of_answers": whole}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--type", default="Q4_0", choices=TYPES)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--budget", type=float, default=0.30)
    parser.add_argument("--text", type=int, default=64, help="text tokens, 1/16 of them before the image")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="each loads the models in the other order")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    folder = native_runtime.lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package or set ST3_LIB_DIR")
    path = random_text(args.shape, args.type, args.cache)
    rt = native_runtime.Runtime(folder)
    out: dict = {}
    for name, keys in pairs(args.budget).items():
        rounds = []
        for n in range(args.rounds):
            order = (0, 1) if n % 2 == 0 else (1, 0)
            ms = measure(rt, path, [keys[i] for i in order], args)
            rounds.append(ms[list(order)])  # off first
            print(f"{name}, round {n + 1}: {summary(rounds[-1])}", file=sys.stderr)
        out[name] = {**summary(np.concatenate(rounds, 1)), "rounds": [summary(ms) for ms in rounds]}
        out[name]["keys"] = {"off": keys[0], "on": keys[1]}
    told = {
        "model": path.name,
        "visual": SHAPES[args.shape].n_visual,
        "text": args.text,
        "threads": args.threads,
        "pairs": out,
        "processor": processor(),
        "command": "python scripts/bench_annealing.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "compiler": compiler(_libs.path_of("llama")),
    }
    print(json.dumps(told, indent=2))
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
