"""How the command line reads its words, and what it says of those that it does not know."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import one_line

_USAGE = 2


class _Formatter(argparse.HelpFormatter):
    """Shows an option's value once, where argparse repeats it behind each of its names."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = sorted(action.option_strings, key=lambda name: (name.startswith("--"), len(name)))
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class Parser(argparse.ArgumentParser):
    """Errors are one line, with a suggestion where a word is close to one that there is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage before it."""
        self.exit(_USAGE, f"st3-edge: error: {one_line(message)} ({self.prog} -h shows how)\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Suggests a choice where argparse lists them all."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = suggestion(str(value), choices) or f", choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}{hint}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" where one of the known words is close; else ""."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def of_command(parser: argparse.ArgumentParser, command: str | None) -> argparse.ArgumentParser:
    """The command's own parser; without a command the program's."""
    for action in parser._actions:
        if command and isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser = action.choices[command]
            return found
    return parser
