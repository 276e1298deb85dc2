"""The options of `st3-edge inspect`."""

from __future__ import annotations

import argparse

from .. import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.usage = "st3-edge inspect IMAGE... QUESTION [options]"
    parser.description = (
        "Asks a question as `ask` does, and draws which patches of the pictures the model's layers still held: after "
        "each cut, and at each token of the answer. Writes a PNG picture and an HTML page, which needs no network and "
        "no other file."
    )
    parser.epilog = "Example: st3-edge inspect photo.jpg 'What is on the table?' -o table"
    parser.add_argument("inputs", nargs="*", metavar="IMAGE... QUESTION", help="as for st3-edge ask")
    files = parser.add_argument_group("files to write")
    files.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="OUT.png and OUT.html, or only the one that it ends in; of a folder, or by default in the current one: "
        "the first picture's name and -st3",
    )
    files.add_argument("--force", action="store_true", help="replace files of these names")
    options.add_shared(parser)
