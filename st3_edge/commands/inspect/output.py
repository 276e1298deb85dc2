"""The files that `st3-edge inspect` writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import OutputError, one_line
from ...files.output import check_output, replacing
from ...prompts.images import file_of

SUFFIXES = (".png", ".html")
_OTHERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".svg", ".pdf", ".htm")


def targets(output: str | None, sources: Sequence[str]) -> list[Path]:
    """The files that `output` means: itself, where it ends in one of SUFFIXES, else with both of them added. In a
    folder, or with None in the current one: named as the first of the pictures. Raises OutputError for no name, and
    for a picture of another kind."""
    if output == "":
        raise OutputError("output '' is no name of a file")
    if output is None or output.endswith(os.sep) or Path(output).is_dir():
        file = file_of(sources[0])
        name = f"{file.stem if file else 'picture'}-st3"
        return [Path(output or "", name + suffix) for suffix in SUFFIXES]
    suffix = Path(output).suffix.lower()
    if suffix in _OTHERS:
        raise OutputError(f"output {output!r}: a picture is written as {SUFFIXES[0]}, a page as {SUFFIXES[1]}")
    return [Path(output)] if suffix in SUFFIXES else [Path(output + suffix) for suffix in SUFFIXES]


def write(target: Path, data: bytes, inputs: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """Writes the file whole or not at all. Raises OutputError as `check_output` does, and where writing fails."""
    check_output(target, inputs, force=force)
    try:
        with replacing(target) as file:
            file.write(data)
    except OSError as e:
        raise OutputError(f"output {str(target)!r} cannot be written: {one_line(e.strerror or e)}") from e
