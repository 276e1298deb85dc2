"""The command line of `st3-edge tune`."""

from __future__ import annotations

import argparse

from .. import options

# About what Q4_K_M costs against F16 by the same measure: 0.031 for LLaMA 3 8B, 0.013 for LLaMA 2 7B
# (llama.cpp, tools/perplexity/README.md).
MAX_KL = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.usage = "st3-edge tune FOLDER [options]"
    parser.description = (
        "Asks the model about the pictures of a folder, without pruning and then under schedule after "
        "schedule, and finds the cheapest one whose next words stay within --max-kl of the full model's. That takes "
        "long, as each schedule reads the prompts again. Ctrl-C loses nothing: the same command goes on where it was."
    )
    parser.epilog = "Example: st3-edge tune photos -m llava.gguf --output tuned.gguf"
    parser.add_argument("folder", metavar="FOLDER", help="where the pictures are")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--questions",
        metavar="FILE",
        help="one question a line, asked of every picture, or PICTURE<TAB>QUESTION (default: a few general ones)",
    )
    group.add_argument(
        "--max-kl",
        type=float,
        default=MAX_KL,
        metavar="K",
        help=f"mean KL divergence from the full model, in nats a token, at most (default {MAX_KL})",
    )
    group.add_argument(
        "--prompts",
        type=options.whole(1, 10_000),
        default=24,
        metavar="N",
        help="pairs of picture and question, at most (default 24)",
    )
    group.add_argument(
        "--tokens", type=options.whole(1, 1024), default=32, metavar="N", help="of each answer, at most (default 32)"
    )
    group.add_argument("--output", metavar="NEW.gguf", help="write the model with the schedule found as a new file")
    group.add_argument("--force", action="store_true", help="replace an output file that exists")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--work", metavar="DIR", help="where measurements are kept (default: st3-edge/tune in the user's cache)"
    )
    options.add_context(options.add_model(parser))
    options.add_schedule(parser, without=("budget", "keep"))
