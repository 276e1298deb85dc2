"""What was seen, as one PNG picture."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...errors import one_line
from ...report import layers
from .patches import View
from .seen import Seen

# Over a patch that is gone; a colour that neither light nor dark pictures are full of, and how much of it is laid on.
GONE, GONE_ALPHA = (96, 100, 112), 0.86

_WIDTH, _MARGIN, _GAP, _COLUMNS = 1400, 40, 20, 5
_PANEL = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
_PANELS = 10  # of a view: a picture of one panel a layer would be endless
_INK, _SOFT, _GROUND = (31, 35, 40), (89, 99, 110), (255, 255, 255)
_TITLE, _TEXT, _SMALL = 34, 26, 20

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# The first that has all letters of a text; what Pillow brings along has little beside ASCII.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "LiberationSans-Regular.ttf")
_PLAIN = {"×": "x", "–": "-"}  # ours, for a font that lacks them


def png(seen: Seen) -> bytes:
    """The picture: question and answer, the patches that each stage held when the answer began, and, where more left
    then, along the answer."""
    blocks = [_text(seen.question, _TITLE), _text(f"Answer: {seen.report.answer or 'none'}", _TEXT, lines=4)]
    if seen.notice:
        blocks.append(_text(seen.notice, _TEXT, lines=4))
    for picture in seen.pictures:
        for view in picture.views:
            blocks += _view(seen, view, f"{picture.name}, {view.name}" if view.name else picture.name)
    facts = [_text(f"{term}: {fact}", _SMALL, _SOFT) for term, fact in seen.facts()]
    if seen.unknown:
        blocks.append(_text(f"The patches are not shown: {seen.unknown}.", _SMALL))
        facts = [_text(line, _SMALL) for line in counts(seen)] + facts
    sheet = ImageOps.expand(_stack([*blocks, _stack(facts, 2)], _GAP), _MARGIN, _GROUND)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def counts(seen: Seen) -> list[str]:
    """For each stage, how many visual tokens it held at the first and at the last token of the answer."""
    first, last = (seen.held(step).sum(axis=1) for step in (0, seen.n_steps - 1))
    return [
        f"{layers(stage)}: {a} of {seen.given} visual tokens when the answer began, {b} at its last token"
        for stage, a, b in zip(seen.stages, first, last, strict=True)
    ]


def overlay(view: View, held: npt.NDArray[np.float64], cell: int) -> Image.Image:
    """A view with patches of `cell` pixels' side; `held` [rows][columns]: how much of each patch is shown, 0 to 1."""
    rows, columns = view.tokens.shape
    picture = Image.fromarray(view.pixels).resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)
    alpha = GONE_ALPHA * (1 - np.kron(held, np.ones((cell, cell))))[..., None]
    return Image.fromarray(np.round(np.asarray(picture) * (1 - alpha) + np.array(GONE) * alpha).astype(np.uint8))


def mosaic(seen: Seen, owners: npt.NDArray[np.int64], cell: int) -> Image.Image:
    """Patches of `cell` pixels' side: in each place that of the token that `owners` [rows][columns] names, -1: none."""
    rows, columns = owners.shape
    out = Image.new("RGB", (columns * cell, rows * cell), GONE)
    for (y, x), token in np.ndenumerate(owners):
        if token >= 0:
            patch = Image.fromarray(seen.patches[int(token)])
            out.paste(patch.resize((cell, cell), Image.Resampling.BOX), (x * cell, y * cell))
    return out


def _view(seen: Seen, view: View, name: str) -> list[Image.Image]:
    rows, columns = view.tokens.shape
    cell = max(1, _PANEL // columns)
    held = seen.held(0)[:, view.tokens]  # [stages][rows][columns]
    firsts = [i for i in range(len(held)) if i == 0 or (held[i] != held[i - 1]).any()]  # a cut may leave all
    shown = [firsts[i] for i in _spread(len(firsts), _PANELS)]
    some = f" ({len(shown)} of {len(firsts)} panels)" if len(shown) < len(firsts) else ""
    out = [_text(f"{name}, {columns} × {rows} patches: those that layers hold when the answer begins{some}", _TEXT)]
    panels, mosaics = [], []
    for i in shown:
        n = np.count_nonzero(held[i])
        end = next((k for k in firsts if k > i), len(held))
        alike = layers(range(seen.stages[i].start, seen.stages[end - 1].stop))
        caption = f"{alike}: {'all' if n == view.tokens.size else f'{n} of'} {view.tokens.size}"
        panels.append((overlay(view, held[i].astype(float), cell), [caption]))
        if seen.owners is not None and n < view.tokens.size:
            owners = seen.owners[i][view.tokens]
            most = max(np.unique(owners[owners >= 0], return_counts=True)[1], default=0)
            mosaics.append((mosaic(seen, owners, cell), [f"{alike}: one stands for up to {most}"]))
    out += _rows(panels)
    if mosaics:
        out.append(_text("What they stand for: in place of each patch, the kept one that has its weight", _TEXT))
        out += _rows(mosaics)

    weights = [len(stage) for stage in seen.stages]
    first, last = (seen.held(step)[:, view.tokens] for step in (0, seen.n_steps - 1))
    if seen.n_steps < _COLUMNS or (first == last).all():
        return out
    out.append(
        _text("Along the answer, what is held then: the more layers hold a patch, the more of it is shown", _TEXT)
    )
    panels = []
    for step in _spread(seen.n_steps, _COLUMNS):
        share = np.average(seen.held(step)[:, view.tokens], axis=0, weights=weights)
        said = "".join(seen.trace.pieces[:step])
        caption = f"token {step + 1} of {seen.n_steps}: {share.mean():.0%}"
        panels.append((overlay(view, share, cell), [caption, f"{said} …" if step else "(nothing said yet)"]))
    return out + _rows(panels)


def _spread(n: int, most: int) -> list[int]:
    """0 to n - 1, or `most` of them, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def _rows(panels: Sequence[tuple[Image.Image, list[str]]]) -> list[Image.Image]:
    """Panels with the lines below them, in rows."""
    out = []
    for i in range(0, len(panels), _COLUMNS):
        cells = []
        for picture, (first, *rest) in panels[i : i + _COLUMNS]:
            soft = [_text(line, _SMALL, _SOFT, _PANEL, tail=True) for line in rest]
            cells.append(_stack([picture, _text(first, _SMALL, width=_PANEL), *soft], 4))
        row = Image.new("RGB", (_WIDTH - 2 * _MARGIN, max(cell.height for cell in cells)), _GROUND)
        for k, cell in enumerate(cells):
            row.paste(cell, (k * (_PANEL + _GAP), 0))
        out.append(row)
    return out


def _stack(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Parts below each other."""
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    out = Image.new("RGB", (max(part.width for part in parts), height), _GROUND)
    y = 0
    for part in parts:
        out.paste(part, (0, y))
        y += part.height + gap
    return out


def _text(
    text: str,
    size: int,
    ink: tuple[int, int, int] = _INK,
    width: int = _WIDTH - 2 * _MARGIN,
    lines: int = 2,
    tail: bool = False,
) -> Image.Image:
    """Text in lines of `width`; of more than `lines` the beginning is shown, or with `tail` the end."""
    font = _font(size, text := one_line(text))
    text = "".join(letter if _has(font, letter) else _PLAIN.get(letter, letter) for letter in text)
    wrapped = _wrap(text, font, width)
    if tail and len(wrapped) > lines:
        first, *rest = wrapped[-lines:]
        while font.getlength("… " + first) > width:
            first = first.partition(" ")[2] or first[1:]
        wrapped = ["… " + first, *rest]
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while font.getlength(last + " …") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + " …"]
    step = round(size * 1.35)
    out = Image.new("RGB", (width, step * len(wrapped)), _GROUND)
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(wrapped):
        draw.text((0, i * step), line, ink, font)
    return out


def _wrap(text: str, font: _Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:  # what has no spaces breaks where it must
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line] or [""]


def _font(size: int, text: str) -> _Font:
    fonts = _fonts(size)
    return next((font for font in fonts if all(_has(font, letter) for letter in set(text))), fonts[0])


@functools.cache
def _fonts(size: int) -> list[_Font]:
    """Those of _FONTS that this machine has, and Pillow's own."""
    out: list[_Font] = []
    for name in _FONTS:
        with contextlib.suppress(OSError):
            # Raqm, the other engine, fails for some texts, and is not everywhere.
            out.append(ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC))
    return [*out, ImageFont.load_default(size)]


@functools.lru_cache(maxsize=4096)
def _has(font: _Font, letter: str) -> bool:
    drawn, missing = font.getmask(letter), font.getmask("\U0010ffff")
    return letter == " " or drawn.size != missing.size or bytes(drawn) != bytes(missing)
