"""Rendered scenes, and the questions, captions and scores that belong to them.

Needs numpy and Pillow only, so benchmarks and tests can draw held-out scenes without torch.
Training, held-out and demo scenes come from differently keyed random streams: no seed of one
split can give a scene of another.

Answers are bare: lowercase words (`red`, `top left`, `yes`), digits for counts (`3`), and the
glyph as drawn (`A`, `7`).
"""

from __future__ import annotations

import colorsys
import functools
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 336
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
GLYPHS = LETTERS + DIGITS
CAPTION_QUESTION = "Describe the image."
PAD_RGB = (122, 116, 104)  # CLIP's mean colour: what LLaVA-1.5 pads to a square with
SPLITS = {"train": 11, "held-out": 23, "demo": 37}
STYLES = {"known": 0, "other": 1}  # "other" is never drawn for training

# hue in degrees, saturation, value: the range of each colour name, with gaps between neighbours
_HSV = {
    "red": ((-12, 9), (0.72, 1), (0.62, 1)),
    "orange": ((19, 39), (0.8, 1), (0.86, 1)),
    "yellow": ((48, 62), (0.62, 1), (0.86, 1)),
    "green": ((92, 155), (0.5, 1), (0.38, 0.95)),
    "blue": ((202, 246), (0.58, 1), (0.5, 1)),
    "purple": ((264, 303), (0.42, 1), (0.42, 0.88)),
    "white": ((0, 360), (0, 0.04), (0.93, 1)),
    "black": ((0, 360), (0, 0.3), (0, 0.12)),
}


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


@functools.lru_cache(maxsize=4096)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=1)
def extra_fonts() -> tuple[str, ...]:
    """Font files that installed packages bring along, for training only; empty where there are none."""
    found: list[str] = []
    try:
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        found += [str(p) for p in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in p.name]
        found += [
            str(folder / n) for n in ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmr10.ttf", "cmss10.ttf", "cmb10.ttf")
        ]
    except ImportError:
        pass
    return tuple(f for f in found if Path(f).is_file())


@functools.lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Unit noise, float32 [700, 700, 3]: cut at random offsets instead of drawn anew for each picture."""
    return np.random.default_rng(5).standard_normal((700, 700, 3)).astype(np.float32)


def _rgb(color: str, rng: np.random.Generator) -> np.ndarray:
    h, s, v = (rng.uniform(*r) for r in _HSV[color])
    return np.array(colorsys.hsv_to_rgb(h / 360 % 1, s, v)) * 255


def _luma(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def _ground(w: int, h: int, style: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ground as float32 [h, w, 3] and its mean colour."""
    kind = rng.random()
    if kind < 0.5:
        base = np.full(3, rng.uniform(0, 255)) + rng.uniform(-8, 8, 3)
    elif kind < 0.8:
        base = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.55, 1))) * 255
    else:
        base = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.12, 0.6))) * 255
    out = np.broadcast_to(base.astype(np.float32), (h, w, 3)).copy()
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
    if style == "other":  # patterns that training never sees
        if rng.random() < 0.5:
            cell = rng.integers(9, 40)
            out += (((ys // cell + xs // cell) % 2) * 2 - 1)[..., None] * rng.uniform(4, 14)
        else:
            far = np.hypot(xs / w - rng.uniform(0.2, 0.8), ys / h - rng.uniform(0.2, 0.8))
            out += (0.5 - far)[..., None] * rng.uniform(-45, 45)
        if rng.random() < 0.5:
            out[rng.random((h, w)) < 0.02] += rng.uniform(-60, 60)
        return out, base
    if rng.random() < 0.3:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = (xs / w - 0.5) * math.cos(angle) + (ys / h - 0.5) * math.sin(angle)
        out += ramp[..., None] * rng.uniform(-70, 70, 3).astype(np.float32)
    if rng.random() < 0.25:
        n = int(rng.integers(3, 30))
        coarse = Image.fromarray((rng.random((n, n)) * 255).astype(np.uint8)).resize((w, h), Image.Resampling.BILINEAR)
        out += (np.asarray(coarse, np.float32)[..., None] / 255 - 0.5) * rng.uniform(5, 45)
    if rng.random() < 0.12:
        angle, pitch = rng.uniform(0, math.pi), rng.uniform(5, 40)
        wave = np.sin((xs * math.cos(angle) + ys * math.sin(angle)) * (2 * math.pi / pitch))
        out += (wave if rng.random() < 0.5 else np.sign(wave))[..., None] * rng.uniform(2, 12)
    if rng.random() < 0.45:
        i, j = rng.integers(0, 700 - h + 1), rng.integers(0, 700 - w + 1)
        noise = _noise_bank()[i : i + h, j : j + w]
        out += (noise if rng.random() < 0.6 else noise[..., :1]) * rng.uniform(2, 26)
    return out, base


def _outline(shape: str, marked: bool, style: str, rng: np.random.Generator) -> tuple[list[tuple[float, float]], float]:
    """A shape's corners in the unit circle (none: the circle itself), and the share of it that is a hole."""
    other = style == "other"
    turn = math.radians(rng.uniform(-11, 11)) if rng.random() < 0.6 else 0.0
    hole = 0.0
    if shape in ("circle", "ring"):
        if shape == "ring":
            hole = (
                rng.uniform(0.45, 0.55)
                if other
                else rng.choice([rng.uniform(0.56, 0.84), rng.uniform(0.3, 0.43)], p=[0.85, 0.15])
            )
        return [], float(hole)
    if shape == "square":
        pts = [(-0.707, -0.707), (0.707, -0.707), (0.707, 0.707), (-0.707, 0.707)]
        squash = rng.uniform(0.86, 0.9) if other else rng.choice([1.0, rng.uniform(0.92, 1.0)])
        pts = [(x, y * squash) for x, y in pts]
    elif shape == "diamond":
        wide = rng.uniform(0.56, 0.6) if other else rng.choice([1.0, rng.uniform(0.63, 1.0)])
        pts = [(0, -1), (wide, 0), (0, 1), (-wide, 0)]
        turn *= 0.5
    elif shape == "triangle":
        half = rng.uniform(0.93, 0.98) if other else rng.choice([0.866, rng.uniform(0.7, 0.92)])
        pts = [(0, -1), (half, 0.5), (-half, 0.5)]
        if rng.random() < 0.12:
            turn += math.pi
    elif shape == "star":
        tips = 6 if other and rng.random() < 0.2 else 5
        inner = rng.uniform(0.5, 0.56) if other else rng.choice([0.382, rng.uniform(0.33, 0.49)])
        pts = [
            (
                (1, inner)[k % 2] * math.sin(k * math.pi / tips),
                -(1, inner)[k % 2] * math.cos(k * math.pi / tips),
            )
            for k in range(2 * tips)
        ]
    else:
        a = rng.uniform(0.17, 0.2) if other else rng.uniform(0.21, 0.38)
        a = max(a, 0.28) if marked else a  # a glyph must fit where the arms meet
        b = 0.96
        pts = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
        if rng.random() < 0.15:
            turn += math.pi / 4
    c, s = math.cos(turn), math.sin(turn)
    pts = [(x * c - y * s, x * s + y * c) for x, y in pts]
    if shape not in ("circle", "ring") and rng.random() < 0.03:
        hole = rng.uniform(0.5, 0.7)  # drawn as a thick line
    return pts, hole


# share of the circle's radius that a glyph's half height may take, and how far below the centre it stands
_ROOM = {
    "circle": 0.58,
    "square": 0.56,
    "triangle": 0.33,
    "star": 0.33,
    "cross": 0.3,
    "ring": 0.5,
    "diamond": 0.4,
}


def _mask(
    pts: list[tuple[float, float]],
    hole: float,
    radius: float,
    grow: float,
    side: int,
    offset: tuple[float, float],
) -> Image.Image:
    """Antialiased coverage, `L` [side, side]; `grow` pixels wider than the shape."""
    k = 3 if radius < 40 else 2
    big = Image.new("L", (side * k, side * k), 0)
    draw = ImageDraw.Draw(big)
    cx, cy = (side / 2 + offset[0]) * k, (side / 2 + offset[1]) * k
    for share, value in ((1.0, 255), (hole, 0)):
        if share <= 0:
            continue
        r = (radius * share + (grow if value else -grow)) * k
        if r <= 0:
            continue
        if pts:
            draw.polygon([(cx + x * r, cy + y * r) for x, y in pts], fill=value)
        else:
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=value)
    return big.reduce(k)


def _draw(
    canvas: Image.Image,
    thing: Thing,
    fill: np.ndarray,
    style: str,
    fonts: tuple[str | None, ...],
    rng: np.random.Generator,
) -> None:
    """Paint one thing onto the canvas (RGB)."""
    radius = thing.size / 2
    cx, cy = thing.x * canvas.width, thing.y * canvas.height
    side = int(2 * radius + 16)
    left, top = int(cx - side / 2), int(cy - side / 2)
    offset = (cx - side / 2 - left, cy - side / 2 - top)
    pts, hole = _outline(thing.shape, thing.glyph is not None, style, rng)
    if thing.glyph and thing.shape != "ring":
        hole = 0.0
    width = 0.0
    if style == "other":
        width = rng.uniform(4, 6) if rng.random() < 0.5 else 0.0
    elif rng.random() < 0.35:
        width = rng.uniform(0.8, 3.6)
    if rng.random() < 0.06:  # a soft shadow
        shade = _mask(pts, hole, radius, 0, side, (offset[0] + 3, offset[1] + 3)).point(lambda v: v * 2 // 5)
        canvas.paste((20, 20, 20), (left, top), shade)
    if width and width < radius / 5:
        dark = fill * rng.uniform(0.3, 0.6)
        edge = [dark, np.zeros(3), np.full(3, 255.0), np.full(3, rng.uniform(60, 200))][
            rng.choice(4, p=[0.4, 0.3, 0.15, 0.15])
        ]
        canvas.paste(tuple(int(v) for v in edge), (left, top), _mask(pts, hole, radius, 0, side, offset))
        inner = _mask(pts, hole, radius, -width, side, offset)
    else:
        inner = _mask(pts, hole, radius, 0, side, offset)
    texture = rng.random()
    if texture < 0.22:  # gradient or grain inside the shape
        body = np.broadcast_to(fill.astype(np.float32), (side, side, 3))
        if texture < 0.13:
            ramp = np.linspace(rng.uniform(0.78, 1), rng.uniform(0.9, 1.15), side, dtype=np.float32)
            body = body * (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None])
        else:
            i, j = rng.integers(0, 500, 2)
            body = body + _noise_bank()[i : i + side, j : j + side, :1] * rng.uniform(4, 16)
        canvas.paste(Image.fromarray(np.clip(body, 0, 255).astype(np.uint8)), (left, top), inner)
    else:
        canvas.paste(tuple(int(v) for v in fill), (left, top), inner)
    if not thing.glyph:
        return
    room = _ROOM[thing.shape] * radius
    if thing.shape == "ring":
        room = hole * radius * 0.62
    height = max(7.5, room * rng.uniform(0.72, 1.0))
    path = fonts[rng.integers(len(fonts))]
    font = _font(path, max(8, round(2 * height / 0.72)))
    under = fill
    if thing.shape == "ring":
        x, y = int(np.clip(cx, 0, canvas.width - 1)), int(np.clip(cy, 0, canvas.height - 1))
        under = np.array(canvas.getpixel((x, y)), float)
    bright = _luma(under)
    ink = np.full(3, rng.uniform(225, 255)) if bright < 128 else np.full(3, rng.uniform(0, 35))
    if rng.random() < 0.15:
        for _ in range(8):
            try_ink = _rgb(COLORS[rng.integers(8)], rng)
            if abs(_luma(try_ink) - bright) > 85:
                ink = try_ink
                break
    stroke = 1 if rng.random() < 0.2 and height > 11 else 0
    box = int(4 * height + 8)
    glyph = Image.new("L", (box, box), 0)
    ImageDraw.Draw(glyph).text((box / 2, box / 2), thing.glyph, font=font, fill=255, anchor="mm", stroke_width=stroke)
    found = glyph.getbbox()
    if found is None:
        return
    # centre by what was drawn: fonts disagree about where the middle of a line is
    gx, gy = (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
    if style == "other":
        lean = rng.uniform(0.1, 0.25)  # slanted: training never slants Pillow's own font
        glyph = glyph.transform(
            glyph.size, Image.Transform.AFFINE, (1, lean, -lean * gy, 0, 1, 0), Image.Resampling.BILINEAR
        )
    elif rng.random() < 0.3:
        glyph = glyph.rotate(rng.uniform(-13, 13), Image.Resampling.BILINEAR, center=(gx, gy))
    down = {"triangle": 0.17, "star": 0.03}.get(thing.shape, 0.0) * radius
    if thing.shape == "triangle" and pts[0][1] > 0:
        down = -down
    jx, jy = rng.uniform(-0.06, 0.06, 2) * radius
    canvas.paste(tuple(int(v) for v in ink), (round(cx + jx - gx), round(cy + down + jy - gy)), glyph)


def _place_things(n: int, w: int, h: int, dense: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres (fractions) and sizes (pixels); nothing overlaps or sits on the border between two places."""
    small = min(w, h)
    spots: list[tuple[float, float, float]] = []
    cells = list(rng.permutation(9)) if not dense and rng.random() < 0.5 else []
    top = float(rng.uniform(50, 92)) if dense else float(rng.uniform(70, 135) if n < 6 else rng.uniform(60, 115))
    for attempt in range(60 * n):
        if len(spots) == n:
            break
        size = rng.uniform(36, max(44, top * (1 - attempt / (80 * n)))) * small / SIDE
        r = size / 2 + 2
        if cells:
            cell = cells[len(spots) % 9]
            size = min(size, w / 3 - 6, h / 3 - 6) if rng.random() < 0.9 else size
            r = size / 2 + 2
            x = ((cell % 3) + 0.5) / 3 + rng.uniform(-0.09, 0.09)
            y = ((cell // 3) + 0.5) / 3 + rng.uniform(-0.09, 0.09)
        else:
            x, y = rng.random(2)
        if min(abs(x * 3 - 1), abs(x * 3 - 2), abs(y * 3 - 1), abs(y * 3 - 2)) < 0.07 and not dense:
            continue
        px, py = x * w, y * h
        if min(px, w - px) < r or min(py, h - py) < r:
            continue
        if all(math.hypot(px - a * w, py - b * h) > r + s / 2 + 2 for a, b, s in spots):
            spots.append((float(x), float(y), float(size)))
    return spots


def render(
    rng: np.random.Generator,
    style: str = "known",
    dense: bool = False,
    fonts: tuple[str | None, ...] = (None,),
) -> Scene:
    """Draw a scene of one to six things (`dense`: nine to twenty, for the vision phase), 336 x 336."""
    w = h = SIDE
    if not dense and rng.random() < 0.08:  # not square: padded as LLaVA-1.5 pads, or stretched as llama.cpp does
        short = int(rng.integers(224, 320))
        w, h = (SIDE, short) if rng.random() < 0.5 else (short, SIDE)
    ground, mean = _ground(w, h, style, rng)
    canvas = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    n = int(rng.integers(9, 21)) if dense else int(rng.integers(1, 7))
    things: list[Thing] = []
    few = rng.random() < 0.3 and not dense  # scenes that repeat shapes and colours make counts and absences hard
    shapes = rng.choice(SHAPES, 2, replace=False) if few else SHAPES
    for x, y, size in _place_things(n, w, h, dense, rng):
        for _ in range(20):
            color = str(rng.choice(COLORS))
            fill = _rgb(color, rng)
            if np.linalg.norm(fill - mean) > 85:
                break
        else:
            color, fill = ("white", np.full(3, 250.0)) if _luma(mean) < 128 else ("black", np.full(3, 8.0))
        shape = str(rng.choice(shapes))
        least = {"star": 56, "cross": 62, "triangle": 56, "ring": 64, "diamond": 52}.get(shape, 40)
        glyph = None
        if size >= least and rng.random() < (0.85 if dense else 0.55):
            glyph = str(rng.choice(list(LETTERS if rng.random() < 0.62 else DIGITS)))
        thing = Thing(shape, color, glyph, x, y, size)
        _draw(canvas, thing, fill, style, fonts, rng)
        things.append(thing)
    canvas = _camera(canvas, style, rng)
    things.sort(key=lambda t: (PLACES.index(t.place), t.x))
    box = (0, 0, SIDE, SIDE)
    if (w, h) != (SIDE, SIDE) and rng.random() < 0.5:
        canvas = canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    elif (w, h) != (SIDE, SIDE):
        padded = Image.new("RGB", (SIDE, SIDE), PAD_RGB)
        box = ((SIDE - w) // 2, (SIDE - h) // 2, (SIDE - w) // 2 + w, (SIDE - h) // 2 + h)
        padded.paste(canvas, box[:2])
        canvas = padded
    return Scene(canvas, tuple(things), "light" if _luma(mean) >= 128 else "dark", box)


def random_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One to six things that nobody draws, for texts alone; glyphs evenly spread."""
    out = []
    for x, y, size in _place_things(int(rng.integers(1, 7)), SIDE, SIDE, False, rng):
        glyph = str(rng.choice(list(GLYPHS))) if rng.random() < 0.6 else None
        out.append(Thing(str(rng.choice(SHAPES)), str(rng.choice(COLORS)), glyph, x, y, size))
    return tuple(sorted(out, key=lambda t: (PLACES.index(t.place), t.x)))


def _camera(canvas: Image.Image, style: str, rng: np.random.Generator) -> Image.Image:
    """What happens to a picture after it was drawn: blur, rescaling, JPEG, a little gain."""
    pick = rng.random()
    if style == "other":
        return canvas.filter(ImageFilter.UnsharpMask(2, 80)) if pick < 0.3 else canvas
    if pick < 0.07:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    elif pick < 0.14:
        k = rng.uniform(0.6, 0.95)
        canvas = canvas.resize((round(canvas.width * k), round(canvas.height * k)), Image.Resampling.BILINEAR).resize(
            canvas.size, Image.Resampling.BICUBIC
        )
    elif pick < 0.22:
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=int(rng.integers(45, 95)))
        canvas = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    if rng.random() < 0.15:
        gain = rng.uniform(0.9, 1.08)
        canvas = canvas.point(lambda v: min(255, int(v * gain)))
    return canvas


def scene(index: int, split: str = "held-out", style: str = "known") -> Scene:
    """The scene of that number: same split, style and index give the same picture (for one Pillow version).

    Held-out and demo scenes use Pillow's own font alone, so they need nothing else installed.
    """
    rng = np.random.default_rng([SPLITS[split], STYLES[style], index])
    return render(rng, style)


def patch_things(picture: Scene, grid: int = 24) -> np.ndarray:
    """Which thing each patch belongs to, int16 [grid, grid]: 0 for the ground, else 1 + its index."""
    out = np.zeros((grid, grid), np.int16)
    mids = (np.arange(grid) + 0.5) * SIDE / grid
    x0, y0, x1, y1 = picture.box
    for number, t in enumerate(picture.things, 1):
        px, py = x0 + t.x * (x1 - x0), y0 + t.y * (y1 - y0)
        out[np.hypot(mids[None, :] - px, mids[:, None] - py) < max(11.0, 0.36 * t.size)] = number
    return out


def patch_labels(picture: Scene, grid: int = 24) -> np.ndarray:
    """What each patch shows, int16 [grid, grid, 5].

    Shape, color, glyph, place (0: none, else 1 + index), and whether a thing's centre is there (0 or 1).
    """
    table = np.zeros((len(picture.things) + 1, 5), np.int16)
    for number, t in enumerate(picture.things, 1):
        glyph = 0 if t.glyph is None else 1 + GLYPHS.index(t.glyph)
        table[number, :4] = (
            1 + SHAPES.index(t.shape),
            1 + COLORS.index(t.color),
            glyph,
            1 + PLACES.index(t.place),
        )
    out = table[patch_things(picture, grid)]
    x0, y0, x1, y1 = picture.box
    for t in picture.things:
        px, py = x0 + t.x * (x1 - x0), y0 + t.y * (y1 - y0)
        out[min(grid - 1, int(py * grid / SIDE)), min(grid - 1, int(px * grid / SIDE)), 4] = 1
    return out


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(picture: Scene) -> str:
    """One sentence for each thing, in reading order, after a fixed opening and before, for few, a fixed close."""
    n = len(picture.things)
    out = [f"The image shows {n} {'shape' if n == 1 else 'shapes'} on a {picture.ground} ground."]
    for t in picture.things:
        mark = f"with the {t.glyph_kind} {t.glyph}" if t.glyph else "without a letter"
        out.append(f"{_article(t.color).capitalize()} {t.shape} {mark} is at the {t.place}.")
    if n <= 2:
        out.append("Nothing else can be seen in the rest of the image.")
    if n == 1:
        out.append("All the other places are empty.")
    return " ".join(out)


_WORDS = {
    "color": (
        "What color is the {x}?",
        "What colour is the {x}?",
        "Which color is the {x}?",
        "What is the color of the {x}?",
        "What color does the {x} have?",
        "The {x} is what color?",
        "Tell me the color of the {x}.",
        "What is the {x}'s color?",
    ),
    "shape at": (
        "What shape is at the {x}?",
        "Which shape is at the {x}?",
        "What is at the {x}?",
        "What shape is in the {x}?",
        "What shape do you see at the {x}?",
        "Name the shape at the {x}.",
        "What object is at the {x}?",
        "What is the shape at the {x}?",
        "What is in the {x}?",
    ),
    "shape of": (
        "What shape is {x}?",
        "Which shape is {x}?",
        "What is the shape of the {x} object?",
        "What shape is the {x} object?",
        "What shape is the {x} one?",
        "What is the {x} shape?",
    ),
    "glyph": (
        "What {k} is in the {x}?",
        "Which {k} is in the {x}?",
        "What {k} is on the {x}?",
        "What {k} does the {x} have?",
        "What {k} is inside the {x}?",
        "What {k} is written in the {x}?",
        "Which {k} does the {x} show?",
        "Read the {k} in the {x}.",
        "What is the {k} in the {x}?",
        "What is written in the {x}?",
        "What character is in the {x}?",
    ),
    "glyph at": (
        "What {k} is at the {x}?",
        "What {k} is in the shape at the {x}?",
        "Which {k} is at the {x}?",
    ),
    "count": (
        "How many {x} are there?",
        "How many {x} do you see?",
        "How many {x} are in the image?",
        "Count the {x}.",
        "How many {x} are in the picture?",
        "How many {x} can you see?",
        "What is the number of {x}?",
        "How many {x} does the image contain?",
    ),
    "position": (
        "Where is the {x}?",
        "Where is the {x} in the image?",
        "In which place is the {x}?",
        "What is the position of the {x}?",
        "Where can the {x} be found?",
        "Where is the {x} located?",
    ),
    "presence": (
        "Is there {x}?",
        "Is there {x} in the image?",
        "Do you see {x}?",
        "Can you see {x}?",
        "Does the image show {x}?",
        "Is there {x} in the picture?",
        "Does the image contain {x}?",
    ),
    "any": ("Are there any {x}?", "Are there {x} in the image?", "Do you see any {x}?"),
    "is it": ("Is the {x} {y}?",),
    "is there at": ("Is there {x} at the {y}?", "Do you see {x} at the {y}?"),
}
_CAPTION_WORDS = (
    CAPTION_QUESTION,
    "Describe the picture.",
    "What do you see?",
    "What is in the image?",
    "Describe this image in detail.",
    "What does the image show?",
    "Describe the scene.",
    "Describe what you see.",
    "Give a description of the image.",
)
_FORMAT_HINTS = (
    " Answer with one word.",
    " Answer in one word.",
    " Answer the question using a single word or phrase.",
)
KINDS = ("color", "shape", "glyph", "count", "position", "presence")


@dataclass(frozen=True)
class Question:
    """A question of one kind, with the one answer that is right, and the things that the answer rests on."""

    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...] = ()


def _fill(form: str, rng: np.random.Generator, plain: bool, **words: str) -> str:
    forms = _WORDS[form]
    if plain:
        return forms[0].format(**words)
    # half of the time the issue's own wording: it is the one people see first
    text = forms[0 if rng.random() < 0.5 else rng.integers(len(forms))].format(**words)
    if rng.random() < 0.25:
        text = text.replace("center", "centre" if rng.random() < 0.5 else "middle")
    if rng.random() < 0.12:
        text = re.sub(r"\bshape(s?)\b(?! of)", r"object\1", text)
    if rng.random() < 0.05:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.04:
        text = text.rstrip("?.")
    if rng.random() < 0.06:
        text += _FORMAT_HINTS[rng.integers(len(_FORMAT_HINTS))]
    return text


def caption_question(rng: np.random.Generator) -> str:
    """One wording of the request for a description."""
    return _CAPTION_WORDS[0 if rng.random() < 0.6 else rng.integers(len(_CAPTION_WORDS))]


def _names(things: tuple[Thing, ...], t: Thing, given: tuple[str, ...]) -> list[str]:
    """Descriptions from the `given` attributes that fit this thing and no other."""
    same = {a: [o for o in things if getattr(o, a) == getattr(t, a)] for a in ("shape", "color", "place", "glyph")}
    out = []
    if "shape" in given and len(same["shape"]) == 1:
        out.append(t.shape)
    if "color" in given and "shape" in given and sum(o in same["color"] for o in same["shape"]) == 1:
        out.append(f"{t.color} {t.shape}")
    if "color" in given and len(same["color"]) == 1:
        out.append(f"{t.color} shape")
    if "place" in given and len(same["place"]) == 1:
        out.append(f"shape at the {t.place}")
        if "shape" in given:
            out.append(f"{t.shape} at the {t.place}")
    if "glyph" in given and t.glyph and len(same["glyph"]) == 1:
        out.append(f"{t.shape if 'shape' in given else 'shape'} with the {t.glyph_kind} {t.glyph}")
    return out


def ask(picture: Scene, kind: str, rng: np.random.Generator, plain: bool = True) -> Question | None:
    """A question of that kind whose answer is unique in the scene, or None where the scene has none.

    `plain` keeps to the issue's wordings; else the wording varies, as in training.
    """
    things = picture.things
    t = things[rng.integers(len(things))]

    def pick(names: list[str]) -> str | None:
        if plain and kind != "position":
            names = names[:1]
        return names[rng.integers(len(names))] if names else None

    if kind == "color":
        x = pick(_names(things, t, ("shape", "place", "glyph")))
        return x and Question(kind, _fill("color", rng, plain, x=x), t.color, (t,))
    if kind == "shape":
        alone = sum(o.place == t.place for o in things) == 1
        if alone and (plain or rng.random() < 0.65):
            return Question(kind, _fill("shape at", rng, plain, x=t.place), t.shape, (t,))
        if plain or sum(o.color == t.color for o in things) > 1:
            return None
        return Question(kind, _fill("shape of", rng, plain, x=t.color), t.shape, (t,))
    if kind == "glyph":
        marked = [o for o in things if o.glyph]
        if not marked:
            return None
        t = marked[rng.integers(len(marked))]
        if not plain and rng.random() < 0.2 and sum(o.place == t.place for o in things) == 1:
            return Question(kind, _fill("glyph at", rng, plain, x=t.place, k=t.glyph_kind), t.glyph, (t,))
        names = _names(things, t, ("color", "shape"))
        if plain:
            names = [f"{t.color} {t.shape}"] if f"{t.color} {t.shape}" in names else []
        x = pick(names)
        word = t.glyph_kind if plain or t.glyph_kind == "letter" or rng.random() < 0.7 else "number"
        return x and Question(kind, _fill("glyph", rng, plain, x=x, k=word), t.glyph, (t,))
    if kind == "count":
        if rng.random() < 0.3:
            return Question(kind, _fill("count", rng, plain, x="shapes"), str(len(things)), things)
        if not plain and rng.random() < 0.3:
            color = t.color if rng.random() < 0.8 else str(COLORS[rng.integers(8)])
            same = tuple(o for o in things if o.color == color)
            return Question(kind, _fill("count", rng, plain, x=f"{color} shapes"), str(len(same)), same)
        shape = t.shape if rng.random() < 0.8 else SHAPES[rng.integers(7)]
        same = tuple(o for o in things if o.shape == shape)
        return Question(kind, _fill("count", rng, plain, x=_plural(shape)), str(len(same)), same)
    if kind == "position":
        x = pick(_names(things, t, ("color", "shape", "glyph")))
        return x and Question(kind, _fill("position", rng, plain, x=x), t.place, (t,))
    yes = rng.random() < 0.5
    if not plain and rng.random() < 0.3:
        return _ask_about_one(things, t, yes, rng)
    form = 0 if plain else rng.choice(3, p=[0.65, 0.2, 0.15])
    color, shape = t.color, t.shape
    if not yes:
        # half of the absent ones share a colour or a shape with something that is there
        hard = rng.random()
        color = color if hard < 0.35 else COLORS[rng.integers(8)]
        shape = shape if 0.35 <= hard < 0.7 else SHAPES[rng.integers(7)]
    found = tuple(o for o in things if (o.color == color or form == 1) and (o.shape == shape or form == 2))
    what = (f"{color} {shape}", shape, f"{color} shape")[form]
    return Question(kind, _fill("presence", rng, plain, x=_article(what)), "yes" if found else "no", found)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _ask_about_one(things: tuple[Thing, ...], t: Thing, yes: bool, rng: np.random.Generator) -> Question | None:
    """Yes-or-no questions beyond `Is there a blue triangle?`."""
    form = rng.integers(3)
    if form == 0:
        shape = t.shape if yes else SHAPES[rng.integers(7)]
        found = tuple(o for o in things if o.shape == shape)
        text = _fill("any", rng, False, x=_plural(shape))
        return Question("presence", text, "yes" if found else "no", found)
    if form == 1:
        if sum(o.shape == t.shape for o in things) > 1:
            return None
        color = t.color if yes else COLORS[rng.integers(8)]
        text = _fill("is it", rng, False, x=t.shape, y=color)
        return Question("presence", text, "yes" if color == t.color else "no", (t,))
    place = t.place if yes else PLACES[rng.integers(9)]
    found = tuple(o for o in things if o.place == place and o.shape == t.shape)
    text = _fill("is there at", rng, False, x=_article(t.shape), y=place)
    return Question("presence", text, "yes" if found else "no", found)


def questions(
    picture: Scene,
    rng: np.random.Generator,
    n: int,
    plain: bool = True,
    weights: tuple[float, ...] | None = None,
) -> list[Question]:
    """Up to n different questions; `weights` (over KINDS) sets how often each kind is tried."""
    p = None if weights is None else np.asarray(weights) / np.sum(weights)
    out: dict[str, Question] = {}
    for _ in range(6 * n):
        q = ask(picture, str(rng.choice(KINDS, p=p)), rng, plain)
        if q:
            out.setdefault(q.text, q)
        if len(out) == n:
            break
    return list(out.values())


def held_out_questions(index: int, style: str = "known", split: str = "held-out") -> list[Question]:
    """At most one question of each kind for a held-out scene, in the issue's wordings."""
    picture = scene(index, split, style)
    rng = np.random.default_rng([SPLITS[split], 7, STYLES[style], index])
    asked = (next(filter(None, (ask(picture, kind, rng) for _ in range(8))), None) for kind in KINDS)
    return [q for q in asked if q]


def held_out_pair(index: int, style: str = "known") -> tuple[Question, Question] | None:
    """Two questions about different things of a held-out scene, the kinds in turns; None if it has none."""
    asked = held_out_questions(index, style)
    pairs = [(a, b) for a in asked for b in asked if a.about and b.about and not set(a.about) & set(b.about)]
    return pairs[index % len(pairs)] if pairs else None


def answer_right(said: str, answer: str) -> bool:
    """Exact match; only surrounding blanks and one closing full stop are forgiven."""
    return said.strip().removesuffix(".") == answer


_SAID = re.compile(
    r"\b("
    + "|".join(COLORS)
    + r") ("
    + "|".join(SHAPES)
    + r")\b[^.]*? at the ("
    + "|".join(sorted(PLACES, key=len, reverse=True))
    + r")\b",
    re.IGNORECASE,
)


def caption_objects(said: str, picture: Scene) -> tuple[int, int, int]:
    """(things whose colour, shape and place a caption names right, things that it names, things in the scene).

    A thing that a caption names once counts as right once, however often the scene repeats it; what it repeats or
    invents counts as named.
    """
    told = Counter(tuple(part.lower() for part in m.groups()) for m in _SAID.finditer(said))
    there = Counter((t.color, t.shape, t.place) for t in picture.things)
    return (told & there).total(), told.total(), there.total()
