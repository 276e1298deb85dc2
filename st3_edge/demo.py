"""The embedded model: a small LLaVA trained from scratch on rendered scenes, its pictures and questions about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError

FOLDER = Path(__file__).resolve().parent / "data" / "demo"


@dataclass(frozen=True)
class Scene:
    """A shipped picture; `questions` are (question, right answer) pairs; `caption` describes all of it."""

    picture: Path
    questions: tuple[tuple[str, str], ...]
    caption: str


def model_paths() -> tuple[Path, Path]:
    """The text model and its mmproj. Raises ModelError where the package was installed without them."""
    found = [sorted(FOLDER.glob(pattern)) for pattern in ("st3-demo*.gguf", "mmproj-st3-demo*.gguf")]
    if not all(found):
        raise ModelError(f"the embedded model is not in {FOLDER}: install the package again")
    return found[0][0], found[1][0]


def scenes() -> list[Scene]:
    """The shipped pictures, in order. Raises ModelError where they are missing."""
    try:
        entries = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"the embedded pictures are not in {FOLDER}: install the package again") from e
    return [
        Scene(FOLDER / entry["picture"], tuple((q["q"], q["a"]) for q in entry["questions"]), entry["caption"])
        for entry in entries
    ]
