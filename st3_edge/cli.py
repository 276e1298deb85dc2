"""The command line, `st3-edge COMMAND`: finds the command, reads its words and runs it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from .commands.parser import Parser, of_command, suggestion
from .errors import St3Error, one_line

_FAILED = 1
_INTERRUPTED = 130
_WITH_PICTURES = ("ask", "inspect", "chat")


class _Command(NamedTuple):
    """options: the module whose add_arguments(parser) describes it, quick to import; main: the one whose main(console,
    arguments) does it and returns the exit code."""

    options: str
    main: str
    help: str


_COMMANDS = {
    "demo": _Command("demo", "demo", "see the small model that comes with the package at work"),
    "ask": _Command("ask", "ask", "ask about one picture or several"),
    "chat": _Command("chat.options", "chat.command", "talk about pictures, question after question"),
    "serve": _Command("serve.options", "serve.command", "a web page, and OpenAI's and Anthropic's APIs (llama-server)"),
    "models": _Command("models", "models", "list the models that were downloaded"),
    "inspect": _Command("inspect.options", "inspect.command", "show which patches of a picture are kept"),
    "bench": _Command(
        "bench.options", "bench.command", "measure what ST3 gives on this machine, beside stock llama.cpp"
    ),
    "tune": _Command("tune.options", "tune.command", "find the cheapest schedule for your model and pictures"),
    "doctor": _Command("doctor", "doctor", "show what is installed and whether it works"),
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Of all commands, with the options of one."""
    parser = Parser(
        prog="st3-edge",
        description="Ask a vision model about pictures, on this machine. Visual tokens that the answer does not need "
        "are dropped on the way (ST3), so that it comes sooner and its KV cache takes less memory.",
        epilog="Begin with: st3-edge demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (options, _, text) in _COMMANDS.items():
        of_name = commands.add_parser(name, help=text)
        if name == command and name != "serve":
            _module(options).add_arguments(of_name)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f".commands.{name}", __package__)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    behind: list[str] = []  # words that are no options, whatever they begin with
    if argv[:1] and argv[0] in _WITH_PICTURES and "--" in argv:
        end = argv.index("--")
        argv, behind = argv[:end], [*argv[end + 1 :]]
    parser = _parser(next((word for word in argv if not word.startswith("-")), None))
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None and not arguments.version:
        parser.print_help()
        parser.exit()
    own = of_command(parser, arguments.command)
    if hasattr(arguments, "model") and _module("settings").use(own):
        arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one run only: what stands behind an option is left over.
    if arguments.command in _WITH_PICTURES and not any(word.startswith("-") and word != "-" for word in rest):
        (arguments.images if arguments.command == "chat" else arguments.inputs).extend([*rest, *behind])
    elif rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        known = [name for action in own._actions for name in action.option_strings]
        own.error(f"unrecognized arguments: {' '.join(rest)}{suggestion(word.partition('=')[0], known)}")
    if arguments.command in ("ask", "inspect"):
        _check_inputs(own, arguments.command, arguments.inputs)
    if arguments.command == "ask" and arguments.trace and not arguments.json:
        own.error("--trace goes with --json")
    return arguments


def _check_inputs(parser: argparse.ArgumentParser, command: str, inputs: Sequence[str]) -> None:
    """Pictures, and last the question."""
    if len(inputs) < 2:
        parser.error(f"{command} needs at least one picture, and last the question")
    from .prompts.image_files import SUFFIXES

    if inputs[-1].lower().endswith(SUFFIXES) and os.path.isfile(inputs[-1]):  # noqa: PTH113 which raises nothing
        parser.error("the question is missing: it comes last, behind the pictures")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (an error of ours), 2 (usage), 130 (Ctrl-C)."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        arguments: Any
        if not sys.stdin:  # closed by whoever started us
            sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
        if words[:1] == ["--version"]:
            return _version()
        if words[:1] == ["serve"]:  # most of its options are llama-server's
            name, arguments = "serve", _module("serve.options").parse(Parser, words[1:])
        else:
            arguments = _parse(words)
            name = arguments.command
        if name is None:
            return _version()
        code: int = _module(_COMMANDS[name].main).main(_module("console").Console(), arguments)
        return code
    except St3Error as e:
        _module("console").Console().error(one_line(e))
        return _FAILED
    except BrokenPipeError:  # whoever read our output has left
        return _FAILED
    except KeyboardInterrupt:
        print("st3-edge: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _version() -> int:
    from importlib.metadata import PackageNotFoundError, version

    console = _module("console").Console()
    try:
        console.say(f"st3-edge {version('st3-edge')}")
    except PackageNotFoundError:
        console.say("st3-edge (not installed: run from its sources)")
    return 0
