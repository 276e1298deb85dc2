"""KV memory of one image, a text and an answer, from the process: ST3 against stock llama.cpp, random weights.

python scripts/bench_kv_memory.py [--shape llava-1.5-7b] [--text 512] [--answer 128] [--json OUT]

Each side runs in a process of its own: ours on the libraries in use, with preset `st3` as it is; stock on those in
$ST3_STOCK_LIB_DIR (else build/stock/lib), its n_ctx just what the work needs. Two measures:

told    what llama.cpp says that it allocated: the report's kv_bytes.allocated; stock's log line of its cache.
anon    growth of the anonymous resident bytes (RssAnon: mapped weights do not count). Stock allocates its cache with
        the context, so a cell's bytes are what a context of the work's size holds more than one of 256, by the cells.
        Ours grows while compute buffers grow too, so the same work is done once before, the cache is cleared, and one
        token decoded, at which it shrinks: KV is what that empty cache has (as told; 32 cells a layer) and the growth
        since. llama.cpp keeps a copy of the batch until the next one, so `after prefill` is read at the first token
        of the answer. malloc is told to map large blocks each on its own, else what is freed may stay resident.
        What else a context makes when it is created (room for graphs, outputs) is `other`.

Visual KV of stock is the visual tokens' cells; ours is all but the text's cells, so that cells that are allocated
and not used count against us. Nothing is timed, so other programs may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import measuring
import native_runtime
import numpy as np

from st3_edge.commands.bench.shapes import SHAPES
from st3_edge.native.machine import provenance

MIB = 1 << 20


def anon() -> int:
    """Anonymous resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Listening(native_runtime.Runtime):
    """A runtime that notes what stock's cache says about its size."""

    told: tuple[int, int] = 0, 0  # bytes, cells

    def _take_log(self, level: int, text: bytes, data: object) -> None:
        super()._take_log(level, text, data)
        found = re.match(rb"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells", text)
        if found:
            self.told = round(float(found[1]) * MIB), int(found[2])


def prompt(model: native_runtime.Model, visual: int, text: int, seed: int = 1) -> list:
    """Random pieces: 1/16 of the text tokens (at least BOS), an image of `visual` tokens, the rest of the text."""
    rng = np.random.default_rng(seed)
    side = int(visual**0.5)
    grid = (side, side) if side * side == visual else (0, 0)
    image = native_runtime.Image(rng.standard_normal((visual, model.n_embd)).astype(np.float32), *grid)
    before = max(1, text // 16)
    words = [1, *(int(t) for t in rng.integers(3, min(model.n_vocab, 32000), text - 1))]
    return [words[:before], image, words[before:]]


def decode(ctx: native_runtime.Context, rows: list[int] | np.ndarray, at: int) -> None:
    """llama_decode. Raises SystemExit where it fails: what is measured then would be something else."""
    if ctx.decode(rows, at):
        raise SystemExit(f"decode failed: {''.join(ctx.rt.log)}")


def prefill(ctx: native_runtime.Context, pieces: list, stock: bool) -> int:
    """The prompt, as each side takes it; returns its length."""
    at = 0
    for piece in pieces if stock else ():
        rows = piece.embd if isinstance(piece, native_runtime.Image) else piece
        decode(ctx, rows, at)
        at += len(rows)
    if not stock and ctx.prefill(pieces):
        raise SystemExit(f"prefill failed: {ctx.rt.last_error()}")
    return sum(len(p.embd) if isinstance(p, native_runtime.Image) else len(p) for p in pieces)


def work(args: argparse.Namespace) -> dict:
    """One side, in this process: bytes by both measures at the moments of the work."""
    stock = args.side == "stock"
    folder = measuring.stock_folder() if stock else native_runtime.built()
    rt = Listening(folder, st3=not stock)
    keys: dict[str, native_runtime.Value] = {} if stock else {"st3.preset": "st3"}
    out: dict = {}

    def now(ctx: native_runtime.Context) -> dict[str, int]:
        told = rt.told[0] if stock else ctx.report()["kv_bytes"]["allocated"]
        return {"told": told, "anon": anon() - loaded}

    with native_runtime.Model(rt, measuring.random_model(args), keys) as model:
        pieces = prompt(model, args.visual, args.text)
        said = [int(t) for t in np.random.default_rng(2).integers(3, model.n_vocab, args.answer)]
        sizes = {"small": 256, "work": args.visual + args.text + args.answer, "fresh": args.fresh}
        for name, n_ctx in sizes.items():
            if name == "fresh" and (not n_ctx or (stock and not args.fresh_stock)):
                continue
            loaded = anon()
            with native_runtime.Context(
                model, n_ctx, n_ubatch=min(n_ctx, 2048), threads=args.threads, kv=args.kv
            ) as ctx:
                out[name] = {"n_ctx": n_ctx, "cells": rt.told[1], "created": now(ctx)}
                if name != "work":
                    continue
                decode(ctx, said[:1], prefill(ctx, pieces, stock))
                ctx.clear()
                decode(ctx, said[:1], 0)
                ctx.clear()
                out["work"]["cleared"] = now(ctx)
                at = prefill(ctx, pieces, stock)
                ctx.logits()
                out["work"]["answer"] = [now(ctx)]  # before its first token, and after each
                for t, token in enumerate(said):
                    decode(ctx, [token], at + t)
                    ctx.logits()
                    out["work"]["answer"].append(now(ctx))
                if not stock:
                    report = ctx.report()
                    out["report"] = {
                        k: report[k] for k in ("mode", "anneal", "budget", "per_layer", "held", "kv_bytes")
                    }
    return out


def compare(stock: dict, ours: dict, args: argparse.Namespace) -> dict:
    """Visual KV of both, and ours by stock's, after prefill and over the answer, for each measure."""
    out: dict = {}
    small, large, work = stock["small"], stock["work"], ours["work"]
    for how in ("told", "anon"):
        cell = (large["created"][how] - small["created"][how]) / (large["cells"] - small["cells"])
        empty = work["cleared"]["told"] - work["cleared"][how]
        kv = [x[how] + empty for x in work["answer"]]
        visual = [x - (args.text + t) * cell for t, x in enumerate(kv)]
        first, full = int(how == "anon"), args.visual * cell
        out[how] = {
            "cell_bytes": round(cell),
            "stock": {"kv": round(large["cells"] * cell), "visual": round(full)},
            "st3": {"kv": kv[first], "visual": round(visual[first])},
            "share_after_prefill": round(visual[first] / full, 4),
            "share_over_answer": round(statistics.mean(visual[1:]) / full, 4),
            "share_by_step": [round(x / full, 4) for x in visual],
        }
    other = {side: x["work"]["created"] for side, x in (("stock", stock), ("st3", ours))}
    out["other"] = {side: x["anon"] - x["told"] for side, x in other.items()}
    return out


def main() -> None:
    """Parse the command line, run both sides, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_shape(parser, "llava-1.5-7b")
    parser.add_argument("--visual", type=measuring.count, help="visual tokens (default: the shape's)")
    parser.add_argument("--text", type=measuring.whole(2, 10**6), default=512)
    parser.add_argument("--answer", type=measuring.count, default=128)
    parser.add_argument(
        "--fresh", type=measuring.whole(0, 10**6), default=32768, help="n_ctx of a new context, nothing in it; 0: none"
    )
    parser.add_argument("--fresh-stock", action="store_true", help="that of stock too: 16 GiB at the 7B shape")
    parser.add_argument("--kv", default="F16", choices=sorted(native_runtime.KV_TYPES))
    parser.add_argument("--threads", type=measuring.count, default=2)
    parser.add_argument("--json", type=measuring.result_file, help="write the figures here as well")
    parser.add_argument("--side", choices=("stock", "st3"), help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    args.visual = args.visual or SHAPES[args.shape].n_visual
    if args.side:
        print(json.dumps(work(args)))
        return
    native_runtime.built()
    measuring.stock_folder()
    sides = {}
    for side in ("stock", "st3"):
        command, env = [sys.executable, *sys.argv, "--side", side], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        sides[side] = json.loads(done.stdout)
    out = {
        "model": measuring.random_model(args).name,
        "visual": args.visual,
        "text": args.text,
        "answer": args.answer,
        "kv": args.kv,
        **compare(sides["stock"], sides["st3"], args),
        "processes": sides,
        **provenance(),
    }
    for how in ("told", "anon"):
        r = out[how]
        stock, ours = r["stock"], r["st3"]
        print(
            f"{how}: visual KV {ours['visual'] / MIB:.1f} MiB of stock's {stock['visual'] / MIB:.1f} MiB after prefill "
            f"({r['share_after_prefill']:.1%}), {r['share_over_answer']:.1%} over {args.answer} tokens; "
            f"all KV {ours['kv'] / MIB:.1f} of {stock['kv'] / MIB:.1f} MiB"
        )
    for side, figures in sides.items():
        print(f"{side}: {out['other'][side] / MIB:.1f} MiB besides KV in a new context")
        if "fresh" in figures:
            new = figures["fresh"]["created"]
            print(f"  n_ctx {args.fresh}: told {new['told'] / MIB:.1f} MiB, anon {new['anon'] / MIB:.1f} MiB")
    if args.json:
        measuring.write_json(args.json, out)


if __name__ == "__main__":
    measuring.run(main)
