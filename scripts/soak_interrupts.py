"""Ctrl-C at random moments of loading, prefill, decoding and saving, and loads that succeed or fail, again and again.

python scripts/soak_interrupts.py --interrupts 1000 --loads 200

Each interrupt must reach the caller as KeyboardInterrupt, and the next answer must be that of a conversation which was
never interrupted. Resident memory must stay within 2 % over the loads that were closed, and over those that failed.
Prints one JSON object; exit code 1 where something was not so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring

from st3_edge import Llava, ST3Config, St3Error, demo

FIRST, SECOND = "What color is the star?", "Describe the image."
SPREAD = 0.02


class Interrupter:
    """Sends SIGINT to this process once, `delay` seconds after it was entered, while what is inside runs.

    `sent`: whether it did; `reached`: whether KeyboardInterrupt left what was inside; `waited`: the seconds between.
    """

    def __init__(self, delay: float) -> None:
        self._delay, self._begun, self._over = delay, threading.Event(), threading.Event()
        self._at = 0.0
        self.sent = self.reached = False
        self.waited = 0.0
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        self._begun.wait()
        if not self._over.wait(self._delay):
            self.sent, self._at = True, time.perf_counter()
            os.kill(os.getpid(), signal.SIGINT)

    def during(self, work: Callable[[], Any]) -> None:
        self._thread.start()
        try:
            try:
                self._begun.set()
                work()
            finally:
                self._over.set()
                self._thread.join()
                for _ in range(1000):  # one that was sent in the last moment is seen at the next bytecode
                    pass
        except KeyboardInterrupt:
            self.reached = True
            self.waited = time.perf_counter() - self._at
        self._over.set()
        self._thread.join()


class Soak:
    """One loaded model and what its answers have to be. `work`: a folder for its files."""

    def __init__(self, seed: int, work: Path, config: ST3Config) -> None:
        self._random = random.Random(seed)
        self._work, self._config = work, config
        self._files = tuple(map(str, demo.model_paths()))
        self._picture, self._other = (str(scene.picture) for scene in demo.scenes()[:2])
        self._llava = self.load()
        self._talk = [self._user(FIRST, self._picture)]
        self._expected = self._answers(self._llava)
        self.counts: dict[str, int] = {}
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self.waited: list[float] = []
        self._seconds: dict[str, float] = {}

    def load(self, **options: Any) -> Llava:
        return Llava(*self._files, self._config, n_ctx=2048, n_threads=1, **options)

    def interrupt(self) -> None:
        """One interrupt, and the check behind it."""
        name = self._random.choice(("load", "prefill", "decode", "save"))
        before, work = getattr(self, f"_{name}")()
        before()
        if name not in self._seconds:
            started = time.perf_counter()
            work()
            self._seconds[name] = time.perf_counter() - started
            before()
        interrupter = Interrupter(self._random.uniform(0, 1.1 * self._seconds[name]))
        interrupter.during(work)
        if not interrupter.sent:
            return
        self.counts[name] = self.counts.get(name, 0) + 1
        if interrupter.reached:
            self.waited.append(interrupter.waited)
        else:
            self.lost.append(name)
        self._check(name)

    def _check(self, name: str) -> None:
        if name == "load":
            with self.load() as llava:
                answers = self._answers(llava)
        else:
            answers = self._answers(self._llava)
        if answers != self._expected:
            self.wrong.append(f"{name}: {answers} instead of {self._expected}")
        if parts := [path.name for path in self._work.iterdir() if path.suffix == ".part"]:
            self.wrong.append(f"{name}: left {parts}")

    def _answers(self, llava: Llava) -> list[Any]:
        """Of a first question and of a second one, about the picture."""
        first = self._ask(llava, self._talk)
        answer = {"role": "assistant", "content": first["answer"]}
        second = self._ask(llava, [*self._talk, answer, self._user(SECOND)])
        return [[said["answer"], said["visual_tokens"], said["mode"]] for said in (first, second)]

    @staticmethod
    def _ask(llava: Llava, messages: list[Any]) -> Any:
        return llava.create_chat_completion(messages, temperature=0, max_tokens=24)["st3"]

    @staticmethod
    def _user(text: str, picture: str | None = None) -> dict[str, Any]:
        pictures = [] if picture is None else [{"type": "image", "image": picture}]
        return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}

    # each: what is done before, and what is interrupted

    def _load(self) -> tuple[Callable[[], None], Callable[[], None]]:
        return lambda: None, lambda: self.load().close()

    def _prefill(self) -> tuple[Callable[[], None], Callable[[], None]]:
        def work() -> None:
            self._llava.create_chat_completion([self._user(SECOND, self._other)], max_tokens=1)

        def before() -> None:  # where nothing is known of the picture, it is encoded, too
            self._llava.reset()
            if self._random.random() < 0.5:
                self._llava._session.embeddings.__init__(2**28)  # type: ignore[misc]

        return before, work

    def _decode(self) -> tuple[Callable[[], None], Callable[[], None]]:
        def before() -> None:
            self._stream = self._llava.create_chat_completion([self._user(SECOND, self._picture)], stream=True)
            for _ in range(2):
                next(self._stream)  # type: ignore[call-overload]

        return before, lambda: [None for _ in self._stream].clear()

    def _save(self) -> tuple[Callable[[], None], Callable[[], None]]:
        path = self._work / "saved.st3"

        def work() -> None:
            self._llava.save_state(path)
            self._llava.load_state(path)

        return lambda: path.unlink(missing_ok=True), work

    def close(self) -> None:
        self._llava.close()


def resident() -> int:
    """Bytes of this process in memory (Linux), without the freed memory that glibc keeps: see one_arena()."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one_arena() -> None:
    """Has glibc serve all threads from one arena: malloc_trim gives back the end of the main one only."""
    m_arena_max = -8
    ctypes.CDLL(None).mallopt(m_arena_max, 1)


def flat(work: Callable[[int], None], n: int) -> dict[str, Any]:
    """Does `work` n times, after a tenth as often to begin with; the medians of resident memory over the first and the
    last quarter, and how it grew."""
    one_arena()
    for i in range(max(10, n // 10)):
        work(i)
    sizes = []
    for i in range(n):
        work(i)
        sizes.append(resident())
    quarter = max(1, n // 4)
    first, last = statistics.median(sizes[:quarter]), statistics.median(sizes[-quarter:])
    return {"times": n, "first_mb": first / 1e6, "last_mb": last / 1e6, "growth": last / first - 1}


def failing(work: Path) -> list[Callable[[], None]]:
    """Loads that fail, each at another step of the constructor."""
    model, mmproj = map(str, demo.model_paths())
    cut = work / "cut.gguf"
    cut.write_bytes(Path(model).read_bytes()[: -(2**20)])
    cut_mmproj = work / "cut-mmproj.gguf"
    cut_mmproj.write_bytes(Path(mmproj).read_bytes()[: -(2**20)])

    def fails(*arguments: Any, **options: Any) -> Callable[[], None]:
        def call() -> None:
            with contextlib.suppress(St3Error):
                Llava(*arguments, n_threads=1, **options)
                raise AssertionError(f"loaded in spite of {options or arguments}")

        return call

    return [
        fails(str(work / "nowhere.gguf"), mmproj),
        fails(str(cut), mmproj),
        fails(model, str(cut_mmproj)),
        fails(model, mmproj, ST3Config(start=10**6)),
        fails(model, mmproj, chat_template="{% if %}"),
        fails(model, mmproj, n_ctx=1000, n_ubatch=1000, type_k="q4_0", chat_template="nothing of the message"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=measuring.whole(0, 10**6), default=1000)
    parser.add_argument("--loads", type=measuring.whole(0, 10**6), default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ignored: list[str] = []
    sys.unraisablehook = lambda what: ignored.append(f"{what.exc_value!r} in {what.object!r}")

    found: dict[str, Any] = {"seed": args.seed}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        soak = Soak(args.seed, work, ST3Config(anneal="linear", anneal_tokens=8))
        while sum(soak.counts.values()) < args.interrupts:
            soak.interrupt()
        soak.close()
        found["interrupts"] = soak.counts
        found["lost"], found["wrong"], found["ignored"] = soak.lost, soak.wrong, ignored
        if soak.waited:
            found["seconds_to_reach_the_caller"] = {
                "median": statistics.median(soak.waited),
                "most": max(soak.waited),
            }
        if args.loads:
            fails = failing(work)
            found["loads_and_closes"] = flat(lambda _: soak.load().close(), args.loads)
            found["failed_loads"] = flat(lambda i: fails[i % len(fails)](), args.loads)
    print(json.dumps(found, indent=2))
    growths = [found[name]["growth"] for name in ("loads_and_closes", "failed_loads") if name in found]
    return int(bool(soak.lost or soak.wrong or ignored or any(growth > SPREAD for growth in growths)))


if __name__ == "__main__":
    measuring.run(main)
