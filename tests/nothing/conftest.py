"""What several of these tests share."""

import io
import sys
from pathlib import Path

import pytest

from st3_edge.commands.chat import lines
from st3_edge.commands.chat.command import Chat

sys.path.insert(0, str(Path(__file__).parent))
from chatting import Console, Typed


@pytest.fixture
def talk(monkeypatch):
    """talk(model, *lines, pictures=[], terminal=False): the console after these lines, the last of which ends the
    input."""

    def run(model, *words, pictures=(), terminal=False) -> Console:
        console = Console()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in words)))
        if terminal:
            monkeypatch.setattr(lines, "source", lambda *_: Typed())
        code = Chat(console, model, list(pictures), {"max_tokens": 9}).loop()
        assert code == (not terminal and "st3-edge: error: " in console.err)
        return console

    return run
