"""The command line's side of a terminal: what goes where, progress, and a way out that Ctrl-C always finds."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO, TypeVar

from ..errors import OutputError, one_line

_TICK_S = 0.2
_SHOW_AFTER_S = 1.0
_BAR_WIDTH = 20
_LEAST_COLUMNS = 10
INTERRUPTED = 130

T = TypeVar("T")


def _own(stream: TextIO | None, descriptor: int) -> TextIO:
    """A stream of our own to a standard descriptor, where a character that it has not becomes "?"."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return os.fdopen(os.dup(descriptor), "w", encoding=encoding, errors="replace")
    except OSError:  # closed by whoever started us
        return open(os.devnull, "w", encoding=encoding)  # noqa: PTH123


_STYLES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32"}


def paint(stream: TextIO, text: str, style: str) -> str:
    """`text` in a style of _STYLES, where the stream is a terminal and nobody asked for plain text (no-color.org)."""
    if not text or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def amount(n_bytes: float) -> str:
    """Bytes for a person."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


class Console:
    """`out` carries results, `err` all else: where `err` cannot be written, nothing is said. Safe to use from the
    working thread and the main one."""

    def __init__(self) -> None:
        self.out, self.err = _own(sys.stdout, 1), _own(sys.stderr, 2)
        self._stage: tuple[str, float] | None = None
        self._first: float | None = None  # the share that was done when it was first known
        self._share: float | None = None
        self._detail = ""
        self._shown = False
        self._lock = threading.Lock()

    @property
    def bar(self) -> str:
        """What bars are drawn with."""
        return "█" if "utf" in self.out.encoding.lower() else "#"

    @property
    def shades(self) -> str:
        """Five characters for a map on `err`, from nothing to the brightest."""
        return " ░▒▓█" if "utf" in self.err.encoding.lower() else " .-+#"

    def say(self, text: str = "", end: str = "\n") -> None:
        """Writes to standard output, at once. Raises OutputError, or BrokenPipeError where its reader has left."""
        with self._lock:
            self._clear()
            try:
                self.out.write(text + end)
                self.out.flush()
            except BrokenPipeError:
                raise
            except OSError as e:
                raise OutputError(f"standard output cannot be written: {one_line(e.strerror or e)}") from e

    def note(self, text: str, end: str = "\n") -> None:
        """Writes to standard error, at once, and in a terminal so that it stands back behind answers."""
        with self._lock:
            self._clear()
            self._tell(paint(self.err, self._fitted(text), "dim") + end)

    def error(self, text: str) -> None:
        """Writes the one line of an error to standard error."""
        with self._lock:
            self._clear()
            head, text = "st3-edge: error:", self._fitted(f"st3-edge: error: {text}")
            self._tell(f"{paint(self.err, head, 'red')}{text.removeprefix(head)}\n")

    def strong(self, text: str) -> str:
        """Text for standard output, emphasized where that is a terminal."""
        return paint(self.out, text, "bold")

    def stage(self, name: str | None, share: float | None = None, detail: str = "") -> None:
        """What is being waited for from now on; None: nothing. It is shown where the wait is longer than a second, with
        a bar and the seconds that remain where the share of it that is done, 0 to 1, is known."""
        with self._lock:
            if self._stage is None or self._stage[0] != name:
                self._clear()
                self._stage = None if name is None else (name, time.monotonic())
                self._first = share
            self._share, self._detail = share, detail

    def tick(self) -> None:
        """Called now and then: shows the wait."""
        with self._lock:
            if self._stage is None:
                return
            name, since = self._stage
            waited = time.monotonic() - since
            if waited < _SHOW_AFTER_S:
                return
            if self.err.isatty():
                self._tell(f"\r\x1b[K{self._line(name, waited)}")
            elif not self._shown:
                self._tell(f"{name} ...\n")
            self._shown = True

    def _line(self, name: str, waited: float) -> str:
        words = [name]
        remains = ""
        if self._share is not None:
            words.append(f"{self.bar * round(_BAR_WIDTH * self._share):.<{_BAR_WIDTH}}")
            done = self._share - (self._first or 0.0)
            remains = f", {waited * (1 - self._share) / done:.0f} s left" if done > 0 else ""
        words += [self._detail] if self._detail else []
        text = f"{' '.join(words)} ... {waited:.0f} s{remains}"
        return text[: self.width()]  # a longer one would stay on the screen

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """While what is inside runs, in the main thread, so that Ctrl-C ends it."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(_TICK_S):
                self.tick()

        threading.Thread(target=tick, daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self.stage(None)

    def _fitted(self, text: str) -> str:
        """Broken between words at a terminal's edge."""
        if not self.err.isatty():
            return text
        width = self.width()
        fill = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False).fill
        return "\n".join(fill(line) if len(line) > width else line for line in text.split("\n"))

    def width(self) -> int:
        """Columns that a line on `err` may take."""
        try:
            columns = os.get_terminal_size(self.err.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return max(columns or shutil.get_terminal_size().columns, _LEAST_COLUMNS) - 1

    def _clear(self) -> None:
        if self._shown and self.err.isatty():
            self._tell("\r\x1b[K")
        self._shown = False

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.err.write(text)
            self.err.flush()


def run(console: Console, work: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
    """Runs `work` in a thread and returns its result; its exceptions are raised here.

    While native code computes, Python's main thread would not see Ctrl-C: so the computing is done beside it. On
    Ctrl-C the process ends at once, with exit code 130; with `stop` the first one calls it, for `work` to end soon.
    """
    result: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

    def target() -> None:
        try:
            result.put(work())
        except BaseException as e:
            result.put(e)

    thread = threading.Thread(target=target, daemon=True)
    begun = False
    while True:
        try:
            if not begun:
                begun = True  # before it: Ctrl-C can come while start() waits for the thread
                thread.start()
            try:
                outcome = result.get(timeout=_TICK_S)
                break
            except queue.Empty:
                console.tick()
        except KeyboardInterrupt:
            if stop is None:
                console.note("\nst3-edge: interrupted")
                # No clean-up: the working thread may be inside native code, which cannot be stopped.
                os._exit(INTERRUPTED)
            stop()
            stop = None
    console.stage(None)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
