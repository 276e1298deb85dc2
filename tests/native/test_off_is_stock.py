"""ST3 off is stock llama.cpp, bit for bit.

Stock is the same sources unpatched, in $ST3_STOCK_LIB_DIR; each runs in its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import native_runtime
import numpy as np
import pytest
from cases import SEED
from mrope import FAMILIES, write

pytestmark = pytest.mark.no_device

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run(lib: Path, gguf: Path, out: Path, kv: str, st3: bool) -> np.ndarray:
    """Logits of every output of the probe's batches, as raw 32-bit words."""
    env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests")])
    args = [sys.executable, str(HERE / "probe.py"), str(lib), str(gguf), str(out), kv, "st3" if st3 else "stock"]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.fromfile(out, np.uint32)


@pytest.mark.parametrize("kv", ["F16", "Q8_0", "F32"])
@pytest.mark.parametrize("file_type", ["F32", "Q4_0", "Q8_0"])
def test_bits(rt, random_gguf, tmp_path: Path, kv: str, file_type: str) -> None:
    """Breaks if the patches change one bit of a logit of text, images, decode steps or parallel sequences."""
    compare(random_gguf(cases.SHAPES["mha-64"], file_type, seed=SEED), tmp_path, kv)


@pytest.mark.parametrize("name", FAMILIES)
def test_bits_of_mrope(rt, tmp_path: Path, name: str) -> None:
    """Breaks if they do in models with M-RoPE or deepstack."""
    compare(write(tmp_path / "model.gguf", FAMILIES[name], SEED), tmp_path, "F16")


def compare(gguf: Path, tmp_path: Path, kv: str) -> None:
    stock = os.environ.get("ST3_STOCK_LIB_DIR")
    if not stock:
        pytest.skip("ST3_STOCK_LIB_DIR is not set")
    ours = native_runtime.lib_dir()
    assert ours is not None
    a = run(Path(stock), gguf, tmp_path / "stock.bin", kv, st3=False)
    b = run(ours, gguf, tmp_path / "ours.bin", kv, st3=False)
    c = run(ours, gguf, tmp_path / "st3.bin", kv, st3=True)
    assert len(a) > 0 and np.array_equal(a, b), "llama_decode differs"
    assert np.array_equal(a, c), "st3_prefill with ST3 off differs"
