"""Finds our native libraries and loads them, with the ctypes modules that describe them (`bindings`)."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..errors import LibraryError, one_line

ABI_VERSION = 10

_PREFIX = "" if sys.platform == "win32" else "lib"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_GPU_TYPES = (1, 2)  # ggml_backend_dev_type: GPU, IGPU
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # ggml_log_callback

_stock: Path | None = None
_lock = threading.RLock()


class Bindings(NamedTuple):
    """The C interface, in ctypes. lib: llama.h; mtmd: mtmd.h."""

    lib: ModuleType
    mtmd: ModuleType


def use_stock(folder: Path) -> None:
    """Makes this process run on the unpatched llama.cpp of `folder`, for comparisons; before anything is loaded."""
    global _stock
    _stock = folder.resolve()


def folder() -> Path:
    """The folder of the libraries that this process runs on."""
    return _stock or own_folder()


def own_folder() -> Path:
    """The folder of our libraries and bindings: the package's, or for developers the one that ST3_LIB_DIR names."""
    given = os.environ.get("ST3_LIB_DIR")
    return Path(given).resolve() if given else Path(__file__).resolve().parents[1] / "lib"


def path_of(name: str) -> Path:
    """Where the library `name` ("llama", "mtmd") is looked for."""
    return stock_path(_stock, name) if _stock else own_folder() / f"{_PREFIX}st3-{name}{_SUFFIX}"


def stock_path(folder: Path, name: str) -> Path:
    """Where it is looked for in a folder of unpatched libraries."""
    return folder / f"{_PREFIX}{name}{_SUFFIX}"


def upstream() -> dict[str, str]:
    """What our libraries are built from: vendor/upstream.json. Raises LibraryError where they are not there."""
    path = own_folder() / "bindings" / "upstream.json"
    try:
        pin: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise LibraryError(f"{path} cannot be read: {one_line(e)}: build the package ({_install()})") from e
    return pin


def check_present() -> None:
    """Raises LibraryError where a library is missing. Nothing is loaded."""
    for name in ("llama", "mtmd"):
        if not path_of(name).is_file():
            raise LibraryError(f"{path_of(name)} is missing: build the package ({_install()}) or set ST3_LIB_DIR")


def _install() -> str:
    """The command that builds the package. In its sources Python finds them before an installed package."""
    sources = (Path(__file__).resolve().parents[2] / "CMakeLists.txt").is_file()
    return "in its sources: pip install -e ." if sources else "pip install ."


def load() -> Bindings:
    """Loads the libraries, once. Raises LibraryError where that cannot be, and in a process that was
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
    check_present()
    package = f"{__package__}.bindings"
    try:
        bindings = Bindings(*(importlib.import_module(f"{package}.{name}") for name in ("llama_cpp", "mtmd_cpp")))
    except Exception as e:  # a missing symbol, a wrong architecture, a missing dependency: all end here
        raise LibraryError(f"the libraries in {folder()} cannot be loaded: {one_line(e)}") from e
    _check_abi(bindings)
    load_backends(bindings.lib._lib)
    bindings.lib.llama_backend_init()
    return bindings, os.getpid()


def load_backends(lib: ctypes.CDLL) -> None:
    """Loads ggml's backends where they are separate files: upstream would look beside the Python interpreter. Raises
    LibraryError where none of them runs on this machine."""
    if lib.ggml_backend_dev_count():
        return
    before, data = ctypes.c_void_p(), ctypes.c_void_p()
    quiet = _LogCallback(lambda level, text, user: None)
    lib.ggml_log_get(ctypes.byref(before), ctypes.byref(data))
    lib.ggml_log_set(quiet, None)  # which file it took is not for the terminal
    try:
        lib.ggml_backend_load_all_from_path(os.fsencode(folder()))
    finally:
        lib.ggml_log_set(before, data)
    if not lib.ggml_backend_dev_count():
        raise LibraryError(f"no backend of ggml in {folder()} runs on this machine")


def trim() -> None:
    """Gives freed memory back to the system, where the C library keeps it (glibc)."""
    with suppress(AttributeError, TypeError):  # on Windows None is no library
        ctypes.CDLL(None).malloc_trim(0)


def _has_gpu(bindings: Bindings) -> bool:
    native = bindings.lib._lib
    native.ggml_backend_dev_by_type.argtypes, native.ggml_backend_dev_by_type.restype = [ctypes.c_int], ctypes.c_void_p
    return any(native.ggml_backend_dev_by_type(kind) for kind in _GPU_TYPES)


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
