"""Options that several commands share: which model, and how visual tokens are pruned."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import CURVES, PRESETS, RANKS, VISION_TYPES, ST3Config
from ..errors import ConfigError, ModelError
from ..report import Report


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


def add_schedule(parser: argparse.ArgumentParser, *, budget: bool = True) -> argparse._ArgumentGroup:
    """The fields of ST3Config that commands offer, less budget and keep with budget=False; `config` reads them.
    Returns their group."""
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
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a kept token stands for the dropped ones that are most like it",
    )
    st3.add_argument(
        "--rank",
        metavar="R",
        help=f"{' or '.join(RANKS)} (a token that resembles one of a higher score counts for less)",
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
    st3.add_argument(
        "--vision-type",
        metavar="T",
        help=f"{' or '.join(VISION_TYPES)} (auto: the vision encoder computes in BF16 where the CPU is fast at it; "
        "file: in the type of its file, as stock)",
    )
    return st3


def add_shared(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What every command that asks a model takes; returns the group of the answer's options."""
    add_context(add_model(parser))
    add_schedule(parser)
    return add_answer(parser)


def add_context(group: argparse._ArgumentGroup) -> None:
    """--n-ctx and --n-ubatch."""
    group.add_argument(
        "--n-ctx",
        type=int,
        default=4096,
        metavar="N",
        help="room for prompt and answer, in tokens; 0: what the model was trained on (default 4096)",
    )
    group.add_argument(
        "--n-ubatch",
        type=int,
        metavar="N",
        help="tokens prefilled at once; a longer prompt is read unpruned (default: --n-ctx, at most 4096)",
    )


def add_answer(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--max-tokens, --temperature and --seed; `answer` reads them. Returns their group."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer, in tokens; 0 or less: as long as there is room in --n-ctx (default 256)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest word (default); 1: much chance",
    )
    group.add_argument(
        "--seed",
        dest="sampling_seed",  # ST3Config has a seed too
        type=int,
        metavar="N",
        help="with a temperature above 0: the same N gives the same answer (default: another one each time)",
    )
    return group


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `Llava.create_chat_completion` that `add_answer` offers."""
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.sampling_seed,
    }


def is_full(report: Report, options: Mapping[str, Any]) -> bool:
    """Whether the answer ended because the context was full. `options`: of `answer`."""
    return report.finish_reason == "length" and not 0 < options["max_tokens"] <= report.n_generated


def cut(report: Report, options: Mapping[str, Any], n_ctx: int) -> str:
    """What to tell where the answer had not come to its end; "" where it had. `options`: of `answer`."""
    if report.finish_reason != "length":
        return ""
    if is_full(report, options):
        return f"(the context of {n_ctx} tokens is full: raise --n-ctx)"
    return f"(cut at --max-tokens {options['max_tokens']})"


def config(arguments: argparse.Namespace) -> ST3Config:
    """The schedule that was asked for. Raises ConfigError where it cannot be, ModelError where one file is missing."""
    if (arguments.model is None) != (arguments.mmproj is None):
        raise ModelError("--model and --mmproj belong together: the text model and the vision half of one LLaVA")
    given = {f.name: getattr(arguments, f.name) for f in fields(ST3Config) if hasattr(arguments, f.name)}
    idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if name != "preset" and value is not None]
    if arguments.preset == "off" and idle:
        raise ConfigError(f"--preset off drops nothing, so there is nothing for {', '.join(idle)} to say")
    return ST3Config(**given)
