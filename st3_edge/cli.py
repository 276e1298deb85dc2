"""The command line: `st3-edge demo`, `ask`, `inspect`, `chat`, `serve`, `bench`, `tune` and `doctor`."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import _options
from ._console import INTERRUPTED, Console, run
from .bench import options as bench_options
from .config import ST3Config
from .conversation import REVISIT
from .errors import St3Error, one_line
from .inspect import options as inspect_options
from .serve import options as serve_options
from .tune import options as tune_options

if TYPE_CHECKING:
    from .llava import Llava

_FAILED = 1
_USAGE = 2

_STAGES = {"encode": "looking at the picture", "prefill": "reading the prompt", "decode": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage before it."""
        self.exit(_USAGE, f"st3-edge: error: {one_line(message)} ({self.prog} -h shows how)\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Suggests a choice where argparse lists them all."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = _suggestion(str(value), choices) or f", choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}{hint}")


def _suggestion(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" where one of the known words is close; else ""."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="st3-edge",
        description="Ask a LLaVA model about pictures, on this machine. Visual tokens that the answer does not need "
        "are dropped on the way (ST3), so that it comes sooner and its KV cache takes less memory.",
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
        help="picture files (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC), - for standard input, or data: URLs, "
        "and last the question",
    )
    answer = _shared_options(ask)
    answer.add_argument("--json", action="store_true", help="print one JSON object with the answer and what ST3 did")
    answer.add_argument(
        "--trace",
        action="store_true",
        help="with --json: also prompt tokens, first logits, the visual tokens kept, and when they left",
    )

    inspect_options.add_parser(commands, _shared_options)

    chat = commands.add_parser(
        "chat",
        help="talk about pictures, question after question",
        description="A conversation in the terminal, offline. What was read before is kept: a second question about a "
        "picture comes back sooner. Ctrl-C stops an answer, Ctrl-D leaves.",
        epilog="In the chat: /image FILE shows a picture with the next question, /reset begins anew, /report tells "
        "what ST3 did, /save FILE and /load FILE keep and fetch a conversation, /quit leaves.",
    )
    chat.add_argument("images", nargs="*", metavar="IMAGE", help="picture files to begin with")
    _shared_options(chat).add_argument(
        "--revisit",
        choices=REVISIT,
        default=REVISIT[0],
        help="turn: each question looks at all of the pictures again; never: at what the first one left of them, which "
        f"is sooner (default {REVISIT[0]})",
    )

    commands.add_parser("serve", help="llama-server with ST3 on: a web page, and OpenAI's and Anthropic's APIs")
    bench_options.add_parser(commands)
    tune_options.add_parser(commands)

    doctor = commands.add_parser(
        "doctor",
        help="tell what is installed and whether it works",
        description="Tells versions, libraries, CPU features and devices, and what is missing. Exit code 1 if "
        "something keeps the package from working.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _shared_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What every command that loads a model takes; returns the group of the answer's options."""
    _options.add_context(_options.add_model(parser))
    _options.add_schedule(parser)
    return _options.add_answer(parser)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one run only: what stands behind an option is left over.
    if arguments.command in ("ask", "inspect", "chat") and not any(
        word.startswith("-") and word != "-" for word in rest
    ):
        (arguments.images if arguments.command == "chat" else arguments.inputs).extend(rest)
    elif rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        of_command = _parser_of(parser, arguments.command)
        known = [name for action in of_command._actions for name in action.option_strings]
        of_command.error(f"unrecognized arguments: {' '.join(rest)}{_suggestion(word.partition('=')[0], known)}")
    if arguments.command is None and not arguments.version:
        parser.print_help()
        parser.exit()
    if arguments.command in ("ask", "inspect") and len(arguments.inputs) < 2:
        parser.error(f"{arguments.command} needs at least one picture, and last the question")
    if arguments.command == "ask" and arguments.trace and not arguments.json:
        parser.error("--trace goes with --json")
    return arguments


def _parser_of(parser: argparse.ArgumentParser, command: str | None) -> argparse.ArgumentParser:
    """The command's own parser; without a command the program's."""
    for action in parser._actions:
        if command and isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser = action.choices[command]
            return found
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (an error of ours), 2 (usage), 130 (Ctrl-C)."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["serve"]:  # most of its options are llama-server's
            return _serve(words[1:])
        arguments = _parse(words)
        console = Console()
        if arguments.version:
            return _version(console)
        command = {
            "demo": _demo,
            "ask": _ask,
            "inspect": _inspect,
            "chat": _chat,
            "bench": _bench,
            "tune": _tune,
            "doctor": _doctor,
        }[arguments.command]
        if command in (_chat, _bench, _tune):  # Ctrl-C means something else there
            return command(console, arguments)
        return run(console, lambda: command(console, arguments))
    except St3Error as e:
        Console().note(f"st3-edge: error: {one_line(e)}")
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


def _bench(console: Console, arguments: argparse.Namespace) -> int:
    from .bench import command

    return command.main(console, arguments)


def _serve(words: Sequence[str]) -> int:
    from .serve import command

    command.main(Console(), serve_options.parse(_Parser, words))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    from . import _doctor

    found = _doctor.examine()
    console.say(json.dumps(found, indent=2) if arguments.json else _doctor.describe(found))
    return _FAILED if found["problems"] else 0


def _ask(console: Console, arguments: argparse.Namespace) -> int:
    from . import images

    *pictures, question = arguments.inputs
    config = _options.config(arguments)

    # Before the model: loading a large one takes long, and a bad picture would be told of only then.
    content = [{"type": "image", "image": images.load_argument(picture)} for picture in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    with _load(console, arguments, config) as llava:
        chunks: Any = llava.create_chat_completion(
            messages,
            stream=True,
            trace=arguments.trace,
            **_options.answer(arguments),
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
    if note := _options.cut(report, _options.answer(arguments), llava.n_ctx):
        console.note(note)
    console.note(report.summary())
    _tell_which(console, arguments)
    return 0


def _tune(console: Console, arguments: argparse.Namespace) -> int:
    from .tune import command

    return command.main(console, arguments)


def _inspect(console: Console, arguments: argparse.Namespace) -> int:
    from .inspect import command

    config = _options.config(arguments)
    code = command.main(console, arguments, lambda: _load(console, arguments, config))
    _tell_which(console, arguments)
    return code


def _chat(console: Console, arguments: argparse.Namespace) -> int:
    from . import _chat, images

    config = _options.config(arguments)
    pictures = [images.data_url(picture) for picture in arguments.images]
    with run(console, lambda: _load(console, arguments, config)) as llava:
        _tell_which(console, arguments)
        return _chat.Chat(console, llava, pictures, _options.answer(arguments)).loop()


def _load(console: Console, arguments: argparse.Namespace, config: ST3Config) -> Llava:
    from . import demo
    from .llava import Llava

    console.stage("loading the model")
    model, mmproj = (arguments.model, arguments.mmproj) if arguments.model else demo.model_paths()
    llava = Llava(
        model,
        mmproj,
        config,
        n_ctx=arguments.n_ctx,
        n_ubatch=arguments.n_ubatch,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.n_gpu_layers,
        on_stage=lambda stage: console.stage(_STAGES[stage]),
        revisit=getattr(arguments, "revisit", REVISIT[0]),
    )
    console.stage(None)
    return llava


def _tell_which(console: Console, arguments: argparse.Namespace) -> None:
    if not arguments.model:
        console.note("(no --model: the small demo model answers, which knows drawn shapes only)")
