"""Fixtures of the tests that need the built libraries and nothing else: models are written on the spot."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT / "tests" / "native", ROOT / "scripts"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import native_runtime  # noqa: E402
from cases import ON_DEVICE, SEED  # noqa: E402
from emulator import build  # noqa: E402

from st3_edge.commands.bench import random_model  # noqa: E402

TALLY: dict[str, int] = {}


@pytest.fixture(scope="session")
def rt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[native_runtime.Runtime]:
    """The libraries. Their absence is a failure, not a reason to skip: this folder is about them.

    With $ST3_TEST_DEVICE all layers run on a device that is a GPU to ggml (emulator/counting_device.cpp).
    """
    folder = native_runtime.lib_dir()
    if folder is None:
        pytest.fail("no native libraries: build the package (pip install .) or set ST3_LIB_DIR", pytrace=False)
    made = native_runtime.Runtime(folder)
    if ON_DEVICE:
        library = build.device(request.getfixturevalue("upstream"), tmp_path_factory.mktemp("device"), folder)
        ctypes.CDLL(str(library)).device_register(b"")
        os.environ["ST3_GPU_LAYERS"] = "99"
    yield made
    made.close()


@pytest.fixture(scope="session")
def random_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model once: random_gguf(shape, file_type="F32", metadata=None) -> path."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple, Path] = {}

    def make(shape: random_model.Shape, file_type: str = "F32", metadata: dict | None = None, seed: int = SEED) -> Path:
        key = (shape, file_type, tuple(sorted((metadata or {}).items())), seed)
        if key not in made:
            made[key] = folder / f"{len(made)}.gguf"
            random_model.write_text(made[key], shape, file_type, seed, metadata)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tally() -> dict[str, int]:
    """Counters that the end of the run prints."""
    return TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counters and the seed."""
    if TALLY:
        words = ", ".join(f"{v} {k}" for k, v in TALLY.items())
        terminalreporter.write_line(f"against the oracle (seed {SEED}): {words}")
