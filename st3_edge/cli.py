"""The command line: `st3-edge demo`, `ask` and `doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ._console import INTERRUPTED, Console, run
from .config import PRESETS, ST3Config
from .errors import ModelError, PromptError, St3Error, one_line

if TYPE_CHECKING:
    from .llava import Llava

_FAILED = 1
_USAGE = 2

_STAGES = {"encode": "looking at the picture", "prefill": "reading the prompt", "decode": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage before it."""
        self.exit(_USAGE, f"st3-edge: error: {one_line(message)} ({self.prog} -h shows how)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="st3-edge",
        description="Ask a LLaVA model about pictures, on this machine. Visual tokens that the answer does not need "
        "are dropped on the way (ST3), so that it comes sooner and takes less memory.",
        epilog="Begin with: st3-edge demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    commands.add_parser(
        "demo",
        help="show the small model that comes with the package at work",
        description="Shows pictures to the small model that comes with the package, streams its answers, and measures "
        "what ST3 saves on this machine. Takes less than a minute.",
    )

    ask = commands.add_parser(
        "ask",
        help="ask about one picture or several",
        usage="st3-edge ask IMAGE... QUESTION [options]",
        description="Asks a question about one picture or several. The answer goes to standard output, word by word; "
        "all else to standard error.",
        epilog="Example: st3-edge ask photo.jpg 'What is on the table?' --model llava.gguf --mmproj mmproj.gguf",
    )
    ask.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE... QUESTION",
        help="picture files (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM) or data: URLs, and last the question",
    )
    files = ask.add_argument_group("model (default: the small one that comes with the package)")
    files.add_argument("--model", metavar="M.gguf", help="the text model of a LLaVA, in GGUF")
    files.add_argument("--mmproj", metavar="P.gguf", help="the vision half of the same LLaVA, in GGUF")
    files.add_argument(
        "--n-ctx", type=int, default=4096, metavar="N", help="room for prompt and answer, in tokens (default 4096)"
    )
    files.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: those that this machine has)")
    st3 = ask.add_argument_group("pruning (what is not given, the preset decides)")
    st3.add_argument(
        "--preset", default="st3", metavar="NAME", help=f"{', '.join(PRESETS)} (default st3; off: nothing is dropped)"
    )
    st3.add_argument(
        "--budget", type=float, metavar="B", help="mean share of visual tokens kept over the layers, above 0 to 1"
    )
    st3.add_argument("--start", type=int, metavar="N", help="the first cut is after this many layers")
    st3.add_argument("--stride", type=int, metavar="N", help="layers from one cut to the next")
    st3.add_argument(
        "--keep",
        type=float,
        metavar="R",
        help="share of visual tokens that each cut keeps, 0 to 1 (instead of --budget)",
    )
    st3.add_argument("--min-keep", type=int, metavar="N", help="visual tokens that a cut leaves at least, per picture")
    st3.add_argument(
        "--score",
        metavar="S",
        help="how tokens are ranked: last-mean, text-max, ... (-sum: over the layers so far; + joins)",
    )
    st3.add_argument(
        "--coverage", type=float, metavar="C", help="share of the kept tokens spread evenly over the picture, 0 to 1"
    )
    answer = ask.add_argument_group("answer")
    answer.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default 256)"
    )
    answer.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest word (default); 1: much chance",
    )
    answer.add_argument("--json", action="store_true", help="print one JSON object with the answer and what ST3 did")
    answer.add_argument(
        "--trace", action="store_true", help="with --json: also prompt tokens, first logits and the visual tokens kept"
    )

    doctor = commands.add_parser(
        "doctor",
        help="tell what is installed and whether it works",
        description="Tells versions, libraries, CPU features and devices, and what is missing. Exit code 1 if "
        "something keeps the package from working.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one run only: a question behind an option is left over.
    if arguments.command == "ask" and not any(word.startswith("-") for word in rest):
        arguments.inputs += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command is None and not arguments.version:
        parser.error("say what to do: demo, ask or doctor")
    if arguments.command == "ask" and len(arguments.inputs) < 2:
        parser.error("ask needs at least one picture, and last the question")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (an error of ours), 2 (usage), 130 (Ctrl-C)."""
    try:
        arguments = _parse(argv)
        console = Console()
        if arguments.version:
            return _version(console)
        command = {"demo": _demo, "ask": _ask, "doctor": _doctor}[arguments.command]
        return run(console, lambda: command(console, arguments))
    except St3Error as e:
        console.note(f"st3-edge: error: {one_line(e)}")
        return _FAILED
    except BrokenPipeError:  # whoever read our output has left
        return _FAILED
    except KeyboardInterrupt:
        print("st3-edge: interrupted", file=sys.stderr)
        return INTERRUPTED


def _version(console: Console) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        console.say(f"st3-edge {version('st3-edge')}")
    except PackageNotFoundError:
        console.say("st3-edge (not installed: run from its sources)")
    return 0


def _demo(console: Console, _: argparse.Namespace) -> int:
    from . import _show

    return _show.run(console)


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    from . import _doctor

    found = _doctor.examine()
    console.say(json.dumps(found, indent=2) if arguments.json else _doctor.describe(found))
    return _FAILED if found["problems"] else 0


def _ask(console: Console, arguments: argparse.Namespace) -> int:
    from . import images

    *pictures, question = arguments.inputs
    if not question.strip():
        raise PromptError("the question is empty")
    config = ST3Config(
        preset=arguments.preset,
        budget=arguments.budget,
        start=arguments.start,
        stride=arguments.stride,
        keep=arguments.keep,
        min_keep=arguments.min_keep,
        score=arguments.score,
        coverage=arguments.coverage,
    )
    if (arguments.model is None) != (arguments.mmproj is None):
        raise ModelError("--model and --mmproj belong together: the text model and the vision half of one LLaVA")

    # Before the model: loading a large one takes long, and a bad picture would be told of only then.
    content = [{"type": "image", "image": images.load(picture)} for picture in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    console.stage("loading the model")
    with _load(console, arguments, config) as llava:
        console.stage(None)
        chunks: Any = llava.create_chat_completion(
            messages,
            stream=True,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            trace=arguments.trace,
        )
        for chunk in chunks:
            piece = chunk["choices"][0]["delta"].get("content", "")
            if piece and not arguments.json:
                console.say(piece, end="")
        report = llava.last_report
        assert report is not None
    if arguments.json:
        console.say(json.dumps(report.to_dict()))
        return 0
    console.say()
    kv, ms, visual = report.kv_bytes, report.ms, report.visual_tokens
    console.note(
        f"[{report.mode}{f' ({report.reason})' if report.reason else ''}: {visual.given} visual tokens, "
        f"{report.schedule.budget:.0%} kept over the layers; KV {kv.live / 1e6:.1f} of {kv.full / 1e6:.1f} MB; "
        f"encode {ms.encode:.0f} ms, prefill {ms.prefill:.0f} ms, decode {ms.decode:.0f} ms]"
    )
    return 0


def _load(console: Console, arguments: argparse.Namespace, config: ST3Config) -> Llava:
    from . import demo
    from .llava import Llava

    model, mmproj = (arguments.model, arguments.mmproj) if arguments.model else demo.model_paths()
    return Llava(
        model,
        mmproj,
        config,
        n_ctx=arguments.n_ctx,
        n_threads=arguments.threads,
        on_stage=lambda stage: console.stage(_STAGES[stage]),
    )
