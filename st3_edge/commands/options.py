"""Options that several commands share: which model, and how visual tokens are pruned."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..config import CURVES, MAX_CTX, PRESETS, RANKS, VISION_TYPES, ST3Config
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..report import Report


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option: a whole number within bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high}, not {text!r}")
        return value

    return read


def _sampling(name: str, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """The type of a sampling option: what `Sampling` takes for it."""

    def read(text: str) -> Any:
        from ..runtime.sampling import Sampling  # takes long to import

        value = kind(text)
        try:
            Sampling(**{name: value})
        except ConfigError as e:
            raise argparse.ArgumentTypeError(str(e)) from e
        return value

    read.__name__ = kind.__name__  # argparse shows it of what is no number
    return read


def add_files(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--hf, --model and --mmproj, which `which.find` reads; returns their group."""
    group = parser.add_argument_group("model (default: $ST3_MODEL, the config file's, or the small demo model)")
    group.add_argument(
        "--hf",
        "-hf",
        "--hf-repo",
        metavar="OWNER/REPO[:QUANT]",
        help="a vision model from Hugging Face, downloaded once (QUANT: Q4_K_M, or what there is)",
    )
    group.add_argument("--model", "-m", metavar="M.gguf", help="the language model of the pair, in GGUF")
    group.add_argument(
        "--mmproj", "-mm", metavar="P.gguf", help="its vision half, in GGUF (default: the one beside the model)"
    )
    return group


def add_model(parser: argparse.ArgumentParser, n_gpu_layers: int = -1) -> argparse._ArgumentGroup:
    """`add_files`, --threads and --n-gpu-layers with that default; returns their group."""
    group = add_files(parser)
    group.add_argument(
        "--threads", "-t", type=whole(1, 1024), metavar="N", help="CPU threads (default: those of this machine)"
    )
    group.add_argument(
        "--n-gpu-layers",
        "-ngl",
        type=whole(-1, 2**31 - 1),
        default=n_gpu_layers,
        metavar="N",
        help="layers on a GPU, where the libraries were built for one; -1: all, 0: the CPU alone "
        f"(default {n_gpu_layers}{'' if n_gpu_layers == -1 else '; of other commands -1'})",
    )
    return group


def add_schedule(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """The fields of ST3Config that commands offer, `without` of "budget" and "keep"; `config` reads them."""
    first = parser.add_argument_group("pruning")
    if "budget" not in without:
        first.add_argument(
            "--budget",
            type=float,
            metavar="B",
            help="share of the visual tokens that the layers keep on average, above 0 to 1 (0.5, unless the model "
            "file says otherwise)",
        )
    first.add_argument(
        "--preset",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: the model file's, or st3; off: nothing is dropped)",
    )
    st3 = parser.add_argument_group("advanced: the schedule in detail (default: the preset's)")
    if "keep" not in without:
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
        help=f"{' or '.join(VISION_TYPES)} (auto: the vision encoder computes in the type that the CPU is fastest in; "
        "file: in that of its file, as stock)",
    )


def add_shared(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What every command that asks a model takes; returns the group of the answer's options."""
    model = add_model(parser)
    answer = add_answer(parser)
    add_lora(model)
    add_schedule(parser)
    memory = parser.add_argument_group("advanced: memory")
    add_context(model, memory)
    memory.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep encoded pictures (not the pictures themselves) in files that only you can read, for the next time",
    )
    return answer


def add_lora(group: argparse._ArgumentGroup) -> None:
    """--lora."""
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="A.gguf[=S]",
        help="a LoRA adapter of the text model, and its strength (default 1); may be given several times",
    )


def add_context(group: argparse._ArgumentGroup, advanced: argparse._ArgumentGroup | None = None) -> None:
    """--n-ctx, and in `advanced`, where there is one, --n-ubatch."""
    group.add_argument(
        "--n-ctx",
        "-c",
        type=whole(0, MAX_CTX),
        default=4096,
        metavar="N",
        help="room for prompt and answer, in tokens; 0: what the model was trained on (default 4096)",
    )
    (advanced or group).add_argument(
        "--n-ubatch",
        type=whole(1, MAX_CTX),
        metavar="N",
        help="tokens prefilled at once; a longer prompt is read unpruned (default: --n-ctx, at most 4096)",
    )


def add_answer(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--system, --max-tokens and the sampling options; `answer` reads them, less --system. Returns their group."""
    group = parser.add_argument_group("answer")
    group.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    group.add_argument(
        "--max-tokens",
        "-n",
        type=whole(-(2**31), 2**31 - 1),
        default=256,
        metavar="N",
        help="longest answer, in tokens; 0 or less: as long as there is room in --n-ctx (default 256)",
    )
    group.add_argument(
        "--temperature",
        type=_sampling("temperature"),
        default=0.0,
        metavar="T",
        help="0: always the likeliest word (default); 1: much chance",
    )
    group.add_argument(
        "--top-p",
        type=_sampling("top_p"),
        metavar="P",
        help="with a temperature above 0: choose among the likeliest words that add up to P",
    )
    group.add_argument(
        "--top-k",
        type=_sampling("top_k", int),
        metavar="K",
        help="with a temperature above 0: choose among the K likeliest words",
    )
    group.add_argument(
        "--min-p",
        type=_sampling("min_p"),
        metavar="P",
        help="with a temperature above 0: choose among words that are P times as likely as the best",
    )
    group.add_argument(
        "--repeat-penalty",
        type=_sampling("repeat_penalty"),
        metavar="R",
        help="above 1: words that were said count for less",
    )
    group.add_argument(
        "--seed",
        dest="sampling_seed",  # ST3Config has a seed too
        type=_sampling("seed", int),
        metavar="N",
        help="with a temperature above 0: the same N gives the same answer (default: another one each time)",
    )
    return group


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `Llava.create_chat_completion` that `add_answer` offers."""
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "repeat_penalty": arguments.repeat_penalty,
        "seed": arguments.sampling_seed,
    }


def idle(arguments: argparse.Namespace) -> str:
    """What to tell of sampling options that change nothing; "" where there are none."""
    names = {"--top-p": "top_p", "--top-k": "top_k", "--min-p": "min_p", "--seed": "sampling_seed"}
    given = [name for name, dest in names.items() if getattr(arguments, dest) is not None]
    if arguments.temperature or not given:
        return ""
    return f"(temperature 0 takes the likeliest word, whatever {', '.join(given)} says: --temperature allows chance)"


def system(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The message of --system, where there is one."""
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


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
    """The schedule that was asked for, on the command line or in the config file. Raises ConfigError where it cannot
    be."""
    given = {f.name: getattr(arguments, f.name) for f in fields(ST3Config) if hasattr(arguments, f.name)}
    if arguments.preset is None:  # another preset is another schedule
        exclusive = {"budget", "keep"}
        typed = {name for name, value in given.items() if value is not None}
        own = typed | (exclusive if typed & exclusive else set())
        offered = set(given) | (exclusive if "budget" in given else set())  # st3-edge tune looks for the budget itself
        settings = dict(getattr(arguments, "settings", {}))
        if typed and settings.get("preset") == "off":  # what is typed asks for pruning
            del settings["preset"]
        given |= {f.name: settings[f.name] for f in fields(ST3Config) if f.name in settings.keys() & offered - own}
    idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if name != "preset" and value is not None]
    if given.get("preset") == "off" and idle:
        raise ConfigError(f"--preset off drops nothing, so there is nothing for {', '.join(idle)} to say")
    try:
        return ST3Config(**given)
    except ConfigError as e:  # in a person's words, not in Python's
        name, must, rest = str(e).partition(" must be ")
        if not must:
            raise
        raise ConfigError(f"--{name.replace('_', '-')}{must}{rest}") from e
