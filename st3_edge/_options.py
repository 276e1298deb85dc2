"""Options that several commands share: which model, and how visual tokens are pruned."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .config import CURVES, PRESETS, ST3Config
from .errors import ModelError


def add_model(parser: argparse.ArgumentParser, n_gpu_layers: int = -1) -> argparse._ArgumentGroup:
    """--model, --mmproj, --threads and --n-gpu-layers with that default; returns their group."""
    group = parser.add_argument_group("model (default: the small one that comes with the package)")
    group.add_argument("--model", metavar="M.gguf", help="the text model of a LLaVA, in GGUF")
    group.add_argument("--mmproj", metavar="P.gguf", help="the vision half of the same LLaVA, in GGUF")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: those that this machine has)")
    group.add_argument(
        "--n-gpu-layers",
        "-ngl",
        type=int,
        default=n_gpu_layers,
        metavar="N",
        help="layers on a GPU, where the libraries were built for one; -1: all, 0: the CPU alone "
        f"(default {n_gpu_layers})",
    )
    return group


def add_schedule(parser: argparse.ArgumentParser, *, budget: bool = True) -> None:
    """The fields of ST3Config that commands offer, less budget and keep with budget=False; `config` reads them."""
    st3 = parser.add_argument_group("pruning (what is not given, the preset decides)")
    st3.add_argument(
        "--preset",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: the model file's, and where it has none st3; off: nothing is dropped)",
    )
    if budget:
        st3.add_argument(
            "--budget", type=float, metavar="B", help="mean share of visual tokens kept over the layers, above 0 to 1"
        )
        st3.add_argument(
            "--keep",
            type=float,
            metavar="R",
            help="share of visual tokens that each cut keeps, 0 to 1 (instead of --budget)",
        )
    st3.add_argument("--start", type=int, metavar="N", help="the first cut is after this many layers")
    st3.add_argument("--stride", type=int, metavar="N", help="layers from one cut to the next")
    st3.add_argument("--min-keep", type=int, metavar="N", help="visual tokens that are left in any case, per picture")
    st3.add_argument("--min-share", type=float, metavar="R", help="the same as a share of the picture's tokens, 0 to 1")
    st3.add_argument(
        "--score",
        metavar="S",
        help="how tokens are ranked: last-mean, text-max, ... (-sum: over the layers so far; + joins)",
    )
    st3.add_argument(
        "--coverage", type=float, metavar="C", help="share of the kept tokens spread evenly over the picture, 0 to 1"
    )
    st3.add_argument(
        "--anneal",
        metavar="CURVE",
        help=f"how visual tokens leave while the answer grows: {', '.join(CURVES)} (none: they stay)",
    )
    st3.add_argument("--anneal-tokens", type=int, metavar="N", help="words or so until --anneal-floor is reached")
    st3.add_argument(
        "--anneal-floor", type=float, metavar="R", help="share of the kept tokens that is left in the end, 0 to 1"
    )


def config(arguments: argparse.Namespace) -> ST3Config:
    """The schedule that was asked for. Raises ConfigError where it cannot be, ModelError where one file is missing."""
    if (arguments.model is None) != (arguments.mmproj is None):
        raise ModelError("--model and --mmproj belong together: the text model and the vision half of one LLaVA")
    return ST3Config(**{f.name: getattr(arguments, f.name) for f in fields(ST3Config) if hasattr(arguments, f.name)})
