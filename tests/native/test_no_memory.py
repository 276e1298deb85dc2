"""What waits where memory runs out, at each allocation in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
from native_runtime import lib_dir

HERE = Path(__file__).parent


@pytest.mark.no_device
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is the dynamic linker's of Linux")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizers have an operator new")
def test_nothing_that_waits_is_lost(random_gguf, to_preload: Callable[[Path], Path]) -> None:
    """Breaks if a call that failed for want of memory added or lost rows, ended the process, or changed an answer."""
    library, model = to_preload(HERE / "no_memory.cpp"), random_gguf(cases.SHAPES["gqa-32"])
    done = subprocess.run(
        [sys.executable, HERE / "no_memory.py", str(lib_dir()), str(model), str(library)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    for way in found.values():
        assert way["same"] and max(way["failed"]) > 10
