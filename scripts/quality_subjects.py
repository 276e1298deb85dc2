"""Whom scripts/quality.py asks: pairs of model files, with pictures whose contents are known and questions about them.

`Embedded` is the package's own demo model, `Smol` a pretrained SmolLM2 that learned to see (scripts/smol_llava).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from st3_edge import demo

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path += [str(SCRIPTS / "embedded_model"), str(SCRIPTS / "smol_llava")]
import questions  # noqa: E402
import scenes  # noqa: E402


class Fact(Protocol):
    """A question with one right short answer, and its kind."""

    kind: str
    text: str
    answer: str


class Subject(Protocol):
    """A model and its pictures. Scenes are numbered; a style is a way to draw them."""

    title: str
    layers: int
    described: int  # of five scenes, for how many a description is asked
    styles: tuple[str, ...]
    kinds: tuple[str, ...]  # of facts
    compared: tuple[str, ...]  # kinds that are compared apart
    captions: tuple[str, ...]  # wordings that ask for a description
    before: str  # the prompt up to the image, without BOS

    @property
    def files(self) -> tuple[Path, Path]:
        """Text model and mmproj."""

    @property
    def drawn_by(self) -> list[Path]:
        """The files that say how scenes look."""

    @property
    def asked_by(self) -> list[Path]:
        """The files that say what is asked, and what is right."""

    def after(self, question: str) -> str:
        """The prompt from the image on."""

    def again(self, question: str) -> str:
        """What a later question adds behind an answer and its end token."""

    def image(self, style: str, i: int) -> np.ndarray:
        """Scene i, uint8 [height, width, 3]."""

    def facts(self, style: str, i: int) -> list[Fact]:
        """What scene i is asked, each question on its own."""

    def all_facts(self, style: str, i: int) -> list[Fact]:
        """What it may be asked besides."""

    def looked_for(self, style: str, i: int) -> list[tuple[Fact, np.ndarray]]:
        """Questions about things that are there, and the patches of these things, bool [24, 24]."""

    def pair(self, style: str, i: int) -> tuple[Fact, Fact] | None:
        """Two questions of one conversation about scene i, if it has such."""

    def right(self, said: str, answer: str) -> bool:
        """Whether an answer is the right one."""

    def objects(self, said: str, style: str, i: int) -> tuple[int, int, int]:
        """What a description of scene i names right, what it names, and what there is."""


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embedded model: drawn shapes and glyphs (scripts/embedded_model)."""

    model: Path = dataclasses.field(default_factory=lambda: demo.model_paths()[0])
    mmproj: Path = dataclasses.field(default_factory=lambda: demo.model_paths()[1])

    title: ClassVar[str] = "embedded model"
    layers: ClassVar[int] = 16
    described: ClassVar[int] = 1
    styles: ClassVar[tuple[str, ...]] = tuple(scenes.STYLES)
    kinds: ClassVar[tuple[str, ...]] = questions.KINDS
    compared: ClassVar[tuple[str, ...]] = ("count",)
    captions: ClassVar[tuple[str, ...]] = questions.CAPTION_WORDS
    before: ClassVar[str] = "USER: "

    @property
    def files(self) -> tuple[Path, Path]:
        return self.model, self.mmproj

    @property
    def drawn_by(self) -> list[Path]:
        return [SCRIPTS / "embedded_model" / f"{name}.py" for name in ("things", "drawing", "scenes")]

    @property
    def asked_by(self) -> list[Path]:
        return [SCRIPTS / "embedded_model" / "questions.py"]

    def after(self, question: str) -> str:
        return f"\n{question} ASSISTANT:"

    def again(self, question: str) -> str:
        return f"USER: {question} ASSISTANT:"

    def image(self, style: str, i: int) -> np.ndarray:
        return np.asarray(scenes.scene(i, style=style).image)

    def facts(self, style: str, i: int) -> list[Fact]:
        asked = self.all_facts(style, i)
        return [asked[i % len(asked)]]

    def all_facts(self, style: str, i: int) -> list[Fact]:
        return questions.held_out_questions(i, style)

    def looked_for(self, style: str, i: int) -> list[tuple[Fact, np.ndarray]]:
        s = scenes.scene(i, style=style)
        at = scenes.patch_things(s)
        asked = questions.held_out_questions(i, style)
        return [(q, np.isin(at, [1 + s.things.index(t) for t in q.about])) for q in asked if q.about]

    def pair(self, style: str, i: int) -> tuple[Fact, Fact] | None:
        return questions.held_out_pair(i, style)

    def right(self, said: str, answer: str) -> bool:
        return questions.answer_right(said, answer)

    def objects(self, said: str, style: str, i: int) -> tuple[int, int, int]:
        return questions.caption_objects(said, scenes.scene(i, style=style))


GROUPS = {
    "names": ("what",),
    "places": ("where", "relation"),
    "words": ("read", "price", "cell"),
    "count": ("count",),
    "others": ("color", "presence", "size"),
}


@dataclasses.dataclass(frozen=True)
class Smol:
    """SmolLM2 that sees: emoji by name, words and numbers in print. `state` is the folder of scripts/smol_llava."""

    model: Path
    mmproj: Path
    state: Path

    title: ClassVar[str] = "SmolLM2 that sees"
    layers: ClassVar[int] = 30
    described: ClassVar[int] = 3
    styles: ClassVar[tuple[str, ...]] = ("known", "other")
    kinds: ClassVar[tuple[str, ...]] = tuple(GROUPS)
    compared: ClassVar[tuple[str, ...]] = ("count", "words", "places", "names")
    captions: ClassVar[tuple[str, ...]] = ("Describe the image.", "Describe the picture.", "Tell me what you see.")

    @property
    def files(self) -> tuple[Path, Path]:
        return self.model, self.mmproj

    @property
    def drawn_by(self) -> list[Path]:
        return [SCRIPTS / "smol_llava" / f"{name}.py" for name in ("assets", "layouts", "pictures")]

    @property
    def asked_by(self) -> list[Path]:
        return [SCRIPTS / "smol_llava" / f"{name}.py" for name in ("smol", "talk")]

    @functools.cached_property
    def assets(self):
        """Emoji, typefaces, words and photographs."""
        import assets

        return assets.load(self.state)

    @property
    def before(self) -> str:
        import smol

        return smol.BEFORE_IMAGE

    def after(self, question: str) -> str:
        import smol

        return "\n" + smol.turn(question)

    def again(self, question: str) -> str:
        import smol

        return smol.next_turn(question)

    @functools.lru_cache(maxsize=64)  # noqa: B019  (there is one, as long as the process)
    def scene(self, style: str, i: int):
        """Scene i."""
        import pictures

        return pictures.scene(self.assets, i, "held-out", style)

    def image(self, style: str, i: int) -> np.ndarray:
        return np.asarray(self.scene(style, i).image)

    def facts(self, style: str, i: int) -> list[Fact]:
        """Three of different kinds, in turns, as far as the scene has them."""
        asked = self.all_facts(style, i)
        turned = [*self.kinds[i % len(self.kinds) :], *self.kinds[: i % len(self.kinds)]]
        return [q for q in (next((q for q in asked if q.kind == kind), None) for kind in turned) if q][:3]

    def all_facts(self, style: str, i: int) -> list[Fact]:
        import talk

        group = {kind: name for name, kinds in GROUPS.items() for kind in kinds}
        asked = talk.held_out_questions(self.scene(style, i), i, style, self.assets.names)
        return [dataclasses.replace(q, kind=group[q.kind]) for q in asked]

    def looked_for(self, style: str, i: int) -> list[tuple[Fact, np.ndarray]]:
        import pictures

        s = self.scene(style, i)
        at, out = pictures.labels(s).thing, []
        for q in self.all_facts(style, i):
            told = f" {q.text} {q.answer} ".replace("?", " ")
            about = [k for k, t in enumerate(s.things, 1) if f" {t.name} " in told or f'"{t.name}"' in told]
            if about and q.answer not in ("yes", "no"):
                out.append((q, np.isin(at, about)))
        return out

    def pair(self, style: str, i: int) -> tuple[Fact, Fact] | None:
        *_, first, second = [None, None, *self.all_facts(style, i)]
        return (first, second) if first and second else None

    def right(self, said: str, answer: str) -> bool:
        import talk

        return talk.answer_right(said, answer)

    def objects(self, said: str, style: str, i: int) -> tuple[int, int, int]:
        import talk

        return talk.caption_objects(said, self.scene(style, i), self.assets.names)
