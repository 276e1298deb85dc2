"""Which of several GGUF files is meant: a model in the quantization asked for, and the mmproj that belongs to it.

By name alone, as people name them: `llava-v1.5-7b.Q4_K_M.gguf`, `ggml-model-q4_k.gguf`, `x-int4.gguf`,
`mmproj-model-f16.gguf`, `x-mmproj-f16.gguf`, `x.mmproj-Q8_0.gguf`, and the parts of a model in several files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import ModelError, St3Error

# As llama-gguf-split names the parts of a model; the loader finds the others beside the first.
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 1000
_HALF = re.compile(r"mmproj|mm-proj|mm_proj|projector|(?<![a-z])clip(?![a-z])", re.IGNORECASE)
_NO_MODEL = re.compile(r"imatrix|ggml-vocab", re.IGNORECASE)
_QUANT = re.compile(r"(?<![a-z0-9])((?:ud-)?i?q\d+(?:_[a-z0-9]+)*|bf16|f16|f32|fp16|int[48]|mxfp4)(?![a-z0-9])", re.I)
# Of a model, where nobody says which; the first is llama.cpp's own default.
_PREFERRED = ("Q4_K_M", "Q4_K", "Q4_K_S", "Q4_0", "int4", "Q5_K_M", "Q8_0")
_HALF_PREFERRED = ("f16", "fp16", "", "f32", "q8_0")


def parts(name: str) -> list[str]:
    """All files of the model that a file is of, in order. Raises ModelError for a number that no model has."""
    found = _PART.fullmatch(name)
    if not found:
        return [name]
    count = int(found["count"])
    if not 0 < count <= _MAX_PARTS:
        raise ModelError(f"{name!r} is one of {count} parts: no model has so many")
    return [f"{found['stem']}-{i:05}-of-{found['count']}.gguf" for i in range(1, count + 1)]


def files(model: str) -> list[str]:
    """The paths of all files of the model that a file is of, in order. Raises ModelError as `parts` does."""
    path = Path(model)
    return [str(path.parent / part) for part in parts(path.name)]


def halves(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The text models and the vision halves (mmproj) among files, by name; of a model in parts, the first one."""
    files = sorted({parts(name)[0] for name in names if name.lower().endswith(".gguf") and not _NO_MODEL.search(name)})
    vision = [name for name in files if _HALF.search(name.rpartition("/")[2])]
    return [name for name in files if name not in vision], vision


def quant_of(name: str) -> str:
    """The quantization that a file's name has in it; "" where there is none."""
    found = _QUANT.findall(name.rpartition("/")[2]) or _QUANT.findall(name)
    return str(found[-1]) if found else ""


def model(models: list[str], quant: str = "") -> str | None:
    """The text model in a quantization (Q4: any of Q4_*); without one what people mean by that. None: there is none."""
    for part in (quant,) if quant else _PREFERRED:
        exact = re.compile(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z0-9]|_[a-z0-9])", re.IGNORECASE)
        begins = re.compile(rf"(?<![a-z0-9]){re.escape(part)}", re.IGNORECASE)
        for way in (exact, begins) if quant else (exact,):
            if found := [name for name in models if way.search(name)]:
                return min(found, key=len)
    return None if quant or not models else models[0]


def half(model: str, vision: list[str]) -> list[str]:
    """The vision halves, the likeliest one of a model first: by the words that both names share, then by precision."""

    def order(name: str) -> tuple[int, int, str]:
        own, other = _words(model), _words(name)
        quant = quant_of(name).lower()
        rank = _HALF_PREFERRED.index(quant) if quant in _HALF_PREFERRED else len(_HALF_PREFERRED)
        return len(other - own) - len(other & own), rank, name

    return sorted(vision, key=order)


def _words(name: str) -> set[str]:
    bare = _HALF.sub(" ", _QUANT.sub(" ", name.rpartition("/")[2].lower().removesuffix(".gguf")))
    return {word for word in re.split(r"[^a-z0-9]+", bare) if word not in ("", "model", "ggml", "gguf", "of")}


def beside(model: str) -> str:
    """The path of the mmproj that lies in the folder of a model's file and fits it. Raises ModelError."""
    from .gguf import read_header
    from .pair import check_pair

    path = Path(model)
    try:
        path.stat()
        names = [other.name for other in path.parent.iterdir() if other.is_file()]
    except (OSError, ValueError) as e:
        raise ModelError(f"model {model!r} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    found = [str(path.parent / name) for name in half(path.name, halves(names)[1]) if name != path.name]
    if not found:
        if read_header(model).architecture == "clip":
            check_pair(model, model)  # says that it is a vision half
        raise ModelError(f"there is no mmproj (the vision half) beside model {model!r}: --mmproj names one")
    for other in found if len(found) > 1 else []:
        try:
            check_pair(model, other)
            return other
        except St3Error:
            continue
    return found[0]
