"""llama.cpp's and mtmd's log, sent to Python's `logging`; the first error of a call is kept to be quoted.

llama.cpp has one log callback a process. Ours sorts lines by the thread that they come from: those of a `Llava` go to
the logger "st3_edge.llama", which is silent unless a program sets it up, and with verbose=True to standard error; all
others go where they went before.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from typing import Any

from ..errors import one_line
from . import libraries

logger = logging.getLogger("st3_edge.llama")
logger.addHandler(logging.NullHandler())
logger.propagate = False

# ggml_log_level; 5 continues the line before.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5

_thread = threading.local()  # log: the Log of this thread
_lock = threading.Lock()


class Log:
    """The lines of one thread or several. verbose: to standard error as well."""

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._level = logging.INFO
        self._error = ""  # the first one since `forget`

    def receive(self, native_level: int, text: bytes | None) -> None:
        if native_level != _CONTINUE:
            self._level = _LEVELS.get(native_level, logging.INFO)
        line = one_line((text or b"").decode("utf-8", "replace"))
        if not line:
            return
        if self._level == logging.ERROR:
            self._error = self._error or line
        logger.log(self._level, "%s", line)
        if self._verbose and self._level >= logging.INFO and sys.stderr is not None:
            print(line, file=sys.stderr)

    def forget(self) -> None:
        """Forgets the errors so far, before something whose errors are to be quoted."""
        self._error = ""

    def why(self) -> str:
        """The first error since `forget()`, as a clause to put behind a message; "" if there was none."""
        if not self._error:
            return ""
        # "function_name: what went wrong" -> "what went wrong"
        head, colon, rest = self._error.partition(": ")
        return f": {rest if colon and ' ' not in head else self._error}"


def route(log: Log) -> None:
    """Sends the lines of this thread to `log` from now on."""
    _thread.log = log
    _install()


def forget() -> None:
    """`Log.forget` of this thread's log."""
    _here().forget()


def why() -> str:
    """`Log.why` of this thread's log."""
    return _here().why()


def _here() -> Log:
    if not hasattr(_thread, "log"):
        route(Log())
    log: Log = _thread.log
    return log


class _Callback:
    """Ours, and the one before it. C holds its address for as long as the process lives."""

    def __init__(self, bindings: libraries.Bindings) -> None:
        self._kind = bindings.lib.llama_log_callback
        self.native = self._kind(self._receive)
        self.before = self.current(bindings)

    def current(self, bindings: libraries.Bindings) -> tuple[Any, ctypes.c_void_p]:
        callback, data = self._kind(), ctypes.c_void_p()
        bindings.lib.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        return callback, data

    def _receive(self, level: int, text: bytes | None, _: Any) -> None:
        log: Log | None = getattr(_thread, "log", None)
        if log is not None:
            log.receive(level, text)
            return
        callback, data = self.before
        if callback:
            callback(level, text, data)


_callback: _Callback | None = None


def is_ours() -> bool:
    """Whether lines have come here since the first `route`: before it mtmd's go to standard error."""
    return _callback is not None


def _install() -> None:
    """Puts our callback before whichever is set now, unless that is ours."""
    global _callback
    bindings = libraries.load()
    with _lock:
        if _callback is None:
            _callback = _Callback(bindings)
        now = _callback.current(bindings)
        if _address(now[0]) == _address(_callback.native):
            return
        _callback.before = now
        nobody = ctypes.c_void_p(0)
        bindings.lib.llama_log_set(_callback.native, nobody)
        bindings.mtmd.mtmd_log_set(_callback.native, nobody)
        bindings.mtmd.mtmd_helper_log_set(_callback.native, nobody)


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value
