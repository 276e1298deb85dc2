"""What `st3-edge chat` does."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ...errors import ContextError, OutputError, St3Error, one_line
from ...llava import Llava
from ...prompts import images
from ...runtime import state
from .. import loading, options
from ..console import Console, run

_HELP = """\
/image FILE   show a picture with the next question
/reset        begin anew
/report       what ST3 did for the last answer
/save FILE    keep the conversation
/load FILE    go on with one that was kept
/quit         leave (Ctrl-D does too; Ctrl-C stops an answer)"""


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Loads the model and talks; returns the exit code."""
    config = options.config(arguments)
    pictures = [images.data_url(picture) for picture in arguments.images]
    with run(console, lambda: loading.load(console, arguments, config)) as llava:
        return Chat(console, llava, pictures, options.answer(arguments)).loop()


class Chat:
    """The messages so far, and what a line does. `pictures`: data URLs, shown with the next question; `options`: of
    every answer, as `options.answer` gives them."""

    def __init__(self, console: Console, llava: Llava, pictures: list[str], options: dict[str, Any]) -> None:
        self._console, self._llava = console, llava
        self._pictures, self._options = pictures, options
        self._messages: list[dict[str, Any]] = []

    def loop(self) -> int:
        """Reads lines and does them until the input ends."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits its line
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        self._console.note("Ask, or /help tells what else there is.")
        if isinstance(sys.stdin, io.TextIOWrapper):  # a name of a file may be in another encoding
            sys.stdin.reconfigure(encoding=_marked_encoding(), errors="surrogateescape")
        interrupted = False
        while True:
            try:
                if interrupted:  # here, where one more is seen as well
                    interrupted = False
                    self._console.note("\n(/quit leaves)")
                line = _line(prompt).strip()
                if line in ("/quit", "/exit"):
                    return 0
                if line:
                    self._do(line)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                interrupted = True
            except OutputError:  # nobody would read the next answer either
                raise
            except St3Error as e:
                self._console.error(one_line(e))

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        # Not Path's, which raises for a name that is no user's, as in a question about "~ 3 cm".
        path = Path(os.path.expanduser(_unquoted(rest.strip()) if command == "/image" else rest.strip()))  # noqa: PTH111
        if not command.startswith("/"):
            self._ask(line)
        elif command == "/image" and rest:
            self._pictures.append(images.data_url(str(path)))
            self._console.note("(shown with the next question)")
        elif command == "/save" and rest:
            state.check_replaceable(path)
            self._llava.save_state(path, self._messages)
            self._console.note(f"(kept in {path})")
        elif command == "/load" and rest:
            messages = self._llava.load_state(path)
            self._messages = messages if isinstance(messages, list) else []
            self._pictures.clear()
            self._console.note(f"({len(self._messages) // 2} questions so far)")
        elif command == "/reset":
            self._llava.reset()
            self._messages = []
            self._pictures.clear()
            self._console.note("(begun anew)")
        elif command == "/report":
            report = self._llava.last_report
            self._console.note(report.summary() if report else "(no answer yet)")
        elif command == "/help":
            self._console.note(_HELP)
        else:
            self._console.note(f"{line!r} is not one of these:\n{_HELP}")

    def _ask(self, text: str) -> None:
        own = len(self._pictures)
        stopped = False
        said: list[str] = []
        while True:
            question = {"role": "user", "content": [*map(_image, self._pictures), {"type": "text", "text": text}]}
            try:
                with self._console.ticking():
                    self._answer([*self._messages, question], said)
                break
            except ContextError:
                if not self._forget(own):
                    raise
            except KeyboardInterrupt:  # what was said before it counts
                stopped = True
                break
        self._console.say()
        if any(said):
            self._messages += [question, {"role": "assistant", "content": "".join(said)}]
            self._pictures.clear()
        report = self._llava.last_report
        if report and not stopped and (note := options.cut(report, self._options, self._llava.n_ctx)):
            self._console.note(note)
            if any(said) and options.is_full(report, self._options):
                self._forget(0)  # or the next answer would be as short

    def _answer(self, messages: list[dict[str, Any]], said: list[str]) -> None:
        for chunk in self._llava.create_chat_completion(messages, stream=True, **self._options):
            said.append(chunk["choices"][0]["delta"].get("content", ""))
            self._console.say(said[-1], end="")

    def _forget(self, own: int) -> bool:
        """Makes room in the context: the older half of the questions goes, less their pictures; where there is none,
        the oldest picture that is not one of the `own` last. False where nothing can go."""
        n = len(self._messages) // 2
        if n:
            gone = -(-n // 2)
            pictures = [part for message in self._messages[: 2 * gone] for part in _images_of(message)]
            del self._messages[: 2 * gone]
            if self._messages:
                first = self._messages[0]
                self._messages[0] = {**first, "content": [*pictures, *_parts_of(first)]}
            else:
                self._pictures[:0] = [part["image"] for part in pictures]
            what = "the oldest question is" if gone == 1 else f"the {gone} oldest questions are"
            more = "forgotten, and their pictures kept" if pictures else "forgotten"
        elif len(self._pictures) > own:
            del self._pictures[0]
            what, more = "the oldest picture is", "forgotten"
        else:
            return False
        self._console.note(f"(the context of {self._llava.n_ctx} tokens is full: {what} {more}; /reset begins anew)")
        return True


def _image(source: str) -> dict[str, Any]:
    return {"type": "image", "image": source}


def _parts_of(message: dict[str, Any]) -> list[Any]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _images_of(message: dict[str, Any]) -> list[Any]:
    return [part for part in _parts_of(message) if part["type"] == "image"]


def _unquoted(path: str) -> str:
    """The name of a file as a terminal writes it that a person drops it on: in quotes, or with backslashes."""
    try:
        if Path(path).exists():
            return path
        words = shlex.split(path)
    except (OSError, ValueError):
        return path
    return words[0] if len(words) == 1 else path


def _marked_encoding() -> str | None:
    """The encoding of standard input, where its first bytes are a mark of one."""
    if sys.stdin.isatty():
        return None
    head = sys.stdin.buffer.peek(4) if isinstance(sys.stdin.buffer, io.BufferedReader) else b""
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((encoding for mark, encoding in marks.items() if head.startswith(mark)), None)


def _line(prompt: str) -> str:
    """The next line; raises EOFError where there is none."""
    if prompt:
        return input(prompt)
    line = sys.stdin.readline()  # input() also writes to standard output, even an empty prompt
    if not line:
        raise EOFError
    return line
