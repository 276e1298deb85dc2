"""Time prefill with ST3 on against off, interleaved, on a shape with random weights or on a GGUF of yours.

python scripts/bench_prefill.py [--shape llava-1.5-7b] [--type Q4_0] [--budget 0.30] [--pairs 5] [--json OUT]

Random weights are written once to --cache. Both models stay loaded; A B A B ..., medians; beside the measured
ratio stands the ideal one, which counts rows times layers. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import native_runtime
import numpy as np
import random_model


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The repository's commit, `-dirty` where the tree differs."""
    args = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def random_weights(shape: str, file_type: str, cache: Path, seed: int = 1) -> Path:
    """The file of that shape in the cache folder, written if it is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{shape}-{file_type}-seed{seed}.gguf"
    if not path.is_file():
        part = path.with_suffix(".part")

        def tell(x: float) -> None:
            print(f"\rwriting {path.name} {x:4.0%}", end="", file=sys.stderr)

        random_model.write(part, random_model.SHAPES[shape], file_type, seed, progress=tell)
        print(file=sys.stderr)
        part.rename(path)
    return path


def prompt(model: native_runtime.Model, visual: int, text: int, seed: int = 1) -> list:
    """Random pieces: 1/16 of the text tokens (at least BOS), an image of `visual` tokens, the rest of the text."""
    rng = np.random.default_rng(seed)
    side = int(visual**0.5)
    grid = (side, side) if side * side == visual else (0, 0)
    image = native_runtime.Image(rng.standard_normal((visual, model.n_embd)).astype(np.float32), *grid)
    before = max(1, text // 16)
    words = [1, *(int(t) for t in rng.integers(3, min(model.n_vocab, 32000), text - 1))]
    return [words[:before], image, words[before:]]


def once(ctx: native_runtime.Context, pieces: list) -> float:
    """Milliseconds of one prefill into an empty cache."""
    ctx.clear()
    start = time.perf_counter()
    code = ctx.prefill(pieces)
    ctx.logits()
    if code:
        raise SystemExit(f"prefill failed ({code}): {ctx.rt.last_error()}")
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a text GGUF of your own instead of random weights")
    parser.add_argument("--shape", default="llava-1.5-7b", choices=sorted(random_model.SHAPES))
    parser.add_argument("--type", default="Q4_0", choices=sorted(random_model.FILE_TYPES))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "st3-edge-bench")
    parser.add_argument("--preset", default="st3")
    parser.add_argument("--budget", type=float, default=0.30)
    parser.add_argument("--score", help="st3.score (default: the preset's)")
    parser.add_argument("--coverage", type=float)
    parser.add_argument("--visual", type=int, help="visual tokens (default: the shape's)")
    parser.add_argument("--text", type=int, default=64, help="text tokens, 1/16 of them before the image")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", default="F16", choices=sorted(native_runtime.KV_TYPES))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    folder = native_runtime.lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package or set ST3_LIB_DIR")
    path = args.model or random_weights(args.shape, args.type, args.cache)
    rt = native_runtime.Runtime(folder)
    keys: dict[str, native_runtime.Value] = {"st3.preset": args.preset, "st3.budget": args.budget}
    keys |= {f"st3.{k}": v for k, v in (("score", args.score), ("coverage", args.coverage)) if v is not None}
    off, on = native_runtime.Model(rt, path), native_runtime.Model(rt, path, keys)
    visual = args.visual or random_model.SHAPES[args.shape].n_visual
    pieces = prompt(off, visual, args.text)
    n = -(-(visual + args.text + 32) // 256) * 256
    ms: dict[str, list[float]] = {"off": [], "on": []}
    with (
        native_runtime.Context(off, n, kv=args.kv, threads=args.threads) as a,
        native_runtime.Context(on, n, kv=args.kv, threads=args.threads) as b,
    ):
        once(a, pieces), once(b, pieces)  # warm up
        report = b.report()
        if report["mode"] != "pruned-prefill":
            raise SystemExit(f"not pruned: {report['reason']}")
        for pair in range(args.pairs):
            ms["off"].append(once(a, pieces))
            ms["on"].append(once(b, pieces))
            last = ms["off"][-1] / ms["on"][-1]
            print(
                f"pair {pair + 1}: off {ms['off'][-1]:.0f} ms, on {ms['on'][-1]:.0f} ms, {last:.3f}x", file=sys.stderr
            )
    rows = [v + args.text for v in report["per_layer"]]
    ideal = (visual + args.text) * len(rows) / sum(rows)
    ratios = [x / y for x, y in zip(ms["off"], ms["on"], strict=True)]
    ratio = statistics.median(ms["off"]) / statistics.median(ms["on"])
    out = {
        "model": path.name,
        "visual": visual,
        "text": args.text,
        "keys": keys,
        "schedule": {k: report[k] for k in ("cuts", "counts", "keep", "score", "coverage", "budget")},
        "ms": {k: {"median": statistics.median(v), "min": min(v), "max": max(v), "all": v} for k, v in ms.items()},
        "ratio": ratio,
        "ratio_pairs": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "ideal_by_token_layers": ideal,
        "share_of_ideal": ratio / ideal,
        "ratio_by_flops": report["flops"]["prefill_full"] / report["flops"]["prefill"],
        "threads": args.threads,
        "kv": args.kv,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "commit": commit(),
    }
    print(json.dumps(out, indent=2))
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + "\n")
    on.close()
    off.close()


if __name__ == "__main__":
    main()
