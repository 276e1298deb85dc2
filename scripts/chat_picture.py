"""Draws docs/img/chat.svg and kept.svg: a conversation with the embedded model, as a terminal showed it. Needs tmux.

python scripts/chat_picture.py
"""

from __future__ import annotations

import base64
import html
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from st3_edge import demo  # noqa: E402

COLUMNS, SOCKET, SESSION = 76, "st3-edge-picture", "chat"
LINES = ("scene.png Describe the image.", "What digit is in the red diamond?", "/report", "/kept")
CHARACTER, LINE, MARGIN, SIDE = 8.4, 18, 16, 200


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", "-L", SOCKET, *words], capture_output=True, text=True, check=True).stdout


def settled() -> str:
    """What is on the screen when it has not changed for a second."""
    before = None
    for _ in range(100):
        time.sleep(1)
        now = tmux("capture-pane", "-t", SESSION, "-p", "-S", "-").rstrip()
        if now == before:
            return now
        before = now
    raise SystemExit("the chat does not come to rest")


def conversation(picture: Path, folder: Path) -> str:
    (folder / "scene.png").write_bytes(picture.read_bytes())
    environment = {"PYTHONPATH": str(ROOT), "ST3_NO_HISTORY": "1", "ST3_CONFIG": os.devnull, "PS1": "$ "}
    words = ["env", *(f"{k}={v}" for k, v in environment.items()), "ST3_MODEL=", "bash", "--norc"]
    tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", "60", "-c", str(folder), shlex.join(words))
    try:
        time.sleep(1)
        command = f'st3-edge() {{ {shlex.quote(sys.executable)} -m st3_edge "$@"; }}; clear'
        for line in (command, "st3-edge chat", *LINES):
            tmux("send-keys", "-t", SESSION, "-l", line)
            tmux("send-keys", "-t", SESSION, "Enter")
            shown = settled()
        return shown
    finally:
        tmux("kill-session", "-t", SESSION)


def svg(text: str, picture: Path) -> str:
    """The text, and the picture beside it. Lengths are given, so that any font keeps the columns."""
    lines = text.splitlines()
    width, height = COLUMNS * CHARACTER + SIDE + 3 * MARGIN, max(len(lines) * LINE, SIDE) + 2 * MARGIN
    data = base64.b64encode(picture.read_bytes()).decode()
    rows = []
    for i, line in enumerate(lines):
        typed = ' fill="#fff"' if line.startswith(("> ", "$ ")) else ""
        size = f'y="{MARGIN + (i + 0.8) * LINE:.1f}" textLength="{len(line) * CHARACTER:.1f}"{typed}'
        if line:
            rows.append(f'<text x="{MARGIN}" {size} lengthAdjust="spacingAndGlyphs">{html.escape(line)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#1c1f24"/>\n'
        f'<g font-family="ui-monospace,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" font-size="14" fill="#c8ccd2" '
        f'xml:space="preserve">\n{chr(10).join(rows)}\n</g>\n'
        f'<image x="{width - SIDE - MARGIN:.0f}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" '
        f'href="data:image/png;base64,{data}"/>\n'
        "</svg>\n"
    )


def main() -> None:
    if not shutil.which("tmux"):
        raise SystemExit("no tmux found, the terminal that is drawn")
    picture = demo.scenes()[0].picture
    with tempfile.TemporaryDirectory() as folder:
        text = conversation(picture, Path(folder))
    talk, map_of = text.split("> /kept\n")
    for name, shown in (("chat", talk.rstrip()), ("kept", "> /kept\n" + map_of.removesuffix("\n>"))):
        (ROOT / "docs" / "img" / f"{name}.svg").write_text(svg(shown, picture), encoding="utf-8")


if __name__ == "__main__":
    main()
