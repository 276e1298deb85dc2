"""The header of a GGUF file, read before llama.cpp sees it.

llama.cpp's readers differ in what they check (the vision reader takes a truncated file as it is), and what they say
goes to a log. So the kind of the file and its completeness are checked here, and said in one line.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelError, one_line

# Layout of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 10: "u64", 11: "i64",
    12: "f64",
}  # fmt: skip

# ggml type -> (elements of a block, bytes of a block)
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

# Beyond any real file; a damaged count must not make us read for minutes.
_MAX_COUNT = 2**20
_MAX_STRING = 2**26
_MAX_ARRAY = 2**24

_SHORT = 256  # numbers of an array that is read


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class Header:
    """`metadata`: the scalars and strings; `arrays`: of the arrays, the short ones of numbers; `kinds`: each value's
    type (u32, f32, string ...), in brackets an array's; `tensors`: the bytes of each, 0 of a type that is not known
    here; `shapes`: and how many elements along each dimension, the innermost first; `types`: and its ggml type;
    `need`: bytes that the file must have.

    `values`, `infos`, `data`: the bytes [begin, end) of each key with its value, in order, and of all tensors'
    descriptions, and where the tensors begin."""

    metadata: dict[str, int | float | bool | str]
    arrays: dict[str, tuple[float, ...]]
    kinds: dict[str, str]
    tensors: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    need: int
    values: dict[str, tuple[int, int]]
    infos: tuple[int, int]
    data: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def schedule(self) -> dict[str, int | float | bool | str]:
        """The `st3.*` keys that the file carries."""
        return {key: value for key, value in self.metadata.items() if key.startswith("st3.")}


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, n: int) -> bytes:
        data = self.file.read(n)
        if len(data) != n:
            raise _Damaged("it ends inside its header")
        return data

    def skip(self, n: int) -> None:
        if self.file.tell() + n > self.size:
            raise _Damaged("it ends inside its header")
        self.file.seek(n, os.SEEK_CUR)

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def count(self, limit: int, what: str) -> int:
        n = int(self.scalar("Q"))
        if n > limit:
            raise _Damaged(f"its header gives an impossible {what}")
        return n

    def string(self) -> str:
        return self.take(self.count(_MAX_STRING, "length of a string")).decode("utf-8", "replace")

    def value(self) -> tuple[str, int | float | bool | str | tuple[float, ...] | None]:
        """The name of a value's type, and a scalar or string, or a short array of numbers; None for another array,
        which is skipped."""
        kind = int(self.scalar("I"))
        if kind in _SCALARS:
            return _NAMES[kind], self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return _NAMES[kind], self.string()
        if kind != _ARRAY:
            raise _Damaged("its header holds a value of an unknown type")
        kind = int(self.scalar("I"))
        n = self.count(_MAX_ARRAY, "length of an array")
        if kind in _SCALARS:
            layout = f"<{n}{_SCALARS[kind]}"
            if n <= _SHORT:
                return f"[{_NAMES[kind]}]", struct.unpack(layout, self.take(struct.calcsize(layout)))
            self.skip(struct.calcsize(layout))
        elif kind == _STRING:
            for _ in range(n):
                self.skip(self.count(_MAX_STRING, "length of a string"))
        else:
            raise _Damaged("its header holds an array of an unknown type")
        return f"[{_NAMES[kind]}]", None


def read_header(path: str | os.PathLike[str], what: str = "model") -> Header:
    """Reads the header of the GGUF file at `path` and checks that the file holds all of its tensors.

    `what` names the file's role in messages. Raises ModelError where the file is missing, is no GGUF file, or is
    damaged or truncated.
    """
    name = f"{what} {str(path)!r}"
    try:
        status = Path(path).stat()
        # Checked before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{name} is not a file")
        size = status.st_size
        with Path(path).open("rb") as file:
            header = _parse(_Reader(file, size))
    except _Damaged as e:
        raise ModelError(f"{name} is damaged or truncated: {e}") from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{name} cannot be read: {one_line(getattr(e, 'strerror', None) or e)}") from e
    if size < header.need:
        raise ModelError(f"{name} is truncated: {size:,} of {header.need:,} bytes; copy or download it again")
    return header


def _parse(reader: _Reader) -> Header:
    magic = reader.file.read(4)
    if magic != b"GGUF":
        raise _Damaged("it is empty" if not magic else "it does not begin as a GGUF file does")
    version = int(reader.scalar("I"))
    if version not in (2, 3):
        raise _Damaged(f"GGUF version {version} is not known")
    n_tensors = reader.count(_MAX_COUNT, "number of tensors")
    n_values = reader.count(_MAX_COUNT, "number of values")

    metadata: dict[str, int | float | bool | str] = {}
    arrays: dict[str, tuple[float, ...]] = {}
    kinds: dict[str, str] = {}
    values: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        begin = reader.file.tell()
        key = reader.string()
        if key in values:
            raise _Damaged("its header gives a key twice")
        kinds[key], value = reader.value()
        values[key] = begin, reader.file.tell()
        if isinstance(value, tuple):
            arrays[key] = value
        elif value is not None:
            metadata[key] = value

    begin = reader.file.tell()
    end = 0
    tensors, shapes, types = {}, {}, {}
    for _ in range(n_tensors):
        name = reader.string()
        n_dims = int(reader.scalar("I"))
        if n_dims > 4:
            raise _Damaged("its header gives an impossible number of dimensions")
        shapes[name] = tuple(int(reader.scalar("Q")) for _ in range(n_dims))
        types[name] = kind = int(reader.scalar("I"))
        offset = int(reader.scalar("Q"))
        # Of a type that is newer than this table, only the beginning is checked.
        block, n_bytes = _BLOCKS.get(kind, (1, 0))
        tensors[name] = math.prod(shapes[name]) // block * n_bytes
        end = max(end, offset + tensors[name])

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise _Damaged("its header gives an impossible alignment")
    infos = begin, reader.file.tell()
    start = aligned(infos[1], alignment)
    need = start + end if n_tensors else 0
    return Header(metadata, arrays, kinds, tensors, shapes, types, need, values, infos, start)


def aligned(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment
