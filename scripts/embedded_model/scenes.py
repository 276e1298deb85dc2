"""Rendered scenes: what is where in a held-out picture, and its pixels.

Needs numpy and Pillow only, so benchmarks and tests can draw held-out scenes without torch.
Training, held-out and demo scenes come from differently keyed random streams: no seed of one
split can give a scene of another.
"""

from __future__ import annotations

import math

import drawing
import numpy as np
from PIL import Image
from things import COLORS, DIGITS, GLYPHS, LETTERS, PLACES, SHAPES, SIDE, Scene, Thing

PAD_RGB = (122, 116, 104)  # CLIP's mean colour: what LLaVA-1.5 pads to a square with
SPLITS = {"train": 11, "held-out": 23, "demo": 37}
STYLES = {"known": 0, "other": 1, "gray": 2}  # for training, only the first is drawn


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
    # not square: padded as LLaVA-1.5 pads, or stretched as llama.cpp does
    if not dense and style != "gray" and rng.random() < 0.08:
        short = int(rng.integers(224, 320))
        w, h = (SIDE, short) if rng.random() < 0.5 else (short, SIDE)
    ground, mean = drawing.ground(w, h, style, rng)
    canvas = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    n = int(rng.integers(9, 21)) if dense else int(rng.integers(1, 7))
    things: list[Thing] = []
    few = rng.random() < 0.3 and not dense  # scenes that repeat shapes and colours make counts and absences hard
    shapes = rng.choice(SHAPES, 2, replace=False) if few else SHAPES
    for x, y, size in _large_things(n, rng) if style == "gray" else _place_things(n, w, h, dense, rng):
        for _ in range(20):
            color = str(rng.choice(COLORS))
            fill = drawing.rgb(color, rng)
            if np.linalg.norm(fill - mean) > 85:
                break
        else:
            color, fill = ("white", np.full(3, 250.0)) if drawing.luma(mean) < 128 else ("black", np.full(3, 8.0))
        shape = str(rng.choice(shapes))
        least = {"star": 56, "cross": 62, "triangle": 56, "ring": 64, "diamond": 52}.get(shape, 40)
        glyph = None
        if size >= least and rng.random() < (0.85 if dense else 0.55):
            glyph = str(rng.choice(list(LETTERS if rng.random() < 0.62 else DIGITS)))
        thing = Thing(shape, color, glyph, x, y, size)
        drawing.draw(canvas, thing, fill, style, fonts, rng)
        things.append(thing)
    canvas = drawing.camera(canvas, style, rng)
    things.sort(key=lambda t: (PLACES.index(t.place), t.x))
    box = (0, 0, SIDE, SIDE)
    if (w, h) != (SIDE, SIDE) and rng.random() < 0.5:
        canvas = canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    elif (w, h) != (SIDE, SIDE):
        padded = Image.new("RGB", (SIDE, SIDE), PAD_RGB)
        box = ((SIDE - w) // 2, (SIDE - h) // 2, (SIDE - w) // 2 + w, (SIDE - h) // 2 + h)
        padded.paste(canvas, box[:2])
        canvas = padded
    return Scene(canvas, tuple(things), "light" if drawing.luma(mean) >= 128 else "dark", box)


def _large_things(n: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres (fractions) and sizes (pixels), each in a place of its own and as large as it allows."""
    spots = []
    for cell in rng.permutation(9)[:n]:
        x, y = (np.array([cell % 3, cell // 3]) + 0.5) / 3 + rng.uniform(-0.01, 0.01, 2)
        spots.append((float(x), float(y), float(rng.uniform(88, 104))))
    return spots


def random_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One to six things that nobody draws, for texts alone; glyphs evenly spread."""
    out = []
    for x, y, size in _place_things(int(rng.integers(1, 7)), SIDE, SIDE, False, rng):
        glyph = str(rng.choice(list(GLYPHS))) if rng.random() < 0.6 else None
        out.append(Thing(str(rng.choice(SHAPES)), str(rng.choice(COLORS)), glyph, x, y, size))
    return tuple(sorted(out, key=lambda t: (PLACES.index(t.place), t.x)))


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
