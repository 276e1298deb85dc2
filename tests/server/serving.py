"""A server under test, and what a client sends it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("ST3_TEST_LONG") == "1"  # as many requests as the release needs; else what CI has time for
START_S = 120.0
Json = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_url(picture: str | Path | bytes) -> str:
    data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def message(question: str, *pictures: str | Path | bytes) -> Json:
    """A user's message, pictures first."""
    parts: list[Json] = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


class Server:
    """A running server; `log`: the file that it writes to."""

    def __init__(self, words: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.port, self.log = port, log
        self._out = log.open("wb")
        self.process = subprocess.Popen(
            words, stdout=self._out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, health: str = "/health") -> Server:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", health, timeout=5)[0] == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def raw(self, method: str, path: str, body: bytes | None = None, timeout: float = 120, **headers: str) -> Any:
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def request(
        self, method: str, path: str, body: Any = None, timeout: float = 120, **headers: str
    ) -> tuple[int, Any]:
        """(status, JSON)"""
        status, _, data = self.raw(
            method, path, None if body is None else json.dumps(body).encode(), timeout, **headers
        )
        try:
            return status, json.loads(data)
        except ValueError:
            return status, data.decode(errors="replace")

    def chat(self, *turns: Json, **options: Any) -> Json:
        """A chat completion; fails the test where there is none."""
        body = {"messages": list(turns), "temperature": 0, "max_tokens": 32, **options}
        status, answer = self.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return dict(answer)

    def ask(self, question: str, *pictures: str | Path | bytes, **options: Any) -> str:
        return text(self.chat(message(question, *pictures), **options))

    def resident(self, peak: bool = False) -> int:
        """Bytes: now, or the most there ever were."""
        if peak:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        words = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._out.close()
        return code


def text(answer: Json) -> str:
    return str(answer["choices"][0]["message"]["content"]).strip()


def growth(sizes: list[int]) -> float:
    """How much larger the last fifth is than the second, medians: the first one warms up."""
    fifth = len(sizes) // 5
    return statistics.median(sizes[-fifth:]) / statistics.median(sizes[fifth : 2 * fifth]) - 1


Start = Callable[..., Server]


def alive(server: Server, scenes: list[Any]) -> None:
    """Breaks if it no longer answers a question about a picture."""
    question, answer = scenes[0].questions[0]
    assert server.ask(question, scenes[0].picture) == answer
