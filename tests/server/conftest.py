"""Fixtures of the tests that start llama.cpp's programs: on 127.0.0.1, free ports, stopped by their process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import ROOT, Server, Start, free_port

from st3_edge import demo
from st3_edge.errors import St3Error
from st3_edge.serve import command as serve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder where the build left the programs out (ST3_TOOLS=OFF, sanitizers)."""
    try:
        demo.model_paths()
        serve.find("llama-server")
        missing = None
    except St3Error as e:
        missing = str(e)
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `st3-edge serve` with options, or with `program` another of llama.cpp's programs; waits for its health."""
    running: list[Server] = []

    def start(*options: str, program: str = "", wait: bool = True, env: dict[str, str] | None = None) -> Server:
        port = free_port()
        found = Path(program) if "/" in program else serve.find(program) if program else None
        words = [str(found)] if found else [sys.executable, "-m", "st3_edge", "serve"]
        words += ["--port", str(port), *options, "--threads", "1"]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        server = Server(words, port, tmp_path_factory.mktemp("server") / "log", {**paths, **(env or {})})
        running.append(server)
        return server.wait() if wait else server

    yield start
    for server in running:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Start) -> Server:
    """`st3-edge serve` with the embedded model, four slots."""
    return start_server("-np", "4", "-c", "8192")


@pytest.fixture(scope="session")
def scenes() -> list[demo.Scene]:
    return demo.scenes()
