"""What is otherwise on Windows, as far as another system can tell: modules that Python lacks there, names of files."""

import subprocess
import sys
from pathlib import Path

import pytest

from st3_edge.native import libraries

ROOT = Path(__file__).parents[2]
LIKE_WINDOWS = """
import importlib.abc, os, pathlib, signal, subprocess, sys
import jinja2, numpy, PIL.Image  # as they are here

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("resource", "fcntl", "termios", "readline", "pwd", "grp"):
            raise ModuleNotFoundError(name)

for name in ("resource", "fcntl", "termios", "readline"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Gone())
sys.platform = "win32"
"""


def run(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIKE_WINDOWS + source], capture_output=True, text=True, timeout=60)


def test_it_needs_no_module_that_windows_lacks():
    # broken by an import of resource, which peak_memory needs elsewhere
    done = run(
        "import st3_edge, st3_edge.llava, st3_edge.native.machine, st3_edge.runtime.session, st3_edge.commands.ask"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("platform", "names"),
    [
        ("win32", ["st3-llama.dll", "mtmd.dll"]),
        ("darwin", ["libst3-llama.dylib", "libmtmd.dylib"]),
        ("linux", ["libst3-llama.so", "libmtmd.so"]),
    ],
)
def test_names_of_libraries(platform, names):
    # broken if one of these systems were asked for another's
    source = (
        f"sys.platform = {platform!r}\n"
        "from st3_edge.native import libraries\n"
        "print(libraries.path_of('llama').name, libraries.stock_path(pathlib.Path('.'), 'mtmd').name)"
    )
    assert run(source).stdout.split() == names


def test_programs_are_beside_their_libraries(tmp_path):
    # broken if llama-server.exe were looked for where it would not find its DLLs
    source = (
        f"os.environ['ST3_LIB_DIR'] = {str(tmp_path)!r}\n"
        "from st3_edge.commands.serve import command\n"
        "try: command.find('llama-server')\n"
        "except Exception as e: print(e)"
    )
    assert f"{tmp_path / 'llama-server.exe'} is missing" in run(source).stdout


def test_serving_ends_with_the_code_of_the_server():
    # broken by os.execv, which on Windows gives the terminal back while the program still runs
    source = (
        "from st3_edge.commands.serve import command\n"
        "os.execv = None\n"
        "command.become([sys.executable, '-c', 'print(12); raise SystemExit(7)'])"
    )
    done = run(source)
    assert (done.returncode, done.stdout.strip()) == (7, "12"), done.stderr


def test_giving_memory_back_is_harmless(monkeypatch):
    # broken by ctypes.CDLL(None), which is a TypeError there
    def refused(name):
        raise TypeError(name)

    monkeypatch.setattr(libraries.ctypes, "CDLL", refused)
    libraries.trim()
