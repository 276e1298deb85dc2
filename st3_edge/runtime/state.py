"""A conversation in one file, checked in full before any of it is used.

magic      16 bytes
version    u32, little-endian as all that follows
length     u32: bytes of the header
header     JSON: the model it belongs to, tokens, images, spans, messages, and the sizes of what follows
state      what llama.cpp wrote of the sequence
embeddings float32, image after image
digest     SHA-256 of everything before it
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ModelError, StateError, one_line
from ..files.output import replacing
from ..native.st3 import Visual
from .conversation import Image, Record, Span, Unit, n_positions

MAGIC = b"st3-edge state\r\n"
VERSION = 1
NATIVE_VERSION = 3  # of llama.cpp's bytes, as long as the libraries read what older ones wrote

_FIXED = struct.Struct("<16sII")
_DIGEST = 32
_BLOCK = 2**24
_MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class Saved:
    """belongs_to: what the state is good for, name by name; record, native: what the sequence holds, and llama.cpp's
    bytes of it; embeddings: visual tokens of its images, as far as they are known; messages: the caller's, JSON."""

    belongs_to: Mapping[str, str]
    record: Record
    native: bytes
    embeddings: Mapping[Image, Visual] = field(default_factory=dict)
    messages: Any = None


def fingerprint(path: str) -> str:
    """Tells model files apart without reading all of a large one: its size, and 64 blocks of 64 KiB spread over it.
    Raises ModelError where it cannot be read."""
    blocks, size = 64, 2**16
    try:
        with Path(path).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(end).encode())
            for i in range(blocks):
                file.seek(max(0, end - size) * i // (blocks - 1))
                digest.update(file.read(size))
    except OSError as e:
        raise ModelError(f"model {path!r} cannot be read: {e.strerror or e}") from e
    return digest.hexdigest()


def check_replaceable(path: Path) -> None:
    """Raises StateError where `path` is there and is no saved conversation: a person meant another name."""
    try:
        if not path.exists():
            return
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(MAGIC)) == MAGIC:
                    return
    except (OSError, ValueError) as e:
        raise StateError(f"{str(path)!r} cannot be read: {one_line(getattr(e, 'strerror', None) or e)}") from e
    raise StateError(f"{str(path)!r} exists and is no saved conversation: give another name")


def write(path: str | os.PathLike[str], saved: Saved, check: Callable[[], None] = lambda: None) -> None:
    """Writes the file whole or not at all: what was there before stays until the new one is on the disk.

    `check`: called between blocks; what it raises ends the writing. Raises StateError where it cannot be written, or
    the messages are not JSON.
    """
    units = saved.record.units
    header = {
        "belongs_to": dict(saved.belongs_to),
        "units": [_plain(unit) if isinstance(unit, Image) else unit for unit in units],
        "spans": [[span.first, span.end] for span in saved.record.spans],
        "state": len(saved.native),
        "embeddings": [[*_plain(image), v.nx, v.ny, *v.embd.shape] for image, v in saved.embeddings.items()],
        "messages": saved.messages,
    }
    try:
        text = json.dumps(header).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise StateError(f"the messages cannot be saved, they are not JSON: {one_line(e)}") from e
    parts = [_FIXED.pack(MAGIC, VERSION, len(text)), text, saved.native]
    parts += [np.ascontiguousarray(v.embd, "<f4").tobytes() for v in saved.embeddings.values()]
    target = Path(path)
    try:
        digest = hashlib.sha256()
        with replacing(target) as file:
            for data in parts:
                for begin in range(0, len(data), _BLOCK):
                    check()
                    block = memoryview(data)[begin : begin + _BLOCK]
                    digest.update(block)
                    file.write(block)
            file.write(digest.digest())
    except (OSError, ValueError) as e:
        reason = one_line(getattr(e, "strerror", None) or e)
        raise StateError(f"the conversation cannot be written to {str(target)!r}: {reason}") from e


def read(path: str | os.PathLike[str], belongs_to: Mapping[str, str], *, n_vocab: int, n_embd: int) -> Saved:
    """Reads a file of `write`. Raises StateError for anything else: another model's, cut short, changed, foreign.

    `belongs_to` must be equal to the file's; token ids must be below n_vocab, embeddings n_embd wide.
    """
    name = f"state file {str(path)!r}"
    with _opened(path, name) as file:
        data = MAGIC + file.read()
    if len(data) < _FIXED.size + _DIGEST:
        raise StateError(f"{name} is cut short")
    _, version, length = _FIXED.unpack_from(data)
    if version != VERSION:
        raise StateError(f"{name} has version {version}, not {VERSION}: it was saved by another st3-edge")
    body = memoryview(data)[:-_DIGEST]
    if hashlib.sha256(body).digest() != data[-_DIGEST:]:
        raise StateError(f"{name} is damaged or cut short: its checksum is wrong")
    try:
        header = json.loads(bytes(body[_FIXED.size : _FIXED.size + length]))
        theirs = {str(k): str(v) for k, v in header["belongs_to"].items()}
        other = [k for k in {**belongs_to, **theirs} if theirs.get(k) != belongs_to.get(k)]
        if other:
            raise StateError(f"{name} was saved with another {', '.join(other)}")
        return _parse(header, body[_FIXED.size + length :], theirs, n_vocab, n_embd)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as e:
        # The checksum is right: somebody made it so.
        raise StateError(f"{name} is no saved conversation: {one_line(e) or type(e).__name__}") from e


def check_saved(path: str | os.PathLike[str]) -> None:
    """Raises StateError where no file at `path` begins as a saved conversation: for use before a slow model load."""
    with _opened(path, f"state file {str(path)!r}"):
        pass


@contextmanager
def _opened(path: str | os.PathLike[str], name: str) -> Iterator[BinaryIO]:
    """The file of a saved conversation, behind its magic."""
    try:
        # Checked before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise StateError(f"{name} is not a file")
        with Path(path).open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise StateError(f"{name} does not begin as a saved conversation")
            yield file
    except (OSError, ValueError) as e:
        raise StateError(f"{name} cannot be read: {one_line(getattr(e, 'strerror', None) or e)}") from e


def _parse(header: Any, rest: memoryview, belongs_to: Mapping[str, str], n_vocab: int, n_embd: int) -> Saved:
    units: list[Unit] = [
        _image(unit) if isinstance(unit, list) else _whole(unit, 0, n_vocab - 1) for unit in header["units"]
    ]
    spans = [Span(_whole(first, 0), _whole(end, 0, len(units))) for first, end in header["spans"]]
    if not all(span.first < span.end and isinstance(units[span.first], Image) for span in spans):
        raise ValueError("a span is no prefill of images")
    size = _whole(header["state"], 0, len(rest))
    native, rest = bytes(rest[:size]), rest[size:]
    embeddings = {}
    for *plain, nx, ny, n, width in header["embeddings"]:
        image, size = _image(plain), 4 * _whole(n, 1, len(rest)) * _whole(width, n_embd, n_embd)
        if n != image.n or ((nx, ny) != (0, 0) and _whole(nx, 1) * _whole(ny, 1) != n) or size > len(rest):
            raise ValueError("embeddings are not of their image's size")
        embd = np.frombuffer(rest[:size], "<f4").reshape(n, width).astype(np.float32)
        embeddings[image], rest = Visual(embd, nx, ny), rest[size:]
    if len(rest):
        raise ValueError(f"{len(rest)} bytes too many")
    record = Record(tuple(units), tuple(spans), n_positions(units))
    return Saved(belongs_to, record, native, embeddings, header["messages"])


def _plain(image: Image) -> list[Any]:
    return [image.digest, image.part, image.n, *(() if image.n_pos is None else (image.n_pos,))]


def _image(plain: Sequence[Any]) -> Image:
    digest, part, n, *more = plain
    if not isinstance(digest, str):
        raise TypeError("an image's digest is not text")
    return Image(digest, _whole(part, 0), _whole(n, 1), *(_whole(n_pos, 1) for n_pos in more))


def _whole(value: Any, low: int, high: int = _MAX_POSITIONS) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
    return value
