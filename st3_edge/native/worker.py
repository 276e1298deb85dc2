"""A thread that does the native work of one `Llava`, call after call.

Python raises KeyboardInterrupt, or whatever a program's signal handler raises, in the main thread, wherever that is:
also where a pointer that C returned is not stored yet, or in a callback, whose exceptions ctypes drops. So the work is
done beside it, where nothing breaks it in the middle. The caller waits here; an exception that reaches it ends the work
where llama.cpp can stop without harm, and is then raised.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import St3Error

T = TypeVar("T")

_CLOSED = "this Llava is closed"
_TICK_S = 0.1  # a signal that another thread of the process receives does not wake the one that waits

_workers: set[Worker] = set()  # whose threads run


class _Job:
    """news: what the waiting thread is to call; None: the work has ended. last: the thread then ends."""

    def __init__(self, work: Callable[[], Any], last: bool = False) -> None:
        self.work: Callable[[], Any] | None = work
        self.last = last
        self.dropped = self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()


class Worker:
    """The thread of `owner`; it ends when that is gone, or by `close`.

    stop        a flag for native callbacks (st3_stop_* of st3.h), set while the work under way is no longer wanted
    resources   freed in the thread, when it ends

    Waits for workers whose owners are gone: two large models may not fit. Raises St3Error in a process that was forked
    while a worker was busy, as locks that it had are never released there.
    """

    def __init__(self, owner: object) -> None:
        self._pid = os.getpid()
        for other in list(_workers):
            if other._pid == self._pid and other._owner() is None:
                other.close()
                _wait(other._end)
            elif other._pid != self._pid and other._current:
                raise St3Error(
                    "this process was forked while a Llava was at work, so it cannot load one of its own: start "
                    "processes with multiprocessing's 'spawn'"
                )
        self.stop = ctypes.c_bool(False)
        self.resources = contextlib.ExitStack()
        self._jobs: queue.SimpleQueue[_Job | weakref.ref[Any]] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may come in while this thread has it
        self._current: _Job | None = None
        self._open = True
        self._end: _Job = _Job(self.resources.close, last=True)
        # What native objects belong to. The callback runs no Python code: Python drops exceptions of one that does.
        self._kept: dict[weakref.ref[Any], Any] = {}
        self._owner: weakref.ref[Any] = weakref.ref(owner, self._jobs.put)
        # A daemon: Python waits for other threads before it closes what a program left open.
        self._thread = threading.Thread(target=self._serve, name="st3-edge", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._open

    def run(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Does `work` after that of the calls before, and returns its result or raises its exception. When an exception
        reaches the waiting thread, the work ends early, or never begins, and that exception is raised.

        Raises St3Error after `close`, and in a process that was forked from the worker's.
        """
        if os.getpid() != self._pid:
            raise St3Error(
                "this Llava was loaded before the process was forked, and works in the process that loaded it: load "
                "another one here, or start processes with multiprocessing's 'spawn'"
            )
        job = _Job(functools.partial(work, *args, **options))
        error: BaseException | None = None
        queued = False
        while True:
            try:
                if not queued:
                    queued = True
                    self._put(job)
                _wait(job, call_back=error is None)
                break
            except BaseException as e:
                error = error or e
                if not self._drop(job):
                    break
        try:
            if error or job.error:
                raise error or job.error  # type: ignore[misc]
            result: T = job.result
            return result
        finally:
            del error, job  # they make a cycle with the traceback

    def call_back(self, function: Callable[[], None]) -> None:
        """Lets the thread that waits for the work under way call `function`; for use by that work."""
        if self._current is not None:
            self._current.news.put(function)

    def check(self) -> None:
        """Raises St3Error where the work under way is no longer wanted; for use by that work."""
        if self.stop.value:
            raise St3Error("interrupted")

    def keep(self, owner: object, what: Any) -> None:
        """Keeps `what` for as long as `owner` lives, and lets go of it in the thread; for use by work."""
        self._kept[weakref.ref(owner, self._jobs.put)] = what

    def kept(self, owner: object) -> Any:
        """What was kept for `owner`; for use by work."""
        return self._kept[weakref.ref(owner)]

    def close(self) -> None:
        """Ends the work under way, frees `resources` and ends the thread. Called again, or in a process that was forked
        from the worker's, it does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._open:
                return
            self._jobs.put(self._end)
            self._open = False
            self.stop.value = True
        if threading.current_thread() is not self._thread:  # Python's collector runs anywhere
            _wait(self._end)
            if self._end.error:
                raise self._end.error

    def _put(self, job: _Job) -> None:
        with self._lock:
            if not self._open:
                raise St3Error(_CLOSED)
            self._jobs.put(job)

    def _drop(self, job: _Job) -> bool:
        """Ends a job that nobody wants. False if it is not under way, so that there is nothing to wait for."""
        with self._lock:
            job.dropped = True
            under_way = self._current is job
            if under_way:
                self.stop.value = True
            return under_way

    def _serve(self) -> None:
        _workers.add(self)
        while not self._end.ended:
            job = self._jobs.get()
            if isinstance(job, _Job):
                self._do(job)
            elif job is self._owner:
                self._jobs.put(self._end)
            else:
                del self._kept[job]
            del job
        _workers.discard(self)

    def _do(self, job: _Job) -> None:
        with self._lock:
            if job.dropped:
                return
            self._current, self.stop.value = job, False
            self._open = self._open and not job.last
        try:
            if not self._open and not job.last:
                raise St3Error(_CLOSED)
            assert job.work is not None
            job.result = job.work()
        except BaseException as e:
            # Of work that `close` ended, the error says what broke and not why.
            job.error = e if self._open or job.last else St3Error(_CLOSED)
        with self._lock:
            self._current = None
        job.work = None  # it may have the last reference to its Llava
        job.ended = True
        job.news.put(None)


def _wait(job: _Job, call_back: bool = True) -> None:
    while not (job.ended and job.news.empty()):
        with contextlib.suppress(queue.Empty):
            news = job.news.get(timeout=_TICK_S)
            if news and call_back:
                news()


@atexit.register
def _close_all() -> None:
    """Frees what a program left open, while there is a Python whose log can be written to."""
    for worker in list(_workers):
        worker.close()
