"""Grounds, shapes and glyphs as pixels, in each drawing style."""

from __future__ import annotations

import colorsys
import functools
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from things import COLORS, Thing

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


def rgb(color: str, rng: np.random.Generator) -> np.ndarray:
    h, s, v = (rng.uniform(*r) for r in _HSV[color])
    return np.array(colorsys.hsv_to_rgb(h / 360 % 1, s, v)) * 255


def luma(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def ground(w: int, h: int, style: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ground as float32 [h, w, 3] and its mean colour."""
    if style == "gray":
        base = np.full(3, rng.uniform(100, 200))
        return np.broadcast_to(base.astype(np.float32), (h, w, 3)), base
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


def draw(
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
    flat = style == "gray"  # one colour from edge to edge
    width = 0.0
    if style == "other":
        width = rng.uniform(4, 6) if rng.random() < 0.5 else 0.0
    elif not flat and rng.random() < 0.35:
        width = rng.uniform(0.8, 3.6)
    if not flat and rng.random() < 0.06:  # a soft shadow
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
    texture = 1.0 if flat else rng.random()
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
    bright = luma(under)
    ink = np.full(3, rng.uniform(225, 255)) if bright < 128 else np.full(3, rng.uniform(0, 35))
    if rng.random() < 0.15:
        for _ in range(8):
            try_ink = rgb(COLORS[rng.integers(8)], rng)
            if abs(luma(try_ink) - bright) > 85:
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


def camera(canvas: Image.Image, style: str, rng: np.random.Generator) -> Image.Image:
    """What happens to a picture after it was drawn: blur, rescaling, JPEG, a little gain."""
    if style == "gray":
        return canvas
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
