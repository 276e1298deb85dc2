"""The files that `st3-edge inspect` writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._files import check_output, replacing
from ..errors import OutputError, one_line

SUFFIXES = (".png", ".html")


def targets(output: str | None, sources: Sequence[str]) -> list[Path]:
    """The files that `output` means: itself, where it ends in one of SUFFIXES, else with both of them added. None:
    named as the first of the pictures, in the current folder."""
    if output is None:
        data_url = sources[0][:5].lower() == "data:"
        output = ("picture" if data_url else Path(sources[0]).stem) + "-st3"
    if output.lower().endswith(SUFFIXES):
        return [Path(output)]
    return [Path(output + suffix) for suffix in SUFFIXES]


def write(target: Path, data: bytes, inputs: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """Writes the file whole or not at all. Raises OutputError as `check_output` does, and where writing fails."""
    check_output(target, inputs, force=force)
    try:
        with replacing(target) as file:
            file.write(data)
    except OSError as e:
        raise OutputError(f"output {str(target)!r} cannot be written: {one_line(e.strerror or e)}") from e
