"""What a person types, line by line: with history, completion and several lines in a terminal, plain elsewhere."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FENCE = '"""'


class Plain:
    """Standard input that is no terminal."""

    def __init__(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):  # a name of a file may be in another encoding
            sys.stdin.reconfigure(encoding=_marked_encoding(), errors="surrogateescape")

    def read(self) -> str:
        """The next line; raises EOFError where there is none."""
        line = sys.stdin.readline()  # input() also writes to standard output, even an empty prompt
        if not line:
            raise EOFError
        return line


class Terminal:
    """A line in a terminal. `commands`: what Tab completes behind a slash, some of them with names of files."""

    def __init__(self, commands: Iterable[str], with_files: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
        from prompt_toolkit.document import Document
        from prompt_toolkit.key_binding import KeyBindings

        files = PathCompleter(expanduser=True)
        names, taking = sorted(commands), tuple(f"{name} " for name in with_files)

        class Commands(Completer):
            def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
                text = document.text_before_cursor
                if text.startswith(taking):
                    rest = text.partition(" ")[2]
                    yield from files.get_completions(Document(rest, len(rest)), event)
                elif text.startswith("/") and " " not in text:
                    yield from (Completion(name, -len(text)) for name in names if name.startswith(text))

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        self._session: Any = PromptSession(
            history=_history(),
            completer=Commands(),
            complete_while_typing=False,
            key_bindings=keys,
            enable_history_search=True,
        )

    def read(self) -> str:
        """The next line, or several; raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        return str(self._session.prompt("> ", prompt_continuation="  "))


def source(commands: Iterable[str], with_files: Iterable[str]) -> Plain | Terminal:
    """Where lines come from."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return Terminal(commands, with_files)
    return Plain()


def read(lines: Plain | Terminal) -> str:
    """The next question or command: of several lines, where they stand between two FENCEs, or behind one and the input
    ends that is no terminal."""
    line = lines.read().strip()
    if not line.startswith(FENCE):
        return line
    text = line[len(FENCE) :]
    while FENCE not in text:
        try:
            text += "\n" + lines.read().rstrip("\n")
        except EOFError:
            if not isinstance(lines, Plain):
                raise
            break
    return text.partition(FENCE)[0].strip()


def warm_up() -> None:
    """Imports what a terminal needs: 0.09 s, where readline takes 0.01; for use while a model loads."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import prompt_toolkit  # noqa: F401


def _history() -> Any:
    """Of this and earlier conversations, in a file that nobody else reads; with ST3_NO_HISTORY of this one alone."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Forgiving(FileHistory):
        """Goes on without the file where it cannot be read or written, as on a full disk."""

        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError, UnicodeError):  # the latter of a file's name that is no text
                super().store_string(string)

    if not os.environ.get("ST3_NO_HISTORY"):
        import platformdirs

        with contextlib.suppress(OSError):
            path = Path(platformdirs.user_state_path("st3-edge", appauthor=False)) / "chat-history"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            return Forgiving(str(path))
    return InMemoryHistory()


def _marked_encoding() -> str | None:
    """The encoding of standard input, where its first bytes are a mark of one."""
    head = sys.stdin.buffer.peek(4) if isinstance(sys.stdin.buffer, io.BufferedReader) else b""
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((encoding for mark, encoding in marks.items() if head.startswith(mark)), None)
