"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from st3_edge.files.output import replacing


def write(target: Path, text: bytes = b"new") -> None:
    with replacing(target) as file:
        file.write(text)


def test_a_link_goes_on_leading_to_the_file(tmp_path: Path) -> None:
    """Breaks if the link itself were replaced: the file that it led to would stay as it was."""
    real = tmp_path / "elsewhere" / "real"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(real)
    write(link)
    assert link.is_symlink() and real.read_bytes() == b"new"
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    """Breaks if the name that a file has while it is written is longer than its own."""
    target = tmp_path / ("x" * 255)
    write(target)
    assert target.read_bytes() == b"new"


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if an error were told of a file that is there, whole: some file systems sync no folders."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(22, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
