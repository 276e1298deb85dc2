"""Fixtures of the tests that need a C++ compiler: GPU kernels, run on the CPU or compiled for a GPU elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Upstream's tree with our patches: its headers are the real ones."""
    folder = ROOT / "build" / "tests" / "upstream"
    subprocess.run([sys.executable, ROOT / "vendor" / "upstream.py", "--dest", folder], check=True)
    return folder
