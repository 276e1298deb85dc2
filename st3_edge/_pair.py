"""Whether two GGUF files are the halves of a LLaVA: read from their headers, before anything is loaded."""

from __future__ import annotations

import math

from . import _gguf
from .errors import ModelError

# What upstream's LLaVA graph uses without asking whether it was in the file: it would crash.
_PATCHES, _POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
_TENSORS = (_PATCHES, _POSITIONS, "mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias")


def check_pair(model: str, mmproj: str) -> _gguf.Header:
    """Reads both headers and returns the text model's; raises ModelError where the two files are not a text model and
    a vision half, or hold values that upstream aborts the process for."""
    header = _gguf.read_header(model)
    if header.architecture == "clip":
        raise ModelError(f"model {model!r} is a vision half (mmproj); the text model belongs here")
    if header.metadata.get(f"{header.architecture}.block_count") == 0:
        raise ModelError(f"model {model!r} is damaged: it has no layers")
    other = _gguf.read_header(mmproj, "mmproj")
    if other.architecture != "clip":
        raise ModelError(f"mmproj {mmproj!r} is a text model; the vision half (mmproj) belongs here")
    if other.metadata.get("clip.projector_type") == "mlp":
        _check_llava(mmproj, other)
        _check_width(mmproj, header, other)
    return header


def _check_width(mmproj: str, text: _gguf.Header, vision: _gguf.Header) -> None:
    # A projector with layers behind mm.2 is another family's.
    width, projected = text.metadata.get(f"{text.architecture}.embedding_length"), vision.shapes["mm.2.weight"][1:]
    if isinstance(width, int) and projected != (width,) and not {"mm.3.weight", "mm.4.weight"} & vision.tensors.keys():
        raise ModelError(
            f"mmproj {mmproj!r} is of another model: its visual tokens are {' x '.join(map(str, projected))} wide, "
            f"those of the text model {width}"
        )


def _check_llava(mmproj: str, header: _gguf.Header) -> None:
    for tensor in _TENSORS:
        if tensor not in header.tensors:
            raise ModelError(f"mmproj {mmproj!r} lacks the tensor {tensor}: it is damaged, or no LLaVA's")

    def value(key: str) -> int:
        found = header.metadata.get(f"clip.vision.{key}")
        if not isinstance(found, int) or found < 1:
            raise ModelError(f"mmproj {mmproj!r} is damaged: its {key} is {found!r}")
        return found

    image, patch = value("image_size"), value("patch_size")
    embd, heads = value("embedding_length"), value("attention.head_count")
    rows = (image // patch) ** 2 + ("v.class_embd" in header.tensors)
    table = header.shapes[_POSITIONS]
    for fits, what in (
        (image >= patch, f"patch_size {patch} is larger than image_size {image}"),
        (embd % heads == 0, f"attention.head_count {heads} does not divide embedding_length {embd}"),
        (header.shapes[_PATCHES] == (patch, patch, 3, embd), f"{_PATCHES} is not of its patch_size {patch}"),
        (table[:1] == (embd,), f"{_POSITIONS} is not of its embedding_length {embd}"),
        (math.prod(table) >= rows * embd, f"{_POSITIONS} has not the {rows} rows of its image_size {image}"),
    ):
        if not fits:
            raise ModelError(f"mmproj {mmproj!r} is damaged: {what}")
