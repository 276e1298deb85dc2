"""The two files of a vision model, for what takes files: `Llava`, the server, several machines."""

from __future__ import annotations

from pathlib import Path

from . import media, minicpm, others, pixtral, recipes, whole
from .convert import Converter

MEDIA = {**media.MEDIA, **pixtral.MEDIA, **minicpm.MEDIA, **whole.MEDIA_OF_WHOLE}
TEXT = {**recipes.TEXT, **whole.WHOLE, **others.OTHERS}
NOT_PRUNED = {f"llava-{text}": media.of_llava(text) for text in others.OTHERS}


def write_pair(name: str, folder: Path, converter: Converter) -> tuple[Path, Path]:
    """Writes the text model and the mmproj of one of MEDIA or NOT_PRUNED; returns their paths."""
    m = {**MEDIA, **NOT_PRUNED}[name]
    recipe = TEXT[m.text].with_markers(m.markers)
    lm = recipe.make()
    recipe.save(lm, folder / "text")
    m.write(m.make(lm), folder / "vision", folder / f"mmproj-{name}.gguf", converter)
    return converter(folder / "text", folder / f"{name}.gguf"), folder / f"mmproj-{name}.gguf"
