"""llama-cpp-python in the same process, on an unpatched llama.cpp of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from st3_edge.native import libraries

QUESTION = "Describe the image."
SCRIPT = """
import json, os, sys
from pathlib import Path

def theirs():
    from llama_cpp import Llama
    return Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)

def ours():
    from st3_edge import Llava
    return Llava(*sys.argv[1:3], n_threads=1)

made = {name: globals()[name]() for name in os.environ["ORDER"].split()}
for _ in range(2):
    answers = {}
    if "ours" in made:
        answers["ours"] = made["ours"].ask(sys.argv[3], sys.argv[4], temperature=0, max_tokens=24)
        answers["mode"] = made["ours"].last_report.mode
    if "theirs" in made:
        answers["theirs"] = made["theirs"].create_completion("USER: Hello ASSISTANT:", temperature=0, max_tokens=24)
        answers["theirs"] = answers["theirs"]["choices"][0]["text"]
        import llama_cpp
        answers["patched"] = hasattr(llama_cpp.llama_cpp._lib, "st3_abi_version")
maps = Path("/proc/self/maps").read_text()
answers["loaded"] = sorted({line.split()[-1] for line in maps.splitlines() if "ggml-base" in line})
print(json.dumps(answers))
"""


def run(stock: str, order: str, files: tuple[str, str], picture: str) -> dict:
    environment = {**os.environ, "ORDER": order, "LLAMA_CPP_LIB_PATH": stock, "MTMD_CPP_LIB": stock}
    command = [sys.executable, "-c", SCRIPT, *files, picture, QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_each_runs_on_its_own_libraries(files, picture):
    # broken if one took the other's libraries: these have the names that upstream's had before it numbered them, so the
    # loader would, if ours had them too
    stock = os.environ.get("ST3_STOCK_LIB_DIR")
    if not stock:
        pytest.skip("ST3_STOCK_LIB_DIR is not set")
    alone = {**run(stock, "ours", files, picture), **run(stock, "theirs", files, picture)}
    bases = [str(libraries.stock_path(Path(stock).resolve(), "ggml-base")), str(libraries.path_of("ggml-base"))]
    for order in ("theirs ours", "ours theirs"):
        got = run(stock, order, files, picture)
        assert got["loaded"] == sorted(bases), order
        assert got == {**alone, "loaded": sorted(bases)}, order
    assert alone["mode"] == "pruned-prefill" and not alone["patched"]
