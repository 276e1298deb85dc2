"""ggml's AMX code gives right products when it is compiled as ggml is. Where the CPU has no AMX, tiles are emulated."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from st3_edge.native import libraries, machine

HERE = Path(__file__).resolve().parent
FLAGS = set(machine.cpuinfo("flags").split())
NOT_CONFIGURED = 86  # amx_emulator.cpp

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or "avx512_vnni" not in FLAGS,
    reason="ggml's AMX code needs Linux and AVX-512 VNNI as well",
)


def compiler() -> list[str]:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        pytest.skip("no C++ compiler")
    return found.split()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process in which tile instructions work."""
    if "amx_int8" in FLAGS:
        return dict(os.environ)
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*compiler(), "-std=c++17", "-O2", *warnings, "-fPIC", "-shared", HERE / "amx_emulator.cpp", "-o", library],
        check=True,
    )
    return {**os.environ, "LD_PRELOAD": str(library)}


def program(upstream: Path, out: Path, level: str) -> Path:
    """amx_products.cpp at a level of optimization; ggml's is -O3, of CMake's build type Release."""
    sources = upstream / "ggml" / "src"
    include = [f"-I{folder}" for folder in (sources, sources.parent / "include", sources / "ggml-cpu")]
    amx = ["-march=native", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]  # -march=native of a CPU with AMX
    flags = [f"-L{libraries.folder()}", "-lst3-ggml-cpu", "-lst3-ggml-base", f"-Wl,-rpath,{libraries.folder()}"]
    command = [*compiler(), "-std=gnu++17", level, "-DNDEBUG", "-w", *amx, *include, HERE / "amx_products.cpp"]
    subprocess.run([*command, *flags, "-o", out], check=True)
    return out


@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3"])
def test_products(upstream: Path, tmp_path: Path, environment: dict[str, str], level: str) -> None:
    """Breaks if the compiler drops a byte of the tile configuration (without vendor/fixes GCC 12 does, from -O2 on), or
    if a kernel of AMX is wrong for a type of weights or a number of rows."""
    done = subprocess.run([program(upstream, tmp_path / "products", level)], env=environment, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert len(re.findall(rb"(?m)^\w+ \d+ 0\.\d+$", done.stdout)) == 7 * 7


@pytest.mark.skipif("amx_int8" in FLAGS, reason="this CPU has AMX")
def test_the_emulator_refuses_what_hardware_refuses(
    upstream: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Breaks if a tile that was not configured were taken for a good one: nothing above would then be checked."""
    one = program(upstream, tmp_path / "products", "-O0")
    done = subprocess.run([one, "unconfigured"], env=environment, capture_output=True)
    assert done.returncode == NOT_CONFIGURED, done.stderr.decode()
