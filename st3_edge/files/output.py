"""Files that are whole or not there, and never in the place of another unasked."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError, one_line

PART = "." + "[0-9a-f]" * 16 + ".part"  # what `replacing` calls a file until it is whole


def check_output(target: Path, inputs: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """Whether `target` can be written; to be asked before what takes long, too. `inputs`: files that are read.

    Raises OutputError where it is one of them, exists (without `force`), or is no place for a file.
    """
    name = f"output {str(target)!r}"
    try:
        if target.exists():
            if any(Path(path).exists() and target.samefile(path) for path in inputs):
                raise OutputError(f"{name} is one of the files to read: give another name")
            if not target.is_file():
                raise OutputError(f"{name} is not a file")
            if not force:
                raise OutputError(f"{name} exists (--force replaces it)")
        if not target.parent.is_dir():
            raise OutputError(f"{name}: there is no folder {str(target.parent)!r}")
        if not os.access(target.parent, os.W_OK):
            raise OutputError(f"{name}: the folder {str(target.parent)!r} cannot be written to")
    except (OSError, ValueError) as e:
        raise OutputError(f"{name} cannot be written: {one_line(getattr(e, 'strerror', None) or e)}") from e


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    import platformdirs

    return platformdirs.user_cache_path("st3-edge", appauthor=False)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which has the name `target` only once all of it is on the disk: what was there before stays
    until then, and if writing fails; who may read it stays too, and a link goes on leading to it. Raises OSError."""
    target = Path(os.path.realpath(target))
    folder = target.parent
    part = folder / f".{secrets.token_hex(8)}.part"  # as short for any name: one may be as long as names can be
    try:
        with part.open("xb") as file:
            if target.exists():
                shutil.copymode(target, part)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if sys.platform == "win32":  # opens no folder
        return
    # The rename itself is on the disk only when the folder is; the file is there, whether or not that can be had.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
