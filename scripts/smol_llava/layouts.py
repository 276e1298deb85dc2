"""The kinds of scenes: things loose or to count, words, signs, receipts, tables; crowds and pages to train on."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from assets import COLORS
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from pictures import Layer, Painter


def cased(rng: random.Random, word: str) -> str:
    """A word as a sign or a label would have it."""
    return rng.choice((word, word.capitalize(), word.capitalize(), word.upper()))


def font(p: Painter, size: float) -> ImageFont.FreeTypeFont:
    """One of the style's faces."""
    return ImageFont.truetype(p.rng.choice(p.fonts), max(9, round(size)))


def scatter(p: Painter, names: list[str], low: float, high: float, cards: float, hide: float) -> None:
    """Put things where there is room."""
    rng = p.rng
    for name in names:
        size = math.exp(rng.uniform(math.log(low), math.log(high)))
        card = p.card_color(name) if rng.random() < cards else None
        layer = p.thing(name, size, len(p.scene.things) + 1, card)
        spot = p.place(layer, hide if rng.random() < 0.3 else 0.0)
        if spot:
            p.put(layer, spot, [(name, False, card)])


def draw_things(p: Painter) -> None:
    """One to eight different things."""
    n = p.rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8))
    high = {1: 260, 2: 150, 3: 130}.get(n, 100)
    scatter(p, p.rng.sample(p.a.names, n), 34 if n > 1 else 60, high, p.rng.choice((0, 0.3, 1)), 0.35)


def draw_count(p: Painter) -> None:
    """Several of each of one to three things."""
    rng, names = p.rng, []
    for name in rng.sample(p.a.names, rng.randint(1, 3)):
        names += [name] * rng.randint(1, 6)
    rng.shuffle(names)
    scatter(p, names[:10], 30, 74, rng.choice((0, 0, 0.5)), 0.0)


def label(p: Painter, words: list[str], size: float, card: str | None) -> tuple[Layer, str]:
    """A line of text, on a card or with ink that any ground lets through; returns its ink's name too."""
    from pictures import INKS, shade

    rng = p.rng
    below = card or rng.choice(list(COLORS))
    ink = rng.choice(INKS[below])
    line = p.text(words, font(p, size), shade(rng, ink, 10), len(p.scene.things) + 1)
    return p.on_card([line], shade(rng, below), max(2, round(size / 5))), ink


def add_words(p: Painter, n: int, low: float, high: float) -> None:
    """Loose labels."""
    rng = p.rng
    for _ in range(n):
        word = cased(rng, rng.choice(p.words)) if rng.random() < 0.8 else str(rng.randint(1, 9999))
        layer, ink = label(p, [word], math.exp(rng.uniform(math.log(low), math.log(high))), None)
        layer = layer.turned(rng.choice((0, 0, 0, rng.uniform(-12, 12))))
        spot = p.place(layer, 0.0)
        if spot:
            p.put(layer, spot, [(word, True, ink)])


def draw_mixed(p: Painter) -> None:
    """A few things and one to three words."""
    rng = p.rng
    add_words(p, rng.randint(1, 3), 14, 52)
    scatter(p, rng.sample(p.a.names, rng.randint(1, 4)), 36, 110, rng.choice((0, 0.5)), 0.0)


def draw_sign(p: Painter) -> None:
    """One sign of one to three lines, and perhaps a thing."""
    from pictures import INKS, shade

    rng = p.rng
    card = rng.choice(list(COLORS))
    ink = rng.choice(INKS[card])
    face, size = rng.choice(p.fonts), rng.uniform(16, 46)
    rows, new, layers = [], [], []
    case = rng.choice((str, str.capitalize, str.upper))
    for _ in range(rng.randint(1, 3)):
        words = [case(rng.choice(p.words)) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        f = ImageFont.truetype(face, round(size))
        while len(words) > 1 and f.getlength(" ".join(words)) > 290:
            words.pop()
        if f.getlength(words[0]) > 290:
            continue
        layers.append(p.text(words, f, shade(rng, ink, 10), len(p.scene.things) + len(new) + 1))
        rows.append([" ".join(words)])
        new += [(w, True, ink) for w in words]
    if layers:
        sign = p.on_card(layers, shade(rng, card), round(size / 3))
        sign = sign.turned(rng.choice((0, 0, rng.uniform(-7, 7))))
        spot = p.place(sign)
        if spot:
            p.put(sign, spot, new)
            p.scene.lines = rows
    scatter(p, rng.sample(p.a.names, rng.randint(0, 2)), 40, 110, 0.2, 0.0)


def draw_receipt(p: Painter) -> None:
    """A paper with things and their prices, and perhaps their sum."""
    from pictures import Layer, shade

    rng = p.rng
    size = rng.uniform(11, 20)
    f = font(p, size)
    names = [n for n in p.a.names if len(n) < 14]
    items = [(cased(rng, n), rng.randint(10, 999)) for n in rng.sample(names, rng.randint(2, 5))]
    rows = [[n, f"{c / 100:.2f}"] for n, c in items]
    if rng.random() < 0.6:
        rows.append(["TOTAL", f"{sum(c for _, c in items) / 100:.2f}"])
    if rng.random() < 0.5:
        rows.insert(0, [rng.choice(p.words).upper()])
    tint, ink = shade(rng, "white", 9), shade(rng, "black", 30)
    widest = max(f.getlength("  ".join(r)) for r in rows)
    width = min(300, round(widest + rng.uniform(14, 60)))
    layers, new = [], []
    for row in rows:
        strip = None
        for k, cell in enumerate(row):
            words = cell.split()
            part = p.text(words, f, ink, len(p.scene.things) + len(new) + 1)
            if strip is None:
                blank = Image.new("RGBA", (width, part.image.height), (*tint, 255))
                strip = Layer(blank, part.owner * 0)
                strip.owner.resize((part.image.height, width), refcheck=False)
                strip.owner[:] = 0
            x = 2 if k == 0 else width - part.image.width - 2
            if x < 0 or part.image.width > width:
                return draw_sign(p)
            p.paste_into(strip, part, x, 0)
            new += [(w, True, "black") for w in words]
        layers.append(strip)
    paper = p.on_card(layers, tint, round(size / 4), align=0)
    paper = paper.turned(rng.choice((0, 0, rng.uniform(-4, 4))))
    spot = p.place(paper)
    if not spot:
        return draw_sign(p)
    p.put(paper, spot, new)
    p.scene.lines = rows
    scatter(p, rng.sample(p.a.names, rng.randint(0, 1)), 30, 70, 0, 0.0)
    return None


def draw_table(p: Painter) -> None:
    """A table of two to four rows and columns; cells are words, numbers or small things."""
    from pictures import Layer, shade

    rng = p.rng
    rows, columns = rng.randint(2, 4), rng.randint(2, 3)
    w, h = rng.randint(78, 104), rng.randint(36, 70)
    f = font(p, rng.uniform(13, 20))
    import numpy as np

    tint = shade(rng, rng.choice(("white", "white", "yellow", "pink")), 9)
    ink = shade(rng, rng.choice(("black", "blue")), 12)
    table = Layer(
        Image.new("RGBA", (w * columns + 2, h * rows + 2), (*tint, 255)),
        np.zeros((h * rows + 2, w * columns + 2), np.int16),
    )
    draw = ImageDraw.Draw(table.image)
    new, lines = [], []
    for r in range(rows):
        lines.append([])
        for c in range(columns):
            draw.rectangle((c * w, r * h, (c + 1) * w, (r + 1) * h), outline=(90, 90, 90, 255))
            number = len(p.scene.things) + len(new) + 1
            kind = rng.choice(("word", "word", "number", "thing"))
            word = cased(rng, rng.choice(p.words)) if kind == "word" else str(rng.randint(1, 999))
            if kind != "thing" and f.getlength(word) < w - 8:
                part, entry = p.text([word], f, ink, number), (word, True, None)
            else:
                name = rng.choice(p.a.names)
                part, entry = p.thing(name, h * 0.72, number, None), (name, False, None)
                if part.image.width > w - 4 or part.image.height > h - 4:
                    lines[-1].append("")
                    continue
            x, y = c * w + (w - part.image.width) // 2, r * h + (h - part.image.height) // 2
            p.paste_into(table, part, max(0, x), max(0, y))
            new.append(entry)
            lines[-1].append(entry[0])
    spot = p.place(table)
    if spot:
        p.put(table, spot, new)
        p.scene.lines = lines


def draw_crowd(p: Painter) -> None:
    """Many things and words, for the vision encoder's labels; nothing is asked about it."""
    rng = p.rng
    scatter(p, [rng.choice(p.a.names) for _ in range(rng.randint(4, 18))], 26, 110, 0.25, 0.3)
    add_words(p, rng.randint(3, 14), 10, 40)


def draw_page(p: Painter) -> None:
    """Lines of print, for the vision encoder's labels."""
    from pictures import INKS, shade

    rng = p.rng
    for _ in range(rng.randint(2, 4)):
        card = rng.choice(list(COLORS))
        ink = rng.choice(INKS[card])
        f, layers, new = font(p, math.exp(rng.uniform(math.log(10), math.log(30)))), [], []
        for _ in range(rng.randint(1, 5)):
            words = [
                cased(rng, rng.choice(p.words)) if rng.random() < 0.75 else f"{rng.randint(0, 99999) / 100:.2f}"
                for _ in range(rng.randint(1, 4))
            ]
            if f.getlength(" ".join(words)) > 300:
                words = words[:1]
            layers.append(p.text(words, f, shade(rng, ink, 12), len(p.scene.things) + len(new) + 1))
            new += [(w, True, ink) for w in words]
        block = p.on_card(layers, shade(rng, card), rng.randint(2, 8), align=rng.choice((0, 0.5)))
        block = block.turned(rng.choice((0, 0, rng.uniform(-8, 8))))
        spot = p.place(block, 0.0)
        if spot:
            p.put(block, spot, new)
    scatter(p, [rng.choice(p.a.names) for _ in range(rng.randint(0, 5))], 30, 90, 0.2, 0.0)


DRAW = {
    "things": draw_things,
    "count": draw_count,
    "mixed": draw_mixed,
    "sign": draw_sign,
    "receipt": draw_receipt,
    "table": draw_table,
    "crowd": draw_crowd,
    "page": draw_page,
}
