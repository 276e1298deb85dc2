"""llama.cpp's and mtmd's log, sent to Python's `logging`; the last errors are kept to be quoted.

The logger is "st3_edge.llama". It is silent unless a program sets it up or a `Llava` is made with verbose=True.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import logging
from typing import Any

from . import _libs
from .errors import one_line

logger = logging.getLogger("st3_edge.llama")
logger.addHandler(logging.NullHandler())
logger.propagate = False

# ggml_log_level; 5 continues the line before.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5

_errors: collections.deque[str] = collections.deque(maxlen=8)


def install() -> None:
    """Takes the log over from the bindings, which print it. Called again it does nothing."""
    _install()


@functools.cache
def _install() -> Any:
    bindings = _libs.load()
    level = logging.INFO

    def receive(native_level: int, text: bytes, _: Any) -> None:
        nonlocal level
        if native_level != _CONTINUE:
            level = _LEVELS.get(native_level, logging.INFO)
        line = one_line((text or b"").decode("utf-8", "replace"))
        if not line:
            return
        if level == logging.ERROR:
            _errors.append(line)
        logger.log(level, "%s", line)

    callback = bindings.lib.llama_log_callback(receive)
    nobody = ctypes.c_void_p(0)
    bindings.lib.llama_log_set(callback, nobody)
    bindings.mtmd.mtmd_log_set(callback, nobody)
    bindings.mtmd.mtmd_helper_log_set(callback, nobody)
    return callback  # kept alive by the cache: C holds its address


def verbose() -> None:
    """Sends the log to standard error, unless a program has sent it somewhere already."""
    if all(isinstance(h, logging.NullHandler) for h in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def forget() -> None:
    """Forgets the errors so far, before something whose errors are to be quoted."""
    _errors.clear()


def why() -> str:
    """The first error since `forget()`, as a clause to put behind a message; "" if there was none."""
    if not _errors:
        return ""
    # "function_name: what went wrong" -> "what went wrong"
    head, colon, rest = _errors[0].partition(": ")
    return f": {rest if colon and ' ' not in head else _errors[0]}"
