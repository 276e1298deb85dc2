"""attn-span.metal in the eyes of Clang, which Apple's compiler is made of: C++14 with Metal's address spaces.

Needs the package libclang. Apple's compiler itself may still find more.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

cindex = pytest.importorskip("clang.cindex", reason="pip install libclang")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# upstream's own embedding takes care of the include; Clang proper knows neither of the attributes
UNKNOWN = re.compile(r'#include "common.h"|\[\[threadgroup\(0\)\]\]|\[\[host_name\("\w+"\)\]\]')


def complaints(text: str) -> list[str]:
    """What Clang says about Metal text."""
    prelude = (HERE / "metal" / "address_spaces.h").read_text()
    source = ("attn_span.cpp", prelude + UNKNOWN.sub("", text))
    flags = ["-std=c++14", "-Wall", "-Wextra", "-Wno-unknown-attributes", "-Wno-unused-function"]
    unit = cindex.Index.create().parse(source[0], args=flags, unsaved_files=[source])
    return [str(diagnostic) for diagnostic in unit.diagnostics]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("metal")
    subprocess.run(["cmake", f"-DOUT={out}", "-P", ROOT / "cmake" / "GpuKernels.cmake"], check=True)
    return (out / "ggml-metal" / "kernels" / "attn_span.metal").read_text()


def test_compiles(text: str) -> None:
    """Breaks if the text is no C++14, or a pointer lacks its address space."""
    assert not complaints(text)


def test_a_missing_address_space_is_found(text: str) -> None:
    """Breaks if this test would let a pointer without an address space pass."""
    broken = text.replace("GLOBAL const uint16_t * w =", "const uint16_t * w =", 1)
    assert broken != text and complaints(broken)


def test_only_what_every_metal_compiler_takes(text: str) -> None:
    """Breaks if the text uses matrices, or declares threadgroup arrays."""
    assert not re.search(r"simdgroup_(?!index)|\b(half|float|bfloat)\dx\d|threadgroup \w+ \w+\[", text)
    assert "#include <" not in text.split("__METAL_VERSION__")[0] and text.count("#pragma once") == 0
