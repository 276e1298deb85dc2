"""The command line: `st3-edge demo`, `ask`, `inspect`, `chat`, `serve`, `bench`, `tune` and `doctor`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .commands import ask, demo
from .commands.bench import options as bench
from .commands.chat import options as chat
from .commands.console import INTERRUPTED, Console
from .commands.inspect import options as inspect
from .commands.parser import Parser, of_command, suggestion
from .commands.serve import options as serve
from .commands.tune import options as tune
from .errors import St3Error, one_line

_FAILED = 1

# Imported when they run: what they need takes long to load. Each has main(console, arguments) -> exit code.
_MODULES = {
    "ask": "ask",
    "bench": "bench.command",
    "chat": "chat.command",
    "demo": "demo",
    "doctor": "doctor",
    "inspect": "inspect.command",
    "serve": "serve.command",
    "tune": "tune.command",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="st3-edge",
        description="Ask a LLaVA model about pictures, on this machine. Visual tokens that the answer does not need "
        "are dropped on the way (ST3), so that it comes sooner and its KV cache takes less memory.",
        epilog="Begin with: st3-edge demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    demo.add_parser(commands)
    ask.add_parser(commands)
    inspect.add_parser(commands)
    chat.add_parser(commands)
    commands.add_parser("serve", help="llama-server with ST3 on: a web page, and OpenAI's and Anthropic's APIs")
    bench.add_parser(commands)
    tune.add_parser(commands)
    doctor = commands.add_parser(
        "doctor",
        help="tell what is installed and whether it works",
        description="Tells versions, libraries, CPU features and devices, and what is missing. Exit code 1 if "
        "something keeps the package from working.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one run only: what stands behind an option is left over.
    if arguments.command in ("ask", "inspect", "chat") and not any(
        word.startswith("-") and word != "-" for word in rest
    ):
        (arguments.images if arguments.command == "chat" else arguments.inputs).extend(rest)
    elif rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        own = of_command(parser, arguments.command)
        known = [name for action in own._actions for name in action.option_strings]
        own.error(f"unrecognized arguments: {' '.join(rest)}{suggestion(word.partition('=')[0], known)}")
    if arguments.command is None and not arguments.version:
        parser.print_help()
        parser.exit()
    if arguments.command in ("ask", "inspect") and len(arguments.inputs) < 2:
        parser.error(f"{arguments.command} needs at least one picture, and last the question")
    if arguments.command == "ask" and arguments.trace and not arguments.json:
        parser.error("--trace goes with --json")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (an error of ours), 2 (usage), 130 (Ctrl-C)."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["serve"]:  # most of its options are llama-server's
            return _run("serve", Console(), serve.parse(Parser, words[1:]))
        arguments = _parse(words)
        if arguments.version:
            return _version(Console())
        return _run(arguments.command, Console(), arguments)
    except St3Error as e:
        Console().note(f"st3-edge: error: {one_line(e)}")
        return _FAILED
    except BrokenPipeError:  # whoever read our output has left
        return _FAILED
    except KeyboardInterrupt:
        print("st3-edge: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: str, console: Console, arguments: argparse.Namespace | serve.Arguments) -> int:
    module = importlib.import_module(f".commands.{_MODULES[command]}", __package__)
    code: int = module.main(console, arguments)
    return code


def _version(console: Console) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        console.say(f"st3-edge {version('st3-edge')}")
    except PackageNotFoundError:
        console.say("st3-edge (not installed: run from its sources)")
    return 0
