"""Time a decode step with annealing on against off, interleaved step by step, on a shape with random weights.

python scripts/bench_decode.py [--shape llava-1.5-7b] [--type Q4_0] [--budget 0.30] [--steps 128] [--json OUT]

Three pairs of models: `pruned` (annealing after a pruned prefill against the same without), `alone` (annealing alone
against ST3 off) and `control` (two equal ones: how far a pair differs by chance). Both models of a pair are loaded,
prefill the same prompt and decode the same tokens; steps go A B, B A, A B, ... Where a model's repacked weights lie in
memory alone changes its speed by some per cent: each pair is run in an even number of rounds, loaded in either order;
with --no-repack both models read the same pages of the file, and differ by nothing but the schedule. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import native_runtime
import numpy as np
import random_model
from bench_prefill import commit, processor, prompt, random_weights

Keys = dict[str, native_runtime.Value]


def pairs(args: argparse.Namespace) -> dict[str, tuple[Keys, Keys]]:
    """The `st3.*` keys of both models of each pair: (off, on)."""
    given = (("anneal", args.anneal), ("anneal_tokens", args.tokens), ("anneal_floor", args.floor))
    given += (("anneal_interval", args.interval),)
    on: Keys = {"st3.preset": "st3"} | {f"st3.{k}": v for k, v in given if v is not None}
    pruned: Keys = {"st3.preset": "st3", "st3.budget": args.budget, "st3.anneal": "none"}
    return {
        "pruned": (pruned, {**on, "st3.budget": args.budget}),
        "alone": ({}, {**on, "st3.keep": 1.0}),
        "control": (pruned, pruned),
    }


def step(ctx: native_runtime.Context, token: int, at: int) -> float:
    """Milliseconds of one decode step, logits included."""
    start = time.perf_counter()
    code = ctx.decode([token], at)
    ctx.rt.llama.llama_get_logits_ith(ctx.ptr, -1)  # waits for them
    if code:
        raise SystemExit(f"decode failed ({code})")
    return 1e3 * (time.perf_counter() - start)


def measure(rt: native_runtime.Runtime, path: Path, keys: list[Keys], args: argparse.Namespace) -> tuple:
    """Milliseconds of each step, float64 [2, steps], of two models in the order of keys; and their reports."""
    models = [native_runtime.Model(rt, path, k, repack=args.repack) for k in keys]
    visual = args.visual or random_model.SHAPES[args.shape].n_visual
    n_ctx = visual + args.text + args.steps + 1
    contexts = [native_runtime.Context(m, n_ctx, threads=args.threads) for m in models]
    pieces = prompt(models[0], visual, args.text)
    for ctx in contexts:
        code = ctx.prefill(pieces)
        if code:
            raise SystemExit(f"prefill failed ({code}): {rt.last_error()}")
    at = visual + args.text
    said = [int(t) for t in np.random.default_rng(2).integers(3, models[0].n_vocab, args.steps + 1)]
    for ctx in contexts:
        step(ctx, said[0], at)  # warm up: its graph is new
    ms = np.zeros((2, args.steps))
    for t in range(args.steps):
        for which in ((0, 1), (1, 0))[t % 2]:
            ms[which, t] = step(contexts[which], said[t + 1], at + t + 1)
    reports = [ctx.report() for ctx in contexts]
    for ctx in contexts:
        ctx.close()
    for model in models:
        model.close()
    return ms, reports


def summary(ms: np.ndarray) -> dict:
    """Quartiles of milliseconds float64 [2, n] (off, on), of on / off step by step, and how they compare."""
    quartiles = [[round(float(x), 4) for x in np.percentile(row, [25, 50, 75])] for row in (*ms, ms[1] / ms[0])]
    off, on, ratio = quartiles
    return {
        "steps": ms.shape[1],
        "ms_off": off,
        "ms_on": on,
        "ratio_of_steps": ratio,
        "ratio_of_medians": round(on[1] / off[1], 4),
        "ratio_of_sums": round(float(ms[1].sum() / ms[0].sum()), 4),
        "ms_more": round(float(np.median(ms[1] - ms[0])), 4),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", choices=sorted(random_model.SHAPES))
    parser.add_argument("--type", default="Q4_0", choices=sorted(random_model.FILE_TYPES))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "st3-edge-bench")
    parser.add_argument("--pairs", default="pruned,alone,control", help="which of them")
    parser.add_argument("--budget", type=float, default=0.30)
    parser.add_argument("--anneal", help="st3.anneal (default: the preset's; so are the next three)")
    parser.add_argument("--tokens", type=int, help="st3.anneal_tokens")
    parser.add_argument("--floor", type=float, help="st3.anneal_floor")
    parser.add_argument("--interval", type=int, help="st3.anneal_interval")
    parser.add_argument("--visual", type=int, help="visual tokens (default: the shape's)")
    parser.add_argument("--text", type=int, default=64, help="text tokens, 1/16 of them before the image")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-repack", dest="repack", action="store_false", help="weights as they are in the file")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    folder = native_runtime.lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package or set ST3_LIB_DIR")
    path = random_weights(args.shape, args.type, args.cache)
    rt = native_runtime.Runtime(folder)
    out: dict = {}
    for name, keys in pairs(args).items():
        if name not in args.pairs.split(","):
            continue
        rounds = []
        for n in range(args.rounds):
            order = (0, 1) if n % 2 == 0 else (1, 0)
            ms, reports = measure(rt, path, [keys[i] for i in order], args)
            rounds.append(ms[list(order)])  # off first
            on = reports[order[1]]
            print(f"{name}, round {n + 1}: {summary(rounds[-1])}", file=sys.stderr)
        both = np.concatenate(rounds, 1)
        out[name] = {
            "keys": {"off": keys[0], "on": keys[1]},
            "all": summary(both),
            "rounds": [summary(ms) for ms in rounds],
        }
        until = on.get("anneal", {}).get("tokens", 0)
        if name != "control" and 0 < until < args.steps:  # cells leave until then; the warm-up was the first token
            out[name]["annealing"] = summary(np.concatenate([ms[:, : until - 1] for ms in rounds], 1))
            out[name]["annealed"] = summary(np.concatenate([ms[:, until - 1 :] for ms in rounds], 1))
        out[name]["on"] = {k: on.get(k) for k in ("mode", "anneal", "budget", "given", "per_layer", "held", "kv_bytes")}
    told = {
        "model": path.name,
        "visual": args.visual or random_model.SHAPES[args.shape].n_visual,
        "text": args.text,
        "pairs": out,
        "quartiles": "lower, median, upper; milliseconds, and on / off",
        "threads": args.threads,
        "repacked": args.repack,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "command": "python scripts/bench_decode.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
    }
    print(json.dumps(told, indent=2))
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
