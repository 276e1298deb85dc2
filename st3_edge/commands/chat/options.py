"""The options of `st3-edge chat`."""

from __future__ import annotations

from typing import Any

from ...config import REVISIT
from .. import options


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "chat",
        help="talk about pictures, question after question",
        description="A conversation in the terminal, offline. What was read before is kept: a second question about a "
        "picture comes back sooner. Ctrl-C stops an answer, Ctrl-D leaves.",
        epilog="In the chat: /image FILE shows a picture with the next question, /reset begins anew, /report tells "
        "what ST3 did, /save FILE and /load FILE keep and fetch a conversation, /quit leaves.",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files to begin with")
    options.add_shared(parser).add_argument(
        "--revisit",
        choices=REVISIT,
        default=REVISIT[0],
        help="turn: each question looks at all of the pictures again; never: at what the first one left of them, which "
        f"is sooner (default {REVISIT[0]})",
    )
