"""The options of `st3-edge bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...config import KV_TYPES, MAX_CTX
from .. import options
from .shapes import SHAPES, TYPES

QUESTION = "Describe the image."
TEXT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.description = (
        "One request, again and again: stock llama.cpp and ST3 take turns, each in a process of its own. "
        "Shows times, speeds and memory, the ratios of both, and what the schedule would allow at best. Run it on an "
        "idle machine; Ctrl-C shows what was measured so far."
    )
    parser.epilog = "Example: st3-edge bench --shape llava-1.5-7b --type Q4_0"
    files = options.add_model(parser, n_gpu_layers=0)
    files.add_argument("--image", action="append", metavar="FILE", help="a picture (default: one that is shipped)")
    files.add_argument("--question", metavar="TEXT", help=f"about the pictures (default: {QUESTION})")
    random = parser.add_argument_group("random weights in place of a model: they cost as much, and say nothing")
    random.add_argument("--shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    random.add_argument("--type", choices=TYPES, help=f"of the weights (default {TYPES[0]})")
    random.add_argument(
        "--visual", type=options.whole(1, 2**16), metavar="N", help="visual tokens (default: the shape's)"
    )
    random.add_argument(
        "--text", type=options.whole(2, 2**16), metavar="N", help=f"text tokens around them (default {TEXT})"
    )
    random.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where they are kept (default: your cache folder)"
    )
    options.add_schedule(parser)
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--against",
        choices=("stock", "off"),
        help="off: our own libraries with pruning off, which compute the same bits (default stock, where it is built)",
    )
    how.add_argument("--stock", metavar="DIR", help="its libraries (default: $ST3_STOCK_LIB_DIR, else build/stock/lib)")
    how.add_argument(
        "--pairs", type=options.whole(1, 1000), default=5, metavar="N", help="runs of each side (default 5)"
    )
    how.add_argument(
        "--generate", type=options.whole(1, 2**16), default=256, metavar="N", help="tokens of each answer (default 256)"
    )
    how.add_argument(
        "--n-ctx", type=options.whole(1, MAX_CTX), metavar="N", help="room in the context (default: what it takes)"
    )
    how.add_argument(
        "--n-ubatch", type=options.whole(1, MAX_CTX), metavar="N", help="tokens prefilled at once (default: all)"
    )
    how.add_argument(
        "--ctk", choices=KV_TYPES, default="f16", metavar="TYPE", help=f"of the KV cache: {', '.join(KV_TYPES)}"
    )
    how.add_argument(
        "--reload",
        action="store_true",
        help="load models anew for every pair: where weights lie in memory changes speeds by some per cent",
    )
    how.add_argument(
        "--no-repack",
        dest="repack",
        action="store_false",
        help="weights as they are in the file: slower, but both sides read the same memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: machine, setup, all runs, summary")
