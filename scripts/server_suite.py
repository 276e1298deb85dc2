#!/usr/bin/env python3
"""llama.cpp's own tests of llama-server, on the embedded model: what passes on stock must pass on ours.

    python scripts/server_suite.py --stock build/stock/bin/llama-server           all of it, minutes
    python scripts/server_suite.py --stock build/stock/bin/llama-server --short   files that this model says most about

Runs the suite of the pinned archive on stock's server, on ours with ST3 off and on ours with ST3 on. A test's models,
which it would download, become the embedded one; so many fail on all three, and only differences count. Prints one JSON
object; exit code 1 where a test passes on stock and fails twice on ours. Needs the extra `server`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from st3_edge import demo  # noqa: E402
from st3_edge.commands.serve import command  # noqa: E402

SHORT = (
    "basic",
    "chat_completion",
    "completion",
    "ctx_shift",
    "slot_save",
    "stream",
    "tokenize",
    "security",
    "vision_api",
)
ST3 = ["--override-kv", "st3.preset=str:st3,st3.budget=float:0.3"]

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


def run(suite: Path, server: Path, more: list[str], only: list[str], timeout: int) -> dict[str, bool]:
    """Runs tests of the suite on a server; which of them passed."""
    model, mmproj = map(str, demo.model_paths())
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        shim, report = Path(folder) / "llama-server", Path(folder) / "report.xml"
        shim.write_text(
            SHIM.format(python=sys.executable, model=model, mmproj=mmproj, server=str(server.resolve()), more=more)
        )
        shim.chmod(0o755)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = ["-q", "-p", "no:cacheprovider", f"--timeout={timeout}", f"--junitxml={report}", *only]
        nowhere = {
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        env = {**os.environ, **nowhere, "LLAMA_SERVER_BIN_PATH": str(shim), "PORT": str(port), "LLAMA_CACHE": folder}
        with (Path(folder) / "log").open("w") as log:
            subprocess.run([sys.executable, "-m", "pytest", *words], cwd=suite, env=env, stdout=log, stderr=log)
        if not report.is_file():
            sys.exit(f"the suite did not run:\n{(Path(folder) / 'log').read_text()[-2000:]}")
        cases = ET.parse(report).iter("testcase")
        return {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": len(list(case)) == 0
            for case in cases
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", type=Path, required=True, help="llama-server of a build with -DST3_STOCK=ON")
    parser.add_argument("--ours", type=Path, help="ours (default: the package's)")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--timeout", type=int, default=120, help="seconds of a test, at most (default 120)")
    arguments = parser.parse_args()
    ours = arguments.ours or command.find("llama-server")
    sides = {"stock": (arguments.stock, []), "off": (ours, []), "st3": (ours, ST3)}
    found: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "llama.cpp"
        subprocess.run(
            [sys.executable, str(ROOT / "vendor" / "upstream.py"), "--dest", str(tree), "--stock"], check=True
        )
        suite = tree / "tools" / "server" / "tests"
        only = [f"unit/test_{name}.py" for name in SHORT] if arguments.short else ["unit"]
        for side, (server, more) in sides.items():
            found[side] = run(suite, server, more, only, arguments.timeout)
            print(f"{side}: {sum(found[side].values())} of {len(found[side])} pass", file=sys.stderr)
        lost = {}
        for side in ("off", "st3"):
            gone = sorted(name for name, ok in found["stock"].items() if ok and not found[side].get(name, False))
            # once more: some of these tests race against the clock
            again = run(suite, *sides[side], gone, arguments.timeout) if gone else {}
            lost[side] = [name for name in gone if not again.get(name, False)]
    print(
        json.dumps(
            {
                "tests": len(found["stock"]),
                "passed": {side: sum(results.values()) for side, results in found.items()},
                "passed_on_stock_only": lost,
            },
            indent=2,
        )
    )
    return 1 if lost["off"] or lost["st3"] else 0


if __name__ == "__main__":
    sys.exit(main())
