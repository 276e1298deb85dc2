"""Fixtures of the tests that run the embedded model on the built libraries."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from st3_edge import Llava, ST3Config, demo
from st3_edge.native import libraries

ROOT = Path(__file__).parents[2]
# One thread: where a machine is busy, several wait for each other longer than they compute on so small a model.
THREADS = 1
LONGEST = 120.0


@pytest.fixture(scope="session")
def load(files: tuple[str, str]) -> Callable[..., Llava]:
    """Loads the embedded model: load(config=None, **options)."""

    def make(config: ST3Config | None = None, **options: Any) -> Llava:
        return Llava(*files, config, **{"n_threads": THREADS, **options})

    return make


@pytest.fixture(scope="session")
def llava(load: Callable[..., Llava]) -> Iterator[Llava]:
    with load() as made:
        yield made


@pytest.fixture(scope="session")
def llama_cpp() -> ModuleType:
    """llama-cpp-python, on our libraries."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"):
            environment.setenv(name, str(libraries.folder()))
        return importlib.import_module("llama_cpp")


@pytest.fixture(scope="session")
def picture(scenes: list[demo.Scene]) -> str:
    return str(scenes[0].picture)


@pytest.fixture(scope="session")
def files() -> tuple[str, str]:
    model, mmproj = demo.model_paths()
    return str(model), str(mmproj)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `st3-edge` as a person would."""

    def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "st3_edge", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )

    return run


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `st3-edge`, to be read from and sent signals while it runs.

    After LONGEST seconds it is killed: a test that reads on for a line that never comes would wait for ever.
    """
    with ExitStack() as at_end:

        def run(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "st3_edge", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            at_end.enter_context(process)
            at_end.callback(process.kill)
            watchdog = threading.Timer(LONGEST, process.kill)
            watchdog.start()
            at_end.callback(watchdog.cancel)
            return process

        yield run


@pytest.fixture(scope="session")
def ask(command: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`st3-edge ask` with a short answer."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command("ask", "--threads", str(THREADS), "--max-tokens", "6", *arguments)

    return run


@pytest.fixture(scope="session")
def rewritten_mmproj(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes the embedded vision half with more metadata (arrays by key), or other tensors (`change(name, data)`)."""
    gguf = pytest.importorskip("gguf")

    def write(arrays: dict[str, list[int]] | None = None, change: Callable = lambda _, data: data) -> str:
        reader = gguf.GGUFReader(files[1])
        path = tmp_path_factory.mktemp("rewritten") / "mmproj.gguf"
        writer = gguf.GGUFWriter(path, "clip")
        for name, field in reader.fields.items():
            if name.startswith("clip."):
                kind = field.types[0]
                sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
        for name, values in (arrays or {}).items():
            writer.add_array(name, values)
        for tensor in reader.tensors:
            data = change(tensor.name, np.array(tensor.data))
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    return write


@pytest.fixture(scope="session")
def foreign_mmproj(rewritten_mmproj: Callable[..., str]) -> str:
    """The embedded vision half with a projector that is 32 wide: another model's."""
    return rewritten_mmproj(change=lambda name, data: data[:32] if name.startswith("mm.2.") else data)


@pytest.fixture(scope="session")
def tiled(rewritten_mmproj: Callable[..., str]) -> str:
    """The embedded vision half as one of LLaVA-1.6's, which cuts larger pictures into tiles."""
    sizes = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    return rewritten_mmproj({"clip.vision.image_grid_pinpoints": [336 * n for size in sizes for n in size]})
