"""What `st3-edge doctor` finds out about this installation and machine."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
from typing import Any

from . import _libs, _log, _machine, demo
from .config import KV_TYPES
from .errors import St3Error


def examine() -> dict[str, Any]:
    """Everything found, as plain values; "problems" lists in one line each what keeps the package from working."""
    problems: list[str] = []
    found: dict[str, Any] = {
        "versions": versions(),
        "libraries": _library_files(),
        "abi": None,
        "ggml": None,
        "cpu": _cpu(),
        "cpu_features": [],
        "amx": None,
        "devices": [],
        "demo_model": _demo_model(problems),
        "problems": problems,
    }
    try:
        bindings = _libs.load()
    except St3Error as e:
        problems.append(str(e))
        return found
    _log.install()
    lib = bindings.lib._lib
    found["abi"] = lib.st3_abi_version()
    found["ggml"] = ggml_version(bindings)
    found["cpu_features"] = cpu_features(bindings)
    found["amx"] = _amx(found["cpu_features"])
    found["devices"] = devices(lib)
    return found


def describe(found: dict[str, Any]) -> str:
    """The same as text for a person."""
    libraries, model = found["libraries"], found["demo_model"]
    lines = [
        "versions      " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"libraries     {libraries['folder']}",
        *(f"              {name}" for name in libraries["files"]),
        f"st3 ABI       {found['abi']} (this package needs {_libs.ABI_VERSION})",
        f"ggml          {found['ggml']}",
        f"CPU           {found['cpu']['model']}, {found['cpu']['usable']} threads usable",
        f"CPU features  {' '.join(found['cpu_features'])}",
    ]
    if found["amx"]:
        lines.append(f"AMX           {found['amx']}")
    for device in found["devices"]:
        lines.append(f"device        {device['name']}: {device['description']} ({device['backend']})")
        lines.append(f"              {_kernel(device)}")
    if model:
        lines.append(f"demo model    {model['model']}")
        lines.append(f"              {model['mmproj']}")
        lines.append(f"              {len(model['pictures'])} pictures")
    lines += [f"PROBLEM       {problem}" for problem in found["problems"]]
    if not found["problems"]:
        lines.append("all is well")
    return "\n".join(lines)


def _kernel(device: dict[str, Any]) -> str:
    if device["kernel_for"]:
        return f"attention scores: fused kernel, KV cache in {', '.join(device['kernel_for'])}"
    lacks = "this GPU has no SIMD-group reductions" if device["backend"] == "MTL" else "there is none for this backend"
    return f"attention scores: stock ops, no fused kernel: {lacks}"


def versions() -> dict[str, str]:
    """Of Python, this package and those that it needs."""
    found = {"python": platform.python_version()}
    for name in ("st3-edge", "llama-cpp-python", "numpy", "pillow", "huggingface-hub"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _library_files() -> dict[str, Any]:
    folder = _libs.folder()
    files = sorted(p.name for p in folder.glob("lib*")) if folder.is_dir() else []
    return {"folder": str(folder), "files": files}


def _demo_model(problems: list[str]) -> dict[str, Any] | None:
    try:
        model, mmproj = demo.model_paths()
        pictures = [str(scene.picture) for scene in demo.scenes()]
    except St3Error as e:
        problems.append(str(e))
        return None
    return {"model": str(model), "mmproj": str(mmproj), "pictures": pictures}


def _cpu() -> dict[str, Any]:
    return {"model": _machine.processor(), "usable": _machine.usable_cpus()}


def ggml_version(bindings: _libs.Bindings) -> str:
    """ggml's version, of the libraries that the bindings run on."""
    version = bindings.lib._lib.ggml_version
    version.restype = ctypes.c_char_p
    return str(version().decode())


def cpu_features(bindings: _libs.Bindings) -> list[str]:
    """What these libraries were compiled to use: the names that are on in "CPU : AVX = 1 | AVX2 = 0 | ..."."""
    features = []
    for item in bindings.lib.llama_print_system_info().decode().replace(" : ", " | ").split("|"):
        name, _, value = item.partition("=")
        if value.strip() == "1":
            features.append(name.strip())
    return features


def _amx(features: list[str]) -> str | None:
    if any(name.startswith("AMX") for name in features):
        return "used"
    if sys.platform == "linux" and "amx_int8" in _machine.cpuinfo("flags").split():
        return "this CPU has it, and the libraries were built without: build on this machine, with GGML_NATIVE on"
    return None


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
