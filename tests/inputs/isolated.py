"""Runs a function in forked children, so that a crash of native code, or a hang, is told and not suffered."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any


class Failed(AssertionError):
    """An input that crashed the process, hung it, or failed in it."""


def _child(function: Callable[[Any], Any], items: Sequence[Any], out: int) -> None:
    with os.fdopen(out, "wb") as pipe:
        for item in items:
            try:
                answer = True, function(item)
            except BaseException:
                answer = False, traceback.format_exc(limit=-4)
            pickle.dump(answer, pipe)
            pipe.flush()
            if not answer[0]:
                break


def each(function: Callable[[Any], Any], items: Sequence[Any], seconds: float) -> list[Any]:
    """function(item) of each, all in one child. `seconds`: for one item. Raises Failed, with the item."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)  # what upstream prints before it aborts
        os.environ["GGML_NO_BACKTRACE"] = "1"  # or each abort starts a debugger
        try:
            _child(function, items, write)
        finally:
            os._exit(0)
    os.close(write)
    answers: list[Any] = []
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while len(answers) < len(items):
            if not select.select([pipe], [], [], seconds)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Failed(f"no answer after {seconds} s: {items[len(answers)]!r:.3000}")
            try:
                good, answer = pickle.load(pipe)
            except EOFError:
                break
            if not good:
                os.waitpid(pid, 0)
                raise Failed(f"{answer}\n{items[len(answers)]!r:.3000}")
            answers.append(answer)
    _, status = os.waitpid(pid, 0)
    if len(answers) < len(items):
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
        raise Failed(f"{how}: {items[len(answers)]!r:.3000}")
    return answers


def until(end: float) -> bool:
    """Whether there is time left."""
    return time.perf_counter() < end
