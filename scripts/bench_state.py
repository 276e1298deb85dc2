"""Time and memory of asking for a state's size and of saving it, beside stock llama.cpp.

python scripts/bench_state.py [--positions 2000] [--images 2] [--rounds 5] [--budget 0.2] [--json OUT]

A conversation of `positions` with images of 576 tokens: stock saves all of its KV cells, ours what is left of them, and
the images' embeddings. The model has random weights, and the KV cache of a 7B one (32 layers of 4096) with hardly
anything else. Each side is a process of its own: stock on the libraries in $ST3_STOCK_LIB_DIR (else
build/stock/lib), ours with ST3 off and on. Rounds alternate. `peak`: what the process's resident memory grew by at most
in a save; `memory` saves into a buffer that was touched before, `file` writes a file.
"""

from __future__ import annotations

import argparse
import ctypes as C
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import native_runtime
import numpy as np

from st3_edge.commands.bench.random_model import write_text
from st3_edge.commands.bench.shapes import Shape
from st3_edge.native import machine

SHAPE = Shape(32, 4096, 32, 32, 256, n_vocab=1024)
N_IMAGE, SIDE = 576, 24
WHAT = ("size", "memory", "file")


def talk(ctx: native_runtime.Context, positions: int, images: int, stock: bool) -> None:
    """A conversation of so many positions: in each part text, then an image, then text with a question."""
    rng = np.random.default_rng(1)
    at = 0
    for i in range(images):
        part = positions // images if i + 1 < images else positions - at
        words = [int(t) for t in rng.integers(3, SHAPE.n_vocab, part - N_IMAGE)]
        image = native_runtime.Image(rng.standard_normal((N_IMAGE, SHAPE.n_embd)).astype(np.float32), SIDE, SIDE)
        codes = [ctx.decode(words[:64], at, "none")]
        codes.append(ctx.decode(image.embd, at + 64, "none") if stock else ctx.picture(image, at + 64))
        codes.append(ctx.decode(words[64:], at + 64 + N_IMAGE))
        if any(codes):
            raise SystemExit(f"the conversation failed: {codes}")
        at += part


def side(model_path: str, keys: str, positions: int, images: int) -> None:
    """One process: has the conversation, then measures once for each line that comes, and prints what it found."""
    own = json.loads(keys)
    folder = measuring.stock_folder() if own is None else native_runtime.built()
    rt = native_runtime.Runtime(folder, st3=own is not None)
    with (
        native_runtime.Model(rt, Path(model_path), own or {}) as model,
        native_runtime.Context(model, n_ctx=positions, n_batch=positions, n_ubatch=512, threads=2) as ctx,
        tempfile.TemporaryDirectory() as scratch,
    ):
        talk(ctx, positions, images, own is None)
        size = ctx.state_size(0)
        buffer = (C.c_uint8 * size)()
        C.memset(buffer, 1, size)
        save = rt.llama.llama_state_seq_get_data
        work: dict[str, Callable[[], int]] = {
            "size": lambda: ctx.state_size(0),
            "memory": lambda: save(ctx.ptr, buffer, size, 0),
            "file": lambda: size * ctx.save_file(Path(scratch) / "state", 0),
        }
        print(json.dumps({"bytes": size}), flush=True)
        for _ in sys.stdin:
            found: dict[str, Any] = {}
            for what, do in work.items():
                machine.reset_peak_memory()
                before, begin = machine.peak_memory(), time.perf_counter()
                if do() != size:
                    raise SystemExit(f"{what} failed")
                found[what] = {"ms": 1e3 * (time.perf_counter() - begin), "peak": machine.peak_memory() - before}
            print(json.dumps(found), flush=True)


def main() -> None:
    """Makes the model, starts the sides, has them measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=measuring.count, default=2000)
    parser.add_argument("--images", type=measuring.count, default=2)
    parser.add_argument("--rounds", type=measuring.count, default=5)
    parser.add_argument("--budget", type=measuring.budget, default=0.2)
    parser.add_argument("--json", type=measuring.result_file)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        path, keys = args.side
        side(path, keys, args.positions, args.images)
        return
    if args.positions < args.images * (N_IMAGE + 65):
        parser.error(f"{args.images} images do not fit {args.positions} positions")
    native_runtime.built()
    measuring.stock_folder()
    sides = {"stock": None, "off": {"st3.preset": "off"}, "st3": {"st3.preset": "st3", "st3.budget": args.budget}}
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_text(path, SHAPE)
        command = [sys.executable, __file__, "--positions", str(args.positions), "--images", str(args.images)]
        running: dict[str, subprocess.Popen[str]] = {}

        def take(name: str) -> Any:
            out = running[name].stdout
            assert out
            line = out.readline()
            if not line:
                sys.exit(f"{name} failed")
            return json.loads(line)

        for name, own in sides.items():
            words = [*command, "--side", str(path), json.dumps(own)]
            running[name] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            found[name] |= take(name)
        for _ in range(args.rounds):
            for name, process in running.items():
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
                for what, figures in take(name).items():
                    for unit, value in figures.items():
                        found[name].setdefault(what, {}).setdefault(unit, []).append(value)
        for process in running.values():
            process.communicate()
    print(f"{args.positions} positions, {args.images} images; medians of {args.rounds} rounds (smallest to largest)\n")
    print("| | state, MB | size, ms | save to memory, ms | peak, MB | save to a file, ms | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for name, figures in found.items():
        row = [f"{figures['bytes'] / 1e6:.1f}"]
        for what in WHAT:
            row.append(measuring.spread(figures[what]["ms"]))
            row += [f"{max(figures[what]['peak']) / 1e6:.1f}"] if what != "size" else []
        print(f"| {name} | {' | '.join(row)} |")
    if args.json:
        measuring.write_json(args.json, {**machine.provenance(), "found": found})


if __name__ == "__main__":
    measuring.run(main)
