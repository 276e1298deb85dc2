"""Scenes of named things and words on backgrounds, and what every patch of them shows.

`scene(assets, index, split, style)` always draws the same picture for the same arguments. Splits never
share a seed; style `other` uses backgrounds, typefaces and pairings of thing and card that `known`
scenes, the only ones trained on, never show. numpy and Pillow only.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from assets import COLORS, Assets, kept_out
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIDE, PATCH = 336, 14
GRID = SIDE // PATCH
SPLITS = ("train", "held-out", "demo")
STYLES = ("known", "other")
LAYOUTS = {"things": 30, "count": 14, "mixed": 20, "sign": 12, "receipt": 12, "table": 12}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:$-%'!&+/#"
SLOTS = 3  # characters that a patch can name
GROUNDS = {"known": ("plain", "gradient", "photo", "checks", "stripes", "noise"), "other": ("dots", "rings", "photo")}
INKS = {"white": ("black", "blue", "red", "green", "purple", "brown"), "black": ("white", "yellow", "pink", "orange")}
INKS |= {"yellow": ("black", "blue", "red", "purple"), "blue": ("white", "yellow"), "red": ("white", "yellow", "black")}
INKS |= {"green": ("white", "yellow", "black"), "pink": ("black", "purple", "blue"), "gray": ("black", "white")}
INKS |= {"orange": ("black", "white", "blue"), "brown": ("white", "yellow"), "purple": ("white", "yellow")}


@dataclass
class Thing:
    """One thing or one word of a scene."""

    name: str  # of the thing, or the word as it is drawn
    word: bool
    color: str | None  # of the card below a thing; of a word's ink
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    hidden: float = 0.0  # share that later things cover

    @property
    def center(self) -> tuple[float, float]:
        """x, y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def place(self) -> str:
        """Which ninth of the picture the centre is in."""
        x, y = (min(2, int(c * 3 / SIDE)) for c in self.center)
        return PLACES[y * 3 + x]


@dataclass
class Scene:
    """A picture, what is in it, and for prints its lines (each a list of cells)."""

    image: Image.Image
    layout: str
    things: list[Thing]
    lines: list[list[str]] = field(default_factory=list)
    owner: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE), np.int16))  # 1 + index of the thing
    letters: list[tuple[float, float, int]] = field(default_factory=list)  # x, y of the centre, number in CHARS


def shade(rng: random.Random, color: str, spread: int = 18) -> tuple[int, ...]:
    """A colour that is still called that."""
    return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in COLORS[color])


def ground(rng: random.Random, assets: Assets, style: str) -> Image.Image:
    """A background. Held-out photographs are every third one."""
    kind = rng.choice(GROUNDS[style])
    photos = [p for i, p in enumerate(assets.photos) if (i % 3 == 2) == (style == "other")]
    if kind == "photo" and photos:
        photo = rng.choice(photos)
        side = rng.randint(min(photo.size) // 3, min(photo.size))
        x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        image = photo.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image = image.filter(ImageFilter.GaussianBlur(rng.choice((0, 1, 3, 6))))
        return ImageEnhance.Contrast(image).enhance(rng.uniform(0.35, 0.9))
    a, b = (np.array([rng.randint(30, 250) for _ in range(3)], float) for _ in range(2))
    if rng.random() < 0.5:
        a = 200 + a / 5
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle = rng.uniform(0, math.pi)
    along, n = x * math.cos(angle) + y * math.sin(angle), rng.randint(3, 14)
    if kind in ("plain", "photo"):
        t = np.zeros((SIDE, SIDE))
    elif kind == "gradient":
        t = (along - along.min()) / np.ptp(along)
    elif kind == "checks":
        t = ((x * n).astype(int) + (y * n).astype(int)) % 2 * 0.3
    elif kind == "stripes":
        t = (along * n % 1 < 0.5) * 0.3
    elif kind == "rings":
        t = (np.hypot(x - rng.random(), y - rng.random()) * n % 1 < 0.4) * 0.3
    elif kind == "dots":
        t = (np.hypot(x * n % 1 - 0.5, y * n % 1 - 0.5) < 0.3) * 0.35
    else:
        k = rng.choice((8, 20, 60, 168))
        small = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (k, k), np.uint8)
        t = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255 * 0.5
    return Image.fromarray((a + (b - a) * t[..., None]).clip(0, 255).astype(np.uint8))


@dataclass
class Layer:
    """Something to be put on the picture: RGBA, whose pixels belong to which thing (0 none), its letters."""

    image: Image.Image
    owner: np.ndarray
    letters: list[tuple[float, float, int]] = field(default_factory=list)

    def turned(self, degrees: float) -> Layer:
        """Turned counter-clockwise about its middle, with room for the corners."""
        if not degrees:
            return self
        w, h = self.image.size
        image = self.image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        owner = np.asarray(Image.fromarray(self.owner).rotate(degrees, expand=True))
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        move = [
            ((x - w / 2) * c + (y - h / 2) * s + image.width / 2, (y - h / 2) * c - (x - w / 2) * s + image.height / 2)
            for x, y, _ in self.letters
        ]
        return Layer(image, owner, [(*p, n) for p, (_, _, n) in zip(move, self.letters, strict=True)])


class Painter:
    """Draws one scene."""

    def __init__(self, assets: Assets, rng: random.Random, style: str) -> None:
        self.a, self.rng, self.style = assets, rng, style
        self.scene = Scene(ground(rng, assets, style), "", [])
        self.fonts = assets.side("fonts", style == "other") or assets.fonts
        self.words = assets.side("words", style == "other") or assets.words
        self.sizes: list[int] = []  # pixels of each thing as it was drawn

    def card_color(self, name: str) -> str | None:
        """A card for a thing: one of the pairings of this style; None where it has none."""
        fitting = [c for c in COLORS if kept_out(f"{c} {name}") == (self.style == "other")]
        return self.rng.choice(fitting) if fitting else None

    def thing(self, name: str, size: float, number: int, card: str | None) -> Layer:
        """The picture of a thing, `size` pixels across, owned by thing `number` of the scene."""
        rng = self.rng
        picture = self.a.pictures[self.a.index[name] - 1]
        k = size / max(picture.size)
        w, h = max(4, round(picture.width * k)), max(4, round(picture.height * k))
        picture = picture.resize((w, h), Image.Resampling.LANCZOS)
        if name not in self.a.thin and rng.random() < 0.4:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.rotate(rng.choice((0, 0, rng.uniform(-25, 25))), Image.Resampling.BICUBIC, expand=True)
        if rng.random() < 0.3:
            alpha = picture.getchannel("A")
            picture = ImageEnhance.Brightness(picture.convert("RGB")).enhance(rng.uniform(0.7, 1.2))
            picture.putalpha(alpha)
        edge = round(size * 0.14) if card else 0
        image = Image.new("RGBA", (picture.width + 2 * edge, picture.height + 2 * edge))
        if card:
            box = (0, 0, image.width - 1, image.height - 1)
            ImageDraw.Draw(image).rounded_rectangle(box, size * rng.choice((0, 0.1)), (*shade(rng, card), 255))
        image.alpha_composite(picture, (edge, edge))
        solid = np.asarray(image.getchannel("A")) > 100
        return Layer(image, solid.astype(np.int16) * number)

    def text(self, words: list[str], font: ImageFont.FreeTypeFont, ink: tuple[int, ...], first: int) -> Layer:
        """A line of words, owned by things `first`, `first` + 1 and so on."""
        line = " ".join(words)
        ascent, descent = font.getmetrics()
        image = Image.new("RGBA", (math.ceil(font.getlength(line)) + 4, ascent + descent + 2), (*ink, 0))
        draw = ImageDraw.Draw(image)
        draw.text((2, 1), line, font=font, fill=(*ink, 255))
        owner, letters, at = np.zeros(image.size[::-1], np.int16), [], 0
        top, bottom = font.getbbox(line)[1] + 1, font.getbbox(line)[3] + 1
        for k, word in enumerate(words):
            ends = [2 + font.getlength(line[: at + j]) for j in range(len(word) + 1)]
            owner[max(0, top) : bottom, int(ends[0]) : math.ceil(ends[-1])] = first + k
            middle = (top + bottom) / 2
            letters += [
                ((p + q) / 2, middle, CHARS.index(c) + 1)
                for p, q, c in zip(ends, ends[1:], word, strict=False)
                if c in CHARS
            ]
            at += len(word) + 1
        return Layer(image, owner, letters)

    def on_card(self, layers: list[Layer], card: tuple[int, ...], gap: int, align: float = 0.5) -> Layer:
        """Lines below each other on a card."""
        w = max(x.image.width for x in layers) + 2 * gap
        h = sum(x.image.height for x in layers) + gap * (len(layers) + 1)
        out = Layer(Image.new("RGBA", (w, h), (*card, 255)), np.zeros((h, w), np.int16))
        y = gap
        for x in layers:
            self.paste_into(out, x, round((w - x.image.width) * align) if align != 0 else gap, y)
            y += x.image.height + gap
        return out

    @staticmethod
    def paste_into(below: Layer, top: Layer, x: int, y: int) -> None:
        """Compose a layer onto a layer; the part outside is lost."""
        below.image.alpha_composite(top.image, (x, y))
        h, w = below.owner[y : y + top.owner.shape[0], x : x + top.owner.shape[1]].shape
        part = top.owner[:h, :w]
        np.copyto(below.owner[y : y + h, x : x + w], part, where=part > 0)
        below.letters += [(p + x, q + y, n) for p, q, n in top.letters]

    def place(self, layer: Layer, hide: float = 0.05, tries: int = 30) -> tuple[int, int] | None:
        """A spot where at most `hide` of any earlier thing would be covered; None if none is found."""
        w, h = layer.image.size
        if w > SIDE or h > SIDE:
            return None
        counts = np.bincount(self.scene.owner.ravel(), minlength=2)
        for _ in range(tries):
            x, y = self.rng.randint(0, SIDE - w), self.rng.randint(0, SIDE - h)
            under = np.bincount(self.scene.owner[y : y + h, x : x + w].ravel(), minlength=len(counts))
            if all(u <= hide * c for u, c in zip(under[1:], counts[1:], strict=True) if c):
                return x, y
        return None

    def put(self, layer: Layer, at: tuple[int, int], new: list[tuple[str, bool, str | None]]) -> None:
        """Draw a layer on the picture and record its things: (name, word, colour) each."""
        s, (x, y) = self.scene, at
        solid = np.asarray(layer.image.getchannel("A")) > 100
        s.image.paste(layer.image, (x, y), layer.image)
        area = s.owner[y : y + solid.shape[0], x : x + solid.shape[1]]
        area[solid] = layer.owner[solid]
        s.letters = [
            (p, q, n)
            for p, q, n in s.letters
            if not (
                0 <= int(q) - y < solid.shape[0] and 0 <= int(p) - x < solid.shape[1] and solid[int(q) - y, int(p) - x]
            )
        ]
        s.letters += [(p + x, q + y, n) for p, q, n in layer.letters]
        for name, word, color in new:
            rows, columns = np.nonzero(layer.owner == len(s.things) + 1)
            if not len(rows):  # print so small that turning lost it
                rows = columns = np.zeros(1, int)
            box = (
                float(columns.min() + x),
                float(rows.min() + y),
                float(columns.max() + x + 1),
                float(rows.max() + y + 1),
            )
            s.things.append(Thing(name, word, color, box))
            self.sizes.append(len(rows))

    def paint(self, layout: str) -> Scene:
        """Draw a scene of that layout."""
        from layouts import DRAW

        self.scene.layout = layout
        DRAW[layout](self)
        left = np.bincount(self.scene.owner.ravel(), minlength=len(self.sizes) + 1)[1:]
        for t, was, now in zip(self.scene.things, self.sizes, left, strict=True):
            t.hidden = 1 - now / max(1, was)
        return self.scene


def scene(
    assets: Assets, index: int, split: str = "held-out", style: str = "known", layout: str | None = None
) -> Scene:
    """Scene number `index` of a split."""
    rng = random.Random(f"{split} {style} {index} {layout}")
    layout = layout or rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    out = Painter(assets, rng, style).paint(layout)
    if rng.random() < 0.25:
        out.image = out.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 8), (SIDE, SIDE, 3))
        out.image = Image.fromarray((np.asarray(out.image) + noise).clip(0, 255).astype(np.uint8))
    return out


@dataclass
class Labels:
    """What each patch shows, [24, 24, ...]."""

    thing: np.ndarray  # int16: 0 ground, else 1 + index into Scene.things
    chars: np.ndarray  # uint8 [24, 24, SLOTS]: characters whose centre is in the patch, left to right; 0 none
    offset: (
        np.ndarray
    )  # float16 [24, 24, 3]: from the patch to its thing's centre in patches / 12; log2 of its size / 48


def labels(s: Scene) -> Labels:
    """Labels of a scene's patches; a patch shows the thing that covers most of it, and at least an eighth."""
    tiles = s.owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    n = len(s.things) + 1
    key = tiles + np.arange(GRID * GRID)[:, None] * n
    counts = np.bincount(key.ravel(), minlength=GRID * GRID * n).reshape(-1, n)
    best = counts[:, 1:].argmax(1) + 1 if n > 1 else np.zeros(GRID * GRID, int)
    thing = np.where(counts[np.arange(GRID * GRID), best] >= PATCH * PATCH / 8, best, 0).astype(np.int16)
    thing = thing.reshape(GRID, GRID)
    chars = np.zeros((GRID, GRID, SLOTS), np.uint8)
    used = np.zeros((GRID, GRID), int)
    for x, y, c in sorted(s.letters):
        i, j = int(y) // PATCH, int(x) // PATCH
        if 0 <= i < GRID and 0 <= j < GRID and used[i, j] < SLOTS:
            chars[i, j, used[i, j]] = c
            used[i, j] += 1
    offset = np.zeros((GRID, GRID, 3), np.float16)
    for k, t in enumerate(s.things, 1):
        i, j = np.nonzero(thing == k)
        x, y = t.center
        size = max(t.box[2] - t.box[0], t.box[3] - t.box[1])
        offset[i, j] = np.stack(
            [
                (x / PATCH - j - 0.5) / 12,
                (y / PATCH - i - 0.5) / 12,
                np.full(len(i), math.log2(max(size, 4) / 48)),
            ],
            -1,
        )
    return Labels(thing, chars, offset)
