"""llama-server for Windows, under Wine, beside this system's: ST3_WINDOWS_DIR names the folder of llama-server.exe,
ST3_LIB_DIR libraries for the same instructions, as others round otherwise (scripts/windows.sh builds both)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from serving import Start, message, text

from st3_edge import demo

FOLDER = os.environ.get("ST3_WINDOWS_DIR")
PAIR = [str(path) for path in demo.model_paths()] if FOLDER else []
OPTIONS = ["-np", "1", "-c", "4096", "--override-kv", "st3.preset=str:st3,st3.vision_type=str:file"]

pytestmark = pytest.mark.skipif(not FOLDER or not shutil.which("wine"), reason="ST3_WINDOWS_DIR and Wine are not there")


def test_it_answers_and_keeps_as_here(start_server: Start, tmp_path: Path) -> None:
    # broken by a long of four bytes, a path with a drive, text mode of files, or threads that wait otherwise
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec wine "{FOLDER}/llama-server.exe" "$@"\n')
    program.chmod(0o755)
    files = ["-m", PAIR[0], "--mmproj", PAIR[1]]
    quiet = {"WINEPREFIX": os.environ.get("WINEPREFIX", str(tmp_path / "wine")), "WINEDEBUG": "-all"}
    there = start_server(*files, *OPTIONS, program=str(program), env=quiet)
    here = start_server(*files, *OPTIONS, program="llama-server")
    for scene in demo.scenes():
        for question in (scene.questions[0][0], "Describe the picture."):
            ours, theirs = (server.chat(message(question, scene.picture)) for server in (here, there))
            assert theirs["st3"]["mode"] == "pruned-prefill", theirs["st3"]["reason"]
            assert text(theirs) == text(ours), f"{scene.picture.name}: {question}"
            assert theirs["st3"]["layers"] == ours["st3"]["layers"]  # that read each visual token
