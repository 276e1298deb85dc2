"""Time two schedules beside each other, prefill by prefill and decode step by step, on a shape with random weights.

python scripts/bench_schedules.py [--shape llava-1.5-7b] [--type Q4_0] [--budget 0.30] [--steps 64]
                                  [--n-gpu-layers 0] [--json OUT]

`st3-edge bench` compares with stock; this compares two models that differ in `st3.*` keys alone:

    scoring   the default schedule, against the same numbers of tokens left in the same steps but chosen without looking
              at the attention: what recording and ranking it costs
    merging   the default schedule without merging, against it: what a kept token that stands for others costs
    distance  the default schedule ranked by score alone, against it: what ranking by distance costs
    pruned    annealing after a pruned prefill, against the same prefill without annealing
    alone     annealing after a whole prefill, against ST3 off
    control   two equal ones: how far a pair differs by chance

Both models of a pair are loaded, prefill the same prompt and decode the same tokens, in the order A B, B A, A B, ...
Where repacked weights lie in memory alone changes a model's speed by some per cent, so weights are read as they are in
the file, the same pages by both, and the pair is run in either order of loading. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import measuring
import native_runtime
import numpy as np
from bench_kv_memory import prompt

from st3_edge.commands.bench.shapes import SHAPES
from st3_edge.native.machine import provenance

Keys = dict[str, native_runtime.Value]


def pairs(budget: float) -> dict[str, tuple[Keys, Keys]]:
    """The `st3.*` keys of both models of each pair: (A, B)."""
    default: Keys = {"st3.preset": "st3", "st3.budget": budget}
    stay: Keys = {**default, "st3.anneal": "none"}
    return {
        "scoring": ({**default, "st3.preset": "random", "st3.anneal": "linear", "st3.anneal_score": "random"}, default),
        "merging": ({**default, "st3.merge": False}, default),
        "distance": ({**default, "st3.rank": "score"}, {**default, "st3.rank": "distance"}),
        "pruned": (stay, default),
        "alone": ({}, {"st3.preset": "st3", "st3.keep": 1.0}),
        "control": (stay, stay),
    }


def alternately(
    contexts: list[native_runtime.Context],
    n: int,
    call: Callable[[native_runtime.Context, int], int],
    before: Callable[[native_runtime.Context], None] = lambda _: None,
) -> np.ndarray:
    """Milliseconds until what call(context, i) computes is there, logits included: float64 [2, 1 + n], taken in the
    order A B, B A, ...; i = -1, the first, warms up. `before` is not timed."""
    ms = np.zeros((2, 1 + n))
    for i in range(-1, n):
        for which in ((0, 1), (1, 0))[i % 2]:
            ctx = contexts[which]
            before(ctx)
            start = time.perf_counter()
            code = call(ctx, i)
            ctx.rt.llama.llama_get_logits_ith(ctx.ptr, -1)  # waits for them
            if code:
                raise SystemExit(f"it failed ({code}): {ctx.rt.last_error()}")
            ms[which, 1 + i] = 1e3 * (time.perf_counter() - start)
    return ms


def measure(
    rt: native_runtime.Runtime, path: Path, keys: list[Keys], args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Milliseconds of prefills, float64 [2, 1 + prefills], and of decode steps, [2, 1 + steps], of two models in the
    order of keys."""
    models = [native_runtime.Model(rt, path, k, repack=False) for k in keys]
    visual = SHAPES[args.shape].n_visual
    at = visual + args.text
    contexts = [native_runtime.Context(m, at + args.steps + 1, threads=args.threads) for m in models]
    pieces = prompt(models[0], visual, args.text)
    said = [int(t) for t in np.random.default_rng(2).integers(3, models[0].n_vocab, args.steps + 1)]
    out = {
        "prefill": alternately(
            contexts, args.prefills, lambda ctx, _: ctx.prefill(pieces), native_runtime.Context.clear
        ),
        "decode": alternately(contexts, args.steps, lambda ctx, t: ctx.decode([said[t + 1]], at + t + 1)),
    }
    for it in (*contexts, *models):
        it.close()
    return out


def summary(ms: np.ndarray) -> dict:
    """Medians of milliseconds float64 [2, 1 + n] (A, B), and B / A: of the medians, and of the sums; all without the
    first, which stands by itself."""
    first, rest = ms[:, 0], ms[:, 1:]
    a, b = (float(np.median(row)) for row in rest)
    whole = float(rest[1].sum() / rest[0].sum())
    return {
        "n": rest.shape[1],
        "first_ms": [round(float(x), 3) for x in first],
        "ms": [round(a, 3), round(b, 3)],
        "ratio": round(b / a, 4),
        "of_sums": round(whole, 4),
    }


def together(rounds: list[dict]) -> dict:
    """The mean over rounds of what `summary` gives, ratios geometric: each round has the other model loaded first."""
    return {
        **{
            key: [round(float(np.mean(x)), 3) for x in zip(*(r[key] for r in rounds), strict=True)]
            for key in ("first_ms", "ms")
        },
        **{key: round(float(np.exp(np.mean([np.log(r[key]) for r in rounds]))), 4) for key in ("ratio", "of_sums")},
        "rounds": rounds,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_shape(parser, "llava-1.5-7b")
    parser.add_argument("--budget", type=measuring.budget, default=0.30)
    parser.add_argument(
        "--text", type=measuring.whole(2, 10**6), default=64, help="text tokens, 1/16 of them before the image"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(pairs(1.0)), default=sorted(pairs(1.0)), help="these pairs")
    parser.add_argument("--prefills", type=measuring.count, default=3, help="of each model in a round")
    parser.add_argument("--steps", type=measuring.count, default=64, help="of each model in a round")
    parser.add_argument("--rounds", type=measuring.count, default=2, help="each loads the models in the other order")
    parser.add_argument("--threads", type=measuring.count, default=2)
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    parser.add_argument("--json", type=measuring.result_file, help="write the figures here as well")
    args = parser.parse_args()
    folder = native_runtime.built()
    os.environ["ST3_GPU_LAYERS"] = str(args.n_gpu_layers)
    path = measuring.random_model(args)
    rt = native_runtime.Runtime(folder)
    out: dict = {}
    print(f"{'pair':<20}{'A':>13}{'B':>13}{'B / A':>8}")
    for name, keys in pairs(args.budget).items():
        if name not in args.only:
            continue
        rounds = []
        for n in range(args.rounds):
            order = (0, 1) if n % 2 == 0 else (1, 0)
            ms = measure(rt, path, [keys[i] for i in order], args)
            rounds.append({what: rows[list(order)] for what, rows in ms.items()})  # A first
        out[name] = {"keys": keys}
        for what in ("prefill", "decode"):
            out[name][what] = together([summary(ms[what]) for ms in rounds])
            row = name, what, *out[name][what]["ms"], out[name][what]["ratio"]
            print("{:<10}{:<10}{:>10.2f} ms{:>10.2f} ms{:>8.3f}".format(*row), flush=True)
    figures = {
        "model": path.name,
        "visual": SHAPES[args.shape].n_visual,
        "text": args.text,
        "threads": args.threads,
        "n_gpu_layers": args.n_gpu_layers,
        "pairs": out,
        **provenance(),
    }
    if args.json:
        measuring.write_json(args.json, figures)


if __name__ == "__main__":
    measuring.run(main)
