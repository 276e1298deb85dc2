"""Fixtures of the tests that start llama.cpp's programs: on 127.0.0.1, free ports, stopped by their process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import ROOT, Server, Start, free_port

from st3_edge.commands.serve import command as serve


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `st3-edge serve` with options, or with `program` another of llama.cpp's programs; waits for its health."""
    running: list[Server] = []

    def start(*options: str, program: str = "", wait: bool = True, env: dict[str, str] | None = None) -> Server:
        found = Path(program) if "/" in program else serve.find(program) if program else None
        words = [str(found)] if found else [sys.executable, "-m", "st3_edge", "serve"]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        while True:
            port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
            more = ["--port", str(port), *options, "--threads", "1"]
            server = Server([*words, *more], port, log, {**paths, **(env or {})})
            running.append(server)
            try:
                return server.wait() if wait else server
            except AssertionError:
                if "couldn't bind HTTP server socket" not in log.read_text(errors="replace"):
                    raise  # else another program took the port before the server did

    yield start
    for server in running:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Start) -> Server:
    """`st3-edge serve` with the embedded model, four slots."""
    return start_server("-np", "4", "-c", "8192")
