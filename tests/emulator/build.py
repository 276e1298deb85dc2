"""Compiles what stands in for a GPU: kernels on emulated lanes, and a device that ggml takes for one.

upstream_tree()                              upstream's tree with our patches, for its headers
runner(backend, upstream, out)               a program that runs a backend's kernels on cases from stdin, sanitized
device(upstream, out, libraries[, backend])  a library with the counting device, which computes by the CPU backend, and
                                             ATTN_SPAN by the kernels of a backend if one is named
hip_device(upstream, out, libraries)         ggml-cuda's host code on hip_runtime.cpp; needs a HIP compiler
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "native" / "ggml"
BACKENDS = ("cuda", "metal")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
KERNELS = 3 * len(KINDS) + 1  # types of K by tile sizes, and the reduction
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-unused-function"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def upstream_tree() -> Path:
    """The folder, made or brought up to date; raises CalledProcessError."""
    folder = ROOT / "build" / "tests" / "upstream"
    subprocess.run([sys.executable, ROOT / "vendor" / "upstream.py", "--dest", folder], check=True)
    return folder


def run_compiler(flags: list[str], sources: list[Path], upstream: Path, out: Path, after: list[str]) -> Path:
    """C++ of ours against upstream's headers; raises CalledProcessError."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not cxx:
        raise FileNotFoundError("no C++ compiler")
    include = [HERE, NATIVE, upstream / "ggml/include", upstream / "ggml/src"]
    command = [*cxx.split(), "-fno-strict-aliasing", *WARNINGS, *flags, *(f"-I{path}" for path in include)]
    subprocess.run([*command, *sources, *after, "-o", out], check=True)
    return out


def kernels(backend: str, out: Path) -> tuple[list[str], list[Path], list[str]]:
    """Flags, sources and what follows them, of a backend's kernels on lanes; `out` is for what is generated."""
    flags, sources = [f"-I{HERE / backend}", f"-I{out}", f"-I{out / 'ggml-metal'}"], [HERE / f"emulate_{backend}.cpp"]
    if backend == "metal":
        subprocess.run(["cmake", f"-DOUT={out}", "-P", ROOT / "cmake" / "GpuKernels.cmake"], check=True)
        text = (out / "ggml-metal" / "kernels" / "attn_span.metal").read_text()
        named = re.findall(r'host_name\("(\w+)"\)\]\]\s*kernel logits_t (.+);', text)
        assert len(named) == KERNELS - 1
        (out / "instances.inc").write_text("".join(f'{{ "{name}", run_logits<{i}> }},\n' for name, i in named))
        sources.append(HERE / "metal" / "kernels.cpp")
    return flags, sources, ["-x", "c", str(NATIVE / "attn-span-gpu.c"), "-x", "none"]


def runner(backend: str, upstream: Path, out: Path) -> Path:
    flags, sources, after = kernels(backend, out)
    sources = [HERE / "run_cases.cpp", *sources, NATIVE / "attn-span-ref.cpp"]
    return run_compiler([*SANITIZED, *flags], sources, upstream, out / f"run_{backend}", after)


def device(upstream: Path, out: Path, libraries: Path, backend: str | None = None) -> Path:
    flags, sources, after = kernels(backend, out) if backend else ([], [], [])
    sources = [HERE / "counting_device.cpp", *sources]
    after = [*after, f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lst3-ggml", "-lst3-ggml-base"]
    return run_compiler(["-O2", "-shared", "-fPIC", *flags], sources, upstream, out / "libdevice.so", after)


def hip_compiler() -> list[str]:
    """$HIPCXX with its options, or hipcc; nothing if there is neither."""
    return shlex.split(os.environ.get("HIPCXX") or shutil.which("hipcc") or "")


def hip_device(upstream: Path, out: Path, libraries: Path) -> Path:
    """Some 190 files of upstream's, without what they hold for the GPU."""
    source = upstream / "ggml" / "src"
    cuda, types = source / "ggml-cuda", ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
    command = [*hip_compiler(), "-x", "hip", "--cuda-host-only", "--offload-arch=gfx1030", "-std=c++17", "-O1", "-fPIC"]
    command += ["-w", "-D__HIP_PLATFORM_AMD__", "-DGGML_USE_HIP", "-DGGML_HIP_GRAPHS", "-DGGML_HIP_NO_VMM"]
    command += ["-DGGML_HIP_NO_MMQ_MFMA", '-DGGML_CUDA_FA_QUANTS="all"']
    command += [f"-DGGML_CUDA_FA_{k}_{v}=1".upper() for k in types for v in types]
    command += [f"-I{path}" for path in (HERE, NATIVE, cuda, source, source.parent / "include")]

    def compiled(path: Path) -> str:
        made = str(out / f"{path.name}.o")
        subprocess.run([*command, "-c", path, "-o", made], check=True)
        return made

    sources = [*cuda.glob("*.cu"), *cuda.glob("template-instances/*.cu")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*sources, NATIVE / "attn-span.cu", HERE / "hip_runtime.cpp"]))
    after = [str(NATIVE / "attn-span-gpu.c"), "-x", "none", *objects]
    after += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lst3-ggml", "-lst3-ggml-base", "-Wl,--no-undefined"]
    return run_compiler(["-shared", "-fPIC", "-x", "c"], [], upstream, out / "libdevice.so", after)
