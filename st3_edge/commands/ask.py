"""`st3-edge ask`: one question."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from .console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.usage = "st3-edge ask IMAGE... QUESTION [options]"
    parser.description = (
        "Asks a question about one picture or several. The answer goes to standard output, word by word; all else to "
        "standard error."
    )
    parser.epilog = "Example: st3-edge ask photo.jpg 'What is on the table?' -m llava.gguf"
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE... QUESTION",
        help="picture files (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC), - for standard input, or data: URLs, "
        "and last the question",
    )
    answer = options.add_shared(parser)
    answer.add_argument("--json", action="store_true", help="print one JSON object with the answer and what ST3 did")
    answer.add_argument(
        "--trace",
        action="store_true",
        help="with --json: also prompt tokens, first logits, the visual tokens kept, and when they left",
    )


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Asks and prints; returns the exit code."""
    from .console import run

    return run(console, lambda: _ask(console, arguments))


def _ask(console: Console, arguments: argparse.Namespace) -> int:
    from ..prompts import images
    from . import loading, which

    *pictures, question = arguments.inputs
    config = options.config(arguments)

    started = time.perf_counter()
    # Check pictures before the slow model load.
    content = [{"type": "image", "image": images.load_argument(picture)} for picture in pictures]
    messages = [*options.system(arguments), {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    read_ms = 1e3 * (time.perf_counter() - started)
    found = which.find(console, arguments)
    with loading.load(console, arguments, config, found) as llava:
        found.say(console)
        if note := options.idle(arguments):
            console.note(note)
        chunks: Any = llava.create_chat_completion(
            messages,
            stream=True,
            trace=arguments.trace,
            **options.answer(arguments),
        )
        for chunk in chunks:
            piece = chunk["choices"][0]["delta"].get("content", "")
            if piece and not arguments.json:
                console.say(piece, end="")
        report = llava.last_report
        assert report is not None
        report.ms.first_token += read_ms
    if arguments.json:
        console.say(json.dumps(report.to_dict()))
        return 0
    console.say()
    if note := options.cut(report, options.answer(arguments), llava.n_ctx):
        console.note(note)
    console.note(report.summary())
    return 0
