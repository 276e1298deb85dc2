"""Where the visual tokens of a picture lie in it: what the vision encoder sees of it, and its patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import ModelError
from ...prompts.images import RGB
from ...runtime.vision import Tile

Pixels = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

_NOWHERE = ("resampler", "deepseekocr2")  # projectors whose visual tokens are of the picture as a whole
_SMALL = 64  # pixels of a side at which arrangements of tiles are compared


@dataclass(frozen=True)
class View:
    """name: "", or which view of a picture in tiles it is; pixels: uint8 [height][width][3], what the encoder sees;
    tokens: int64 [rows][columns], for each patch of `pixels`, row by row, the index of its visual token among those of
    the picture."""

    name: str
    pixels: Pixels
    tokens: Places

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return len(self.pixels) // len(self.tokens)


def views(picture: RGB, tiles: Sequence[Tile], projector: str) -> list[View]:
    """What the vision encoder sees of a picture, in tiles as mtmd cuts it: the whole, and the tiles put together again.
    Raises ModelError where it is not known where visual tokens lie: with projectors that look at all of the picture for
    each, and where their number is that of no grid of square patches."""
    if projector in _NOWHERE:
        raise ModelError(f"visual tokens of the projector {projector!r} are of no place in the picture")
    seen, n = [], 0
    for tile in tiles:
        seen.append(_view("", tile, n))
        n += tile.n
    if len(seen) == 1:
        return seen
    image, aspect = (
        Image.frombytes("RGB", (picture.width, picture.height), picture.data),
        picture.width / picture.height,
    )

    def unlikeness(arrangement: list[View]) -> tuple[float, float]:
        errors = [min(_errors(image, view.pixels)) for view in arrangement]
        height, width = arrangement[1].pixels.shape[:2]
        return round(sum(errors), 5), abs(float(np.log(width / height / aspect)))

    return min(_arrangements(seen), key=unlikeness)


def _arrangements(seen: Sequence[View]) -> Iterator[list[View]]:
    """The whole picture, which comes first or last, and the other tiles in all grids that have so many."""
    for whole, tiles in ((seen[-1], seen[:-1]), (seen[0], seen[1:])):
        if len({(tile.pixels.shape, tile.tokens.shape) for tile in tiles}) > 1:
            continue
        for columns in (c for c in range(1, len(tiles) + 1) if len(tiles) % c == 0):
            rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
            pixels = np.concatenate([np.concatenate([tile.pixels for tile in row], 1) for row in rows])
            tokens = np.concatenate([np.concatenate([tile.tokens for tile in row], 1) for row in rows])
            yield [View("whole", whole.pixels, whole.tokens), View("tiles", pixels, tokens)]


def _view(name: str, tile: Tile, first: int) -> View:
    """A tile whose tokens count from `first`. A rest of a side that makes no patch is not shown."""
    height, width = tile.pixels.shape[:2]
    for ends in (0, 1, -1):  # tokens that end each row: none, one, or one but for the last row
        for patch in range(min(height, width), 0, -1):
            columns, rows = width // patch, height // patch
            if columns * rows + (rows * ends if ends >= 0 else rows - 1) == tile.n:
                at = np.arange(rows * (columns + abs(ends))).reshape(rows, -1)[:, :columns]
                return View(name, tile.pixels[: rows * patch, : columns * patch], first + at)
    raise ModelError(f"{tile.n} visual tokens of {width}×{height} pixels are no grid of square patches")


def _errors(picture: Image.Image, pixels: Pixels) -> Iterator[float]:
    """How unlike the picture what is seen is, if it was stretched, and if it was fitted into the middle of black."""
    seen = _small(Image.fromarray(np.ascontiguousarray(pixels)))
    yield float(np.square(seen - _small(picture)).mean())
    wide, high = pixels.shape[1] / picture.width, pixels.shape[0] / picture.height
    width, height = (max(1, round(_SMALL * min(wide, high) / scale)) for scale in (wide, high))
    ground = Image.new("RGB", (_SMALL, _SMALL))
    fitted = picture.resize((width, height), Image.Resampling.BOX)
    ground.paste(fitted, ((_SMALL - width) // 2, (_SMALL - height) // 2))
    yield float(np.square(seen - np.asarray(ground, np.float64) / 255).mean())


def _small(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX), np.float64) / 255
