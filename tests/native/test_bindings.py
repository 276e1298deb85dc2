"""The C interface in ctypes, which the build puts beside the libraries."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.no_device

WITHOUT = """
import importlib.abc, sys
from pathlib import Path

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("llama_cpp", "diskcache", "typing_extensions", "jinja2"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Gone())
from st3_edge.native import libraries
bindings = libraries.load()
for module in bindings:
    assert Path(module.__file__).parent == libraries.folder() / "bindings", module.__file__
print(bindings.lib.llama_context_default_params().offload_kqv, bindings.mtmd.mtmd_default_marker().decode())
"""


def test_no_other_package_is_needed():
    # broken if llama-cpp-python or what it needs had to be installed: a wheel brings all that it uses
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "<__media__>"]


def test_no_backend_is_loaded_from_the_current_folder(tmp_path):
    # broken as upstream is, which opens libggml-*.so of the current folder: a stranger's code
    source = tmp_path / "stranger.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) static void run(void) { puts("a stranger"); }\n'
    )
    library = tmp_path / "libggml-blas-stranger.so"
    subprocess.run([*os.environ.get("CC", "cc").split(), "-shared", "-fPIC", source, "-o", library], check=True)
    load = "from st3_edge.native import libraries; libraries.load().lib._lib.ggml_backend_load_all(); print('loaded')"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "loaded\n", done.stdout + done.stderr
