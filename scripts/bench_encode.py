"""Time the vision encoder beside stock llama.cpp's, in interleaved pairs, on random weights of CLIP ViT-L/14-336.

python scripts/bench_encode.py [--types F16 Q8_0] [--pictures 1 5] [--pairs 5] [--threads N]
                               [--kernels avx512-bf16 | avx512 | avx2] [--json OUT]

LLaVA-1.5 encodes one picture, 1.6 a picture as up to five tiles, each like one. The peak is the speed of products in
BF16 by PyTorch (oneDNN) on the same threads, where it is installed. tests/native/test_vision.py compares what is
computed with double precision. Stock's libraries are $ST3_STOCK_LIB_DIR's, else those in build/stock/lib.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import measuring
from PIL import Image

from st3_edge import demo
from st3_edge.commands.bench import random_model
from st3_edge.commands.bench.shapes import CLIP_L_336, SEED, Shape
from st3_edge.commands.bench.sides import Side
from st3_edge.commands.bench.worker import Job
from st3_edge.files.output import cache_folder, replacing
from st3_edge.native import machine

WIDTH = 4096  # of a 7B decoder
TEXT = Shape(2, WIDTH, 32, 32, 256, n_vocab=300, tied=True)  # as small as one can be that wide
KEYS = {"st3.start": 1, "st3.keep": 0.5}


def files(folder: Path, file_type: str) -> tuple[Path, Path]:
    """A small text model, and an encoder of that type for it; written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text, mmproj = folder / "encode-text.gguf", folder / f"encode-clip-l-336-{file_type}.gguf"
    if not text.is_file():
        with replacing(text) as file:
            random_model.write_text(Path(file.name), TEXT, "Q8_0", SEED)
    if not mmproj.is_file():
        with replacing(mmproj) as file:
            random_model.write_vision(Path(file.name), CLIP_L_336, WIDTH, SEED, file_type=file_type)
    return text, mmproj


def flops() -> float:
    """Multiplications and additions of one picture, counted as two."""
    t, n = CLIP_L_336, CLIP_L_336.n_visual
    layer = 2 * n * (4 * t.n_embd**2 + 2 * t.n_embd * t.n_ff) + 4 * n**2 * t.n_embd
    patches = 2 * n * 3 * t.patch_size**2 * t.n_embd
    return float(t.n_layer * layer + patches + 2 * n * (t.n_embd * WIDTH + WIDTH**2))


def peak(threads: int) -> float | None:
    """Operations a second of BF16 products by PyTorch, the fastest of many; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    a, b = (torch.randn(n, 4096, dtype=torch.bfloat16) for n in (2048, 4096))
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 4096 * 4096 / best


def pictures(folder: Path, n: int) -> list[str]:
    """Files of n pictures that all differ, as equal ones are encoded once: the demo's scenes, turned."""
    scenes, out = demo.scenes(), []
    for i in range(n):
        out.append(str(folder / f"encode-{i}.png"))
        Image.open(scenes[i % len(scenes)].picture).rotate(90 * (i // len(scenes))).save(out[-1])
    return out


def side(args: argparse.Namespace, ours: bool, file_type: str, n: int) -> Side:
    """One side's process."""
    text, mmproj = files(args.cache, file_type)
    job = Job(
        st3=ours,
        stock=None if ours else str(measuring.stock_folder()),
        keys=KEYS if ours else {},
        model=str(text),
        mmproj=str(mmproj),
        pictures=pictures(args.cache, n),
        question=None,
        visual=0,
        text=16,
        generate=1,
        n_threads=args.threads,
    )
    return Side("ours" if ours else "stock", job, {"ST3_VISION_KERNELS": args.kernels} if args.kernels else None)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0"], choices=["F32", "F16", "Q8_0"])
    parser.add_argument("--pictures", type=measuring.count, nargs="+", default=[1, 5])
    parser.add_argument("--pairs", type=measuring.count, default=5)
    parser.add_argument("--threads", type=measuring.count, default=machine.usable_cpus())
    parser.add_argument("--kernels", help="of ours (default: the fastest that this CPU has)")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--json", type=measuring.result_file, help="write the figures here as well")
    args = parser.parse_args()
    measuring.stock_folder()
    best = peak(args.threads)
    rows = []
    for file_type, n in itertools.product(args.types, args.pictures):
        sides = [side(args, ours, file_type, n) for ours in (False, True)]
        ms: dict[str, list[float]] = {one.name: [] for one in sides}
        try:
            for one in sides:
                one.open()
            for pair in range(args.pairs):
                for one in sides if pair % 2 == 0 else sides[::-1]:
                    ms[one.name].append(one.call("begin")["encode_ms"])
        finally:
            for one in sides:
                one.close()
        print(f"{file_type}, {n}: measured", file=sys.stderr)
        rows.append({"type": file_type, "pictures": n, "ms": ms})
    print("| mmproj | pictures | stock, s | ours, s | speedup (pairs) | GFLOP/s | share of the peak |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        stock, ours = row["ms"]["stock"], row["ms"]["ours"]
        ratios = [a / b for a, b in zip(stock, ours, strict=True)]
        speed = row["pictures"] * flops() / statistics.median(ours) * 1e3
        row |= {"ratios": ratios, "flops_per_second": speed, "share": speed / best if best else None}
        share = f"{row['share']:.2f}" if best else "-"
        seconds = " | ".join(f"{statistics.median(ms) / 1e3:.2f}" for ms in (stock, ours))
        speedup = measuring.spread(ratios, measuring.ratio)
        print(f"| {row['type']} | {row['pictures']} | {seconds} | {speedup} | {speed / 1e9:.0f} | {share} |")
    if best:
        print(f"peak: {best / 1e9:.0f} GFLOP/s in BF16 on {args.threads} threads")
    if args.json:
        setup = {"threads": args.threads, "kernels": args.kernels, "peak": best, "rows": rows, **machine.provenance()}
        measuring.write_json(args.json, setup)


if __name__ == "__main__":
    measuring.run(main)
