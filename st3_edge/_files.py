"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which has the name `target` only once all of it is on the disk: what was there before stays
    until then, and if writing fails. Raises OSError."""
    folder = target.parent
    part = folder / f".{target.name}.{secrets.token_hex(8)}.part"
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    # The rename itself is on the disk only when the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
