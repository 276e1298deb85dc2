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


@pytest.fixture(scope="session")
def rt(
    request: pytest.FixtureRequest, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[native_runtime.Runtime]:
    """The libraries.

    With $ST3_TEST_DEVICE all layers run on a device that is a GPU to ggml (emulator/counting_device.cpp).
    """
    made = native_runtime.Runtime(native_folder)
    if ON_DEVICE:
        library = build.device(request.getfixturevalue("upstream"), tmp_path_factory.mktemp("device"), native_folder)
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
