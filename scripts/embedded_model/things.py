"""What a scene is made of, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

SIDE = 336
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
GLYPHS = LETTERS + DIGITS


@dataclass(frozen=True)
class Thing:
    """One drawn object. Centre in picture fractions (x right, y down), size in pixels of its circle."""

    shape: str
    color: str
    glyph: str | None
    x: float
    y: float
    size: float

    @property
    def place(self) -> str:
        """The name of the ninth of the picture that holds the centre."""
        return PLACES[3 * min(2, int(self.y * 3)) + min(2, int(self.x * 3))]

    @property
    def glyph_kind(self) -> str | None:
        """`letter`, `digit` or None."""
        return None if self.glyph is None else "letter" if self.glyph in LETTERS else "digit"


@dataclass(frozen=True)
class Scene:
    """A picture (RGB uint8) and what is in it, in reading order. `box` is the picture inside its padding."""

    image: Image.Image | None
    things: tuple[Thing, ...]
    ground: str
    box: tuple[int, int, int, int] = (0, 0, SIDE, SIDE)
