"""The two files of a vision model, for what takes files: `Llava`, the server, several machines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from st3_edge import Llava

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


def top(llava: Llava, *messages: dict) -> dict[int, float]:
    """The largest logits after a prompt, by token."""
    trace = llava.create_chat_completion(messages, temperature=0, max_tokens=1, trace=True)["st3"]
    return dict(trace["first_logits_top"])


def check_same(got: dict[int, float], want: dict[int, float]) -> None:
    """Whether two of `top` are alike; the last two may be others where several are as large."""
    both = sorted(got.keys() & want.keys())
    assert len(both) >= len(want) - 2 > 0
    np.testing.assert_allclose([got[i] for i in both], [want[i] for i in both], rtol=1e-2, atol=2e-2)
