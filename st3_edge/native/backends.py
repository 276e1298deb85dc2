"""What the native libraries say of themselves: ggml's version, the CPU features they use, and ggml's devices."""

from __future__ import annotations

import ctypes
from typing import Any

from ..config import KV_TYPES
from . import libraries


def ggml_version(bindings: libraries.Bindings) -> str:
    """ggml's version, of the libraries that the bindings run on."""
    version = bindings.lib._lib.ggml_version
    version.restype = ctypes.c_char_p
    return str(version().decode())


def cpu_features(bindings: libraries.Bindings) -> list[str]:
    """What these libraries were compiled to use: the names that are on in "CPU : AVX = 1 | AVX2 = 0 | ..."."""
    features = []
    for item in bindings.lib.llama_print_system_info().decode().replace(" : ", " | ").split("|"):
        name, _, value = item.partition("=")
        if value.strip() == "1":
            features.append(name.strip())
    return features


def devices(lib: ctypes.CDLL) -> list[dict[str, Any]]:
    """ggml's devices, as libllama in `lib` knows them: name, description, backend, and for which types of the KV cache
    each has a kernel for attention scores (at head size 128)."""
    pointer = ctypes.c_void_p
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes, lib.ggml_backend_dev_get.restype = [ctypes.c_size_t], pointer
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [pointer], ctypes.c_char_p
    lib.ggml_backend_dev_backend_reg.argtypes, lib.ggml_backend_dev_backend_reg.restype = [pointer], pointer
    lib.st3_device_has_kernel.argtypes = [pointer, ctypes.c_int, ctypes.c_int32]
    lib.st3_device_has_kernel.restype = ctypes.c_bool
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        registry = lib.ggml_backend_dev_backend_reg(device)
        found.append(
            {
                "name": lib.ggml_backend_dev_name(device).decode(),
                "description": lib.ggml_backend_dev_description(device).decode(),
                "backend": lib.ggml_backend_reg_name(registry).decode(),
                "kernel_for": [name for name, kind in KV_TYPES.items() if lib.st3_device_has_kernel(device, kind, 128)],
            }
        )
    return found
