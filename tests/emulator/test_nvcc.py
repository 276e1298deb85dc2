"""attn-span.cu compiled by nvcc for every generation of cards that upstream builds for. Needs nvcc, not a card.

The headers of cuBLAS, which upstream's own include, come from a CUDA toolkit or from the package nvidia-cublas.
"""

from __future__ import annotations

import re
import shutil
import site
import subprocess
from pathlib import Path

import pytest
from emulator import build

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """nvcc, and where the package's headers are."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc")
    packages = [Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())]
    command = [nvcc, *(f"-I{folder}" for package in packages for folder in package.glob("nvidia/*/include"))]
    probe = tmp_path_factory.mktemp("probe") / "probe.cu"
    probe.write_text("#include <cublas_v2.h>\n")
    if subprocess.run([*command, "-E", probe], capture_output=True).returncode:
        pytest.skip("no cublas_v2.h: pip install nvidia-cublas")
    return command


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(
    compiler: list[str], upstream: Path, tmp_path: Path, architecture: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if nvcc warns, an instance is missing, or a kernel needs more registers than there are."""
    source = upstream / "ggml" / "src"
    command = [*compiler, "-std=c++17", "-O3", "-use_fast_math", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    # CUDA's and upstream's headers hold unused parameters and functions
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-Wno-unused-function"]
    command += [f"-I{folder}" for folder in (source, source.parent / "include", ROOT / "native" / "ggml")]
    command += ["-c", str(ROOT / "native" / "ggml" / "attn-span.cu"), "-o", str(tmp_path / "attn-span.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    used = [match.groupdict() for match in USED.finditer(done.stderr)]
    assert len({kernel["name"] for kernel in used}) == build.KERNELS
    registers = [int(kernel["registers"]) for kernel in used]
    spilled = [kernel for kernel in used if any(int(kernel[what]) for what in ("stack", "stores", "loads"))]
    with capsys.disabled():
        print(f"\nsm_{architecture}: {min(registers)} to {max(registers)} registers, {len(spilled)} kernels spill")
    assert not spilled
