"""Fixtures of the tests that need a GPU, and libraries that were built for it.

Without one they are skipped; with $ST3_NEED_GPU set, as scripts/gpu_check.py has it, they fail.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT / "tests" / "native", ROOT / "scripts"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import native_runtime  # noqa: E402
from ggml_graph import Backend  # noqa: E402

GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU


@pytest.fixture(scope="session")
def gpu() -> Backend:
    """The first GPU."""
    folder = native_runtime.lib_dir()
    try:
        if folder is None:
            raise LookupError
        return Backend(folder, GPU)
    except LookupError:
        give_up = pytest.fail if os.environ.get("ST3_NEED_GPU") else pytest.skip
        give_up(f"no GPU for the libraries in {folder}")
        raise
