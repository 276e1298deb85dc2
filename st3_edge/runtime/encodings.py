"""Encoded pictures on the disk, so that a picture is encoded once, whatever process asks about it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np

from ..files.output import PART, replacing
from ..native.st3 import Visual
from .conversation import Image

_DIGITS = 64  # of SHA-256
_SUFFIX = ".st3.npz"  # in a folder that is given, other programs' files may lie
_ABANDONED_S = 3600.0  # no picture takes so long to write


class Encodings:
    """Visual tokens of one vision encoder, a file for each image, which this user alone can read.

    `of`: all that decides what the encoder makes of a picture. When the files of this kind in the folder, other
    encoders' too, take more than `max_bytes`, those used longest ago are removed; no others are. A folder that is not
    there is made for this user alone. Nothing here raises: what cannot be read or written is encoded anew.
    """

    def __init__(self, folder: str | os.PathLike[str], of: str, n_embd: int, max_bytes: int) -> None:
        self._folder, self._of, self._n_embd, self._max_bytes = Path(folder), of, n_embd, max_bytes

    def get(self, image: Image) -> Visual | None:
        path = self._path(image)
        try:
            with np.load(path, allow_pickle=False) as held:  # checks each array's checksum
                embd, (nx, ny) = held["embd"], held["grid"].tolist()
            path.touch()  # used now
        except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile):
            return None
        fits = embd.shape == (image.n, self._n_embd) and embd.dtype == np.float32
        return Visual(embd, nx, ny) if fits else None

    def put(self, image: Image, visual: Visual) -> None:
        if visual.embd.nbytes > self._max_bytes:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self._path(image)) as file:
                Path(file.name).chmod(0o600)
                np.savez(file, embd=visual.embd, grid=np.array([visual.nx, visual.ny]))
            self._trim()

    def _path(self, image: Image) -> Path:
        key = json.dumps([self._of, image.digest, image.part, image.n])
        return self._folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)

    def _trim(self) -> None:
        found = []
        for part in self._folder.glob(PART):  # what a process left that ended as it wrote
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()
        for path in self._folder.glob("[0-9a-f]" * _DIGITS + _SUFFIX):
            with contextlib.suppress(OSError):  # another process may have removed it
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        n_bytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if n_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            n_bytes -= size
