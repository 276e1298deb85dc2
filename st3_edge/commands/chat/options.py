"""The options of `st3-edge chat`."""

from __future__ import annotations

import argparse

from ...config import REVISIT
from .. import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.usage = "st3-edge chat [IMAGE...] [options]"
    parser.description = (
        "A conversation in the terminal, offline. What was read before is kept: a second question about a picture "
        "comes back sooner. Ctrl-C stops an answer, Ctrl-D leaves."
    )
    parser.epilog = "In the chat, drop or paste pictures, and /help lists the commands."
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files to begin with")
    answer = options.add_shared(parser)
    answer.add_argument("--load", metavar="FILE", help="go on with a conversation that /save kept")
    answer.add_argument(
        "--revisit",
        choices=REVISIT,
        default=REVISIT[0],
        help="turn: each question looks at all of the pictures again; never: at what the first one left of them, which "
        f"is sooner (default {REVISIT[0]})",
    )
