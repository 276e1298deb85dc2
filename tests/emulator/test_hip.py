"""attn-span.cu compiled for AMD's cards, as GGML_HIP=on builds it. Needs a HIP compiler and HIP's headers, not a card.

$HIPCXX names the compiler, with options if it needs any; hipcc is taken otherwise.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulator import build

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("gfx906", "gfx90a", "gfx1030", "gfx1100")  # the first two have waves of 64 lanes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(
    upstream: Path, tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if HIP's compiler refuses the text or warns of it, or a kernel needs more registers than there are."""
    compiler = build.hip_compiler() or pytest.skip("no hipcc, no $HIPCXX")
    ours, source, assembly = ROOT / "native" / "ggml", upstream / "ggml" / "src", tmp_path / "attn-span.s"
    command = [*compiler, "-x", "hip", f"--offload-arch={architecture}", "--cuda-device-only", "-S", "-std=c++17"]
    command += ["-O3", "-D__HIP_PLATFORM_AMD__", "-DGGML_USE_HIP", "-Wall", "-Wextra"]
    command += [f"-I{folder}" for folder in (ours, source, source.parent / "include")]
    done = subprocess.run([*command, ours / "attn-span.cu", "-o", assembly], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # HIP's and upstream's headers have warnings of their own
    assert not re.findall(rf"^{re.escape(str(ours))}\S+ warning: .*", done.stderr, re.MULTILINE)

    told = assembly.read_text().partition("amdhsa.kernels:")[2]
    registers, spilled, stack = (
        [int(n) for n in re.findall(rf"\.{name}: +(\d+)", told)]
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    assert len(registers) == len(spilled) == len(stack) == build.KERNELS
    with capsys.disabled():
        print(f"\n{architecture}: {min(registers)} to {max(registers)} vector registers")
    assert not any(spilled + stack)
