"""Finds our native libraries and makes the stock bindings (llama-cpp-python) run on them.

The bindings load their libraries when they are imported, from the folders that two environment variables name. So
nothing of this package imports `llama_cpp` before `load()` has set them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..errors import LibraryError, one_line

ABI_VERSION = 7

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_ENV = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")

_GPU_TYPES = (1, 2)  # ggml_backend_dev_type: GPU, IGPU

_stock: Path | None = None
_lock = threading.RLock()  # the environment is changed while the bindings are imported


class Bindings(NamedTuple):
    """The stock bindings, on our libraries. llama: llama_cpp; lib: llama_cpp.llama_cpp; internals, mtmd."""

    llama: ModuleType
    lib: ModuleType
    internals: ModuleType
    mtmd: ModuleType


def use_stock(folder: Path) -> None:
    """Makes this process run on the unpatched llama.cpp of `folder`, for comparisons; before anything is loaded."""
    global _stock
    _stock = folder.resolve()


def folder() -> Path:
    """The folder of libllama and libmtmd: the package's own, or for developers the one that ST3_LIB_DIR names."""
    if _stock:
        return _stock
    given = os.environ.get("ST3_LIB_DIR")
    return Path(given).resolve() if given else Path(__file__).resolve().parents[1] / "lib"


def path_of(name: str) -> Path:
    """Where the library `name` ("llama", "mtmd") is looked for."""
    return folder() / f"lib{name}{_SUFFIX}"


def check_present() -> None:
    """Raises LibraryError where a library is missing. Nothing is loaded."""
    for name in ("llama", "mtmd"):
        if not path_of(name).is_file():
            raise LibraryError(f"{path_of(name)} is missing: build the package (pip install .) or set ST3_LIB_DIR")


def load() -> Bindings:
    """Imports the bindings on our libraries, once. Raises LibraryError where that cannot be, and in a process that was
    forked after it where there is a GPU: its driver works in the parent alone."""
    with _lock:
        bindings, pid = _load()
    if pid != os.getpid() and _has_gpu(bindings):
        raise LibraryError(
            "this process was forked after the libraries had been loaded, and a GPU works in the parent alone: start "
            "processes with multiprocessing's 'spawn'"
        )
    return bindings


@functools.cache
def _load() -> tuple[Bindings, int]:
    """The bindings, and the process that loaded them."""
    ours = path_of("llama")
    check_present()
    if "llama_cpp" in sys.modules:
        theirs = Path(str(getattr(sys.modules["llama_cpp.llama_cpp"]._lib, "_name", ""))).resolve()
        if theirs != ours.resolve():
            raise LibraryError(
                f"llama_cpp was imported before st3_edge and runs on {theirs}: import st3_edge and make a Llava "
                "first, or use a separate process"
            )
    try:
        with _environment(str(folder())):
            modules = [
                importlib.import_module(name)
                for name in (
                    "llama_cpp",
                    "llama_cpp.llama_cpp",
                    "llama_cpp._internals",
                    "llama_cpp.mtmd_cpp",
                )
            ]
    except Exception as e:  # a missing symbol, a wrong architecture, a missing dependency: all end here
        raise LibraryError(f"the libraries in {folder()} cannot be loaded: {one_line(e)}") from e
    bindings = Bindings(*modules)
    _check_abi(bindings)
    native = bindings.lib._lib
    if native.ggml_backend_dev_count() == 0:
        # Backends that are separate files: upstream would look for them beside the Python interpreter.
        native.ggml_backend_load_all_from_path(str(folder()).encode())
    bindings.lib.llama_backend_init()
    return bindings, os.getpid()


def trim() -> None:
    """Gives freed memory back to the system, where the C library keeps it (glibc)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _has_gpu(bindings: Bindings) -> bool:
    native = bindings.lib._lib
    native.ggml_backend_dev_by_type.argtypes, native.ggml_backend_dev_by_type.restype = [ctypes.c_int], ctypes.c_void_p
    return any(native.ggml_backend_dev_by_type(kind) for kind in _GPU_TYPES)


@contextmanager
def _environment(value: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENV}
    os.environ.update(dict.fromkeys(_ENV, value))
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def _check_abi(bindings: Bindings) -> None:
    try:
        version = bindings.lib._lib.st3_abi_version()
    except AttributeError as e:
        if _stock:
            return
        raise LibraryError(f"{path_of('llama')} is a stock llama.cpp without st3: rebuild the package") from e
    if _stock:
        raise LibraryError(f"{path_of('llama')} is not stock llama.cpp: it has st3 in it")
    if version != ABI_VERSION:
        raise LibraryError(
            f"{path_of('llama')} has st3 ABI {version}, this package needs {ABI_VERSION}: rebuild the package"
        )
