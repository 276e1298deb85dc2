"""Encoded pictures on the disk, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

from st3_edge import demo
from st3_edge.files import gguf_copy


def asked(command, folder: Path, monkeypatch, environment, picture: str, *options: str) -> dict:
    monkeypatch.setitem(environment, "XDG_CACHE_HOME", str(folder))
    done = command("ask", picture, "What is there?", "--threads", "1", "--max-tokens", "8", "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_picture_is_encoded_once(command, monkeypatch, environment, tmp_path: Path, picture: str) -> None:
    """Breaks if the next process encodes a known picture again, or takes an encoding of other bits."""

    def ask(*options: str) -> dict:
        return asked(command, tmp_path, monkeypatch, environment, picture, *options)

    folder = tmp_path / "st3-edge" / "pictures"
    first = ask("--no-cache")
    assert not folder.exists()
    second, third = ask(), ask()
    assert first["ms"]["encode"] > 0 and second["ms"]["encode"] > 0 and third["ms"]["encode"] == 0
    assert first["answer"] == second["answer"] == third["answer"]
    assert len(list(folder.iterdir())) == 1
    assert ask("--preset", "off")["ms"]["encode"] > 0  # stock's bits
    assert ask("--vision-type", "file")["ms"]["encode"] > 0
    assert ask("--no-cache")["ms"]["encode"] > 0
    assert len(list(folder.iterdir())) == 3


def test_the_model_files_own_keys_count(command, monkeypatch, environment, tmp_path: Path, picture: str) -> None:
    """Breaks if a file that switches ST3 off, or our kernels, got the bits of one that does not."""
    model, mmproj = demo.model_paths()
    for keys in ({"st3.preset": "st3"}, {"st3.preset": "off"}, {"st3.preset": "st3", "st3.vision_type": "file"}):
        target = tmp_path / "carries.gguf"
        gguf_copy.copy(model, target, keys, force=True)
        files = ("-m", str(target), "--mmproj", str(mmproj))
        assert asked(command, tmp_path, monkeypatch, environment, picture, *files)["ms"]["encode"] > 0
