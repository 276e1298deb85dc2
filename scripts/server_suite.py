"""llama.cpp's own tests of llama-server, on the embedded model: what passes on stock must pass on ours.

python scripts/server_suite.py                                        what stock passes, on ours: two minutes
python scripts/server_suite.py --stock build/stock/bin/llama-server   all of it on stock first, recorded

Runs the suite of the pinned archive on our server with ST3 off and on. A test's model, which it would download, becomes
the embedded one; many ask for what only their own model says, and fail on stock as well. Those that pass there are in
tests/server/upstream_suite.txt. Prints one JSON object; exit code 1 where one of them fails twice on ours. Needs the
extra `server`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "server")]

import measuring  # noqa: E402
from serving import free_port  # noqa: E402

from st3_edge import demo  # noqa: E402
from st3_edge.commands.serve import command  # noqa: E402

PASSING = ROOT / "tests" / "server" / "upstream_suite.txt"
LEFT_OUT = ("tool_call", "template", "lora", "speculative", "infill")  # nothing in them passes without their own models
SIDES = {"off": [], "st3": ["--override-kv", "st3.preset=str:st3,st3.budget=float:0.3"]}  # options of our server

# Stands in for llama-server: takes the models of the tests out of its words, and puts the embedded one in.
SHIM = """#!{python}
import os, sys
words, out = iter(sys.argv[1:]), []
named = False
for word in words:
    if word in ("--hf-repo", "--hf-file", "--model", "--model-url", "--mmproj-url", "--model-draft"):
        named |= word != "--hf-file"
        next(words)
    elif word != "--offline":
        out.append(word)
if named:
    out += ["--model", {model!r}]
    out += [] if "--no-mmproj" in out or "--embedding" in out else ["--mmproj", {mmproj!r}]
out += ["--threads", "1", *{more!r}]
os.execv({server!r}, [{server!r}, *out])
"""


def run(suite: Path, server: Path, more: list[str], only: list[str], timeout: int = 60) -> dict[str, bool]:
    """Runs tests of the suite on a server; which of them passed."""
    model, mmproj = map(str, demo.model_paths())
    (suite / "tmp").mkdir(exist_ok=True)  # where they would download to, and put files of their own
    with tempfile.TemporaryDirectory() as folder:
        shim, report = Path(folder) / "llama-server", Path(folder) / "report.xml"
        shim.write_text(
            SHIM.format(python=sys.executable, model=model, mmproj=mmproj, server=str(server.resolve()), more=more)
        )
        shim.chmod(0o755)
        (Path(folder) / "wget.py").touch()  # the suite imports it, and nothing is to be downloaded
        words = ["-q", "-p", "no:cacheprovider", f"--timeout={timeout}", f"--junitxml={report}", *only]
        nowhere = {
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        env = {
            **os.environ,
            **nowhere,
            "LLAMA_SERVER_BIN_PATH": str(shim),
            "PORT": str(free_port()),
            "LLAMA_CACHE": folder,
        }
        env["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        with (Path(folder) / "log").open("w") as log:
            subprocess.run([sys.executable, "-m", "pytest", *words], cwd=suite, env=env, stdout=log, stderr=log)
        if not report.is_file():
            raise SystemExit(f"the suite did not run:\n{(Path(folder) / 'log').read_text()[-2000:]}")
        cases = ET.parse(report).iter("testcase")
        return {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": len(list(case)) == 0
            for case in cases
        }


@contextlib.contextmanager
def unpacked() -> Iterator[Path]:
    """The suite's folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "llama.cpp"
        subprocess.run(
            [sys.executable, str(ROOT / "vendor" / "upstream.py"), "--dest", str(tree), "--stock"], check=True
        )
        yield tree / "tools" / "server" / "tests"


def twice(suite: Path, server: Path, more: list[str], tests: list[str]) -> list[str]:
    """Those of the tests that fail, and fail again: some race against the clock."""
    failed = tests
    for _ in range(2):
        passed = run(suite, server, more, failed) if failed else {}
        failed = [name for name in failed if not passed.get(name, False)]
    return failed


def lost(suite: Path, server: Path, side: str) -> list[str]:
    """Of the tests that pass on stock, those that do not on ours."""
    return twice(suite, server, SIDES[side], PASSING.read_text().splitlines())


def record(suite: Path, server: Path) -> None:
    """Writes down what passes on stock, and passes again."""
    names = sorted(path.stem.removeprefix("test_") for path in (suite / "unit").glob("test_*.py"))
    results = run(suite, server, [], [f"unit/test_{name}.py" for name in names if name not in LEFT_OUT])
    passed = [name for name, ok in results.items() if ok]
    if not passed:  # and the list stays
        raise SystemExit(f"nothing passes on {server}")
    again = run(suite, server, [], passed)
    measuring.write_text(PASSING, "".join(f"{name}\n" for name in sorted(passed) if again.get(name, False)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", type=Path, help="llama-server of a build with -DST3_STOCK=ON")
    parser.add_argument("--ours", type=Path, help="ours (default: the package's)")
    args = parser.parse_args()
    ours = args.ours or command.find("llama-server")
    if missing := [str(path) for path in (ours, args.stock) if path and not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    with unpacked() as suite:
        if args.stock:
            record(suite, args.stock)
        gone = {side: lost(suite, ours, side) for side in SIDES}
    print(json.dumps({"pass_on_stock": len(PASSING.read_text().splitlines()), "lost": gone}, indent=2))
    return 1 if any(gone.values()) else 0


if __name__ == "__main__":
    measuring.run(main)
