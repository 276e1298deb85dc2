"""A model file with other metadata, as a new file: tensors, and values that stay, are copied byte for byte."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from ..config import Override
from ..errors import ModelError, OutputError, one_line
from .gguf import Header, aligned, read_header
from .output import check_output, replacing

_BLOCK = 2**24
_COUNTS = struct.Struct("<4sIQQ")  # magic, version, tensors, values


def check(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool) -> Header:
    """Whether `copy` can write `target`; to be asked before what takes long, too. Returns the header of `source`.

    Raises ModelError where the source cannot be read or is one of a model's several files, OutputError where the target
    is the source, exists (without `force`), or is no place for a file of that size.
    """
    header = read_header(source)
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"model {str(source)!r} is one of {parts} files: merge them first (llama-gguf-split --merge)")
    check_output(Path(target), [source], force=force)
    need, free = Path(source).stat().st_size + _BLOCK, shutil.disk_usage(Path(target).parent).free
    if free < need:
        raise OutputError(f"output {str(target)!r} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    return header


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    changes: Mapping[str, Override],
    *,
    force: bool,
    tell: Callable[[float], None] = lambda share: None,
) -> None:
    """Writes the GGUF file `source` to `target` with the values in `changes` in place of its own.

    Text becomes a string, a whole number a u32, a real one an f64. What exists is replaced with `force` only, and only
    once the new file is whole. `tell` hears what share of the source was copied, 0 to 1, now and then; where it raises,
    nothing is written. Raises ModelError or OutputError, as `check` does and where writing fails.
    """
    header = check(source, target, force=force)
    alignment = int(header.metadata.get("general.alignment", 32))
    try:
        with Path(source).open("rb") as old, replacing(Path(target)) as new:
            magic, version, n_tensors, _ = _COUNTS.unpack(old.read(_COUNTS.size))
            kept = [span for key, span in header.values.items() if key not in changes]
            new.write(_COUNTS.pack(magic, version, n_tensors, len(kept) + len(changes)))
            for begin, end in kept:
                old.seek(begin)
                new.write(old.read(end - begin))
            for key, value in changes.items():
                new.write(_text(key) + _value(value))
            begin, end = header.infos
            old.seek(begin)
            new.write(old.read(end - begin))
            new.write(bytes(aligned(new.tell(), alignment) - new.tell()))
            old.seek(header.data)
            size = Path(source).stat().st_size
            while block := old.read(_BLOCK):
                tell(old.tell() / size)
                new.write(block)
    except OSError as e:
        raise OutputError(f"output {str(target)!r} cannot be written: {one_line(e.strerror or e)}") from e


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Override) -> bytes:
    """Its type's id and itself: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<Id", 12, value)
