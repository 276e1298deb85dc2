"""The two sides of a comparison, each a worker process, and the order in which they take turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ...errors import LibraryError, St3Error, one_line
from .worker import Job

Raw = dict[str, Any]

BLOCK = 16  # tokens that a side decodes before the other has its turn


class Stopped(Exception):
    """`Side.stop` was called."""


class Side:
    """A worker that is started when it is needed, with `environment` beside the process's own. `setup`: Worker.setup;
    `first`: what `begin` told of the first request of each process; `report`: st3_report's object at the end of an
    answer, and `live`: the KV bytes in use after each of its tokens (ST³'s side)."""

    def __init__(
        self, name: str, job: Job, environment: Mapping[str, str] | None = None, new_session: bool = True
    ) -> None:
        self.name, self._job = name, job
        self._environment, self._new_session = {**os.environ, **(environment or {})}, new_session
        self._label = "ST3" if job.st3 else "stock" if job.stock else "pruning off"
        self.setup: dict[str, Any] = {}
        self.first: list[dict[str, float]] = []
        self.report: dict[str, Any] = {}
        self.live: list[int] = []
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._stopped = threading.Event()

    def open(self) -> None:
        """Loads the model and does its work once, which is measured apart. Raises St3Error, or Stopped."""
        if self._process:
            return
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the worker
        # Not by -m, which looks in the current folder first: in a checkout that is the sources, whatever is installed.
        start = "import sys; sys.path.insert(0, sys.argv[1]); from st3_edge.commands.bench import worker; worker.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, str(Path(__file__).resolve().parents[3])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
            start_new_session=self._new_session,  # a terminal's Ctrl-C is for the parent alone
        )
        self.setup = self._ask(asdict(self._job))
        self.first.append(self.call("begin"))
        if self._job.st3 and not self.live:
            self.live = self.call("decode", n=self._job.generate, watch=True)["live"]
            self.report = self.call("end")["report"]
        else:
            self.call("decode", n=1)

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A method of the worker. Raises St3Error, or Stopped."""
        return self._ask({"call": name, **arguments})

    def close(self) -> None:
        """Ends the worker."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()
        if self._errors:
            self._errors.close()
            self._errors = None

    def stop(self) -> None:
        """Ends the worker in the middle of its work; from any thread."""
        self._stopped.set()
        if process := self._process:
            process.kill()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process and self._process.stdin and self._process.stdout
        if self._stopped.is_set():
            raise Stopped
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if self._stopped.is_set():
            raise Stopped
        if not line:
            raise St3Error(f"the side of {self._label} ended by itself{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise St3Error(f"the side of {self._label}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        assert self._process and self._errors
        code = self._process.wait()
        if sys.platform != "win32" and code == -signal.SIGKILL:
            return ": it was killed, as systems do where memory runs out"
        self._errors.seek(0)
        lines = [line for line in self._errors if line.strip()]
        return f" (exit code {code})" + (f": {one_line(lines[-1])}" if lines else "")


def measure(
    groups: Sequence[Sequence[Side]], pairs: int, generate: int, reload: bool, tell: Callable[[str, float], None]
) -> Iterator[dict[str, Raw]]:
    """Pairs of runs, by the sides' names. The sides of a group are in memory together and take turns: a request up to
    its first token, then BLOCK tokens of the answer at a time. With `reload`, models are loaded anew for every pair.

    Raises St3Error's kinds, or Stopped.
    """
    blocks = [min(BLOCK, generate - at) for at in range(0, generate, BLOCK)]
    turns = pairs * sum(len(group) for group in groups) * (1 + len(blocks))
    done = 0
    for pair in range(1, pairs + 1):
        raw: dict[str, Raw] = {}
        for group in groups:
            for side in group:
                tell(f"loading and warming up {side.name}", done / turns)
                side.open()
            _check_alike([side for group in groups for side in group if side.setup])
            for n in (0, *blocks):
                for side in group:
                    tell(f"pair {pair} of {pairs}", done / turns)
                    if n:
                        raw[side.name]["steps_ms"] += side.call("decode", n=n)["steps_ms"]
                    else:
                        raw[side.name] = {**side.call("begin"), "steps_ms": []}
                    done += 1
            for side in group:
                raw[side.name] |= side.call("end")
                raw[side.name].pop("report", None)
                if reload:
                    side.close()
        yield raw


def _check_alike(sides: Sequence[Side]) -> None:
    for what in ("ggml", "visual", "text"):
        found = {side.name: side.setup[what] for side in sides}
        if len(set(found.values())) > 1:
            raise LibraryError(f"the sides cannot be compared: {what} is {found}")
