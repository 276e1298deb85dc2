"""Where the visual tokens of a picture lie in it: the picture as LLaVA's vision encoder sees it, and its patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import ModelError
from ...files.gguf import Header
from ...prompts.images import RGB

Pixels = npt.NDArray[np.uint8]

# As upstream's mtmd pads (tools/mtmd/clip.cpp): LLaVA-1.5's pictures, and the ones that LLaVA-1.6 cuts into tiles.
_PAD, _PAD_TILES = (122, 116, 104), (0, 0, 0)
_MAX_SIDE = 8192  # upstream's bound of image_size


@dataclass(frozen=True)
class View:
    """name: "", or which of LLaVA-1.6's two views of a picture it is; pixels: uint8 [height][width][3], what the
    encoder sees; tokens: int64 [rows][columns], for each patch of `pixels`, row by row, the index of its visual token
    among those of the picture."""

    name: str
    pixels: Pixels
    tokens: npt.NDArray[np.int64]

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return len(self.pixels) // len(self.tokens)


def views(picture: RGB, mmproj: Header) -> list[View]:
    """What the vision encoder of an mmproj file sees of a picture.

    LLaVA-1.5: the picture, padded to a square. LLaVA-1.6, where the file names its resolutions: the whole picture
    squeezed into a square, and a larger picture's tiles, put together again. Raises ModelError where the file does not
    say, or has another projector than LLaVA's: then it is not known where its visual tokens lie.
    """
    kind = mmproj.metadata.get("clip.projector_type")
    if kind != "mlp":
        raise ModelError(f"where visual tokens lie is known for LLaVA's projector 'mlp', not for {kind!r}")
    side, patch = (mmproj.metadata.get(f"clip.vision.{key}") for key in ("image_size", "patch_size"))
    if not (isinstance(side, int) and isinstance(patch, int) and 0 < patch <= side <= _MAX_SIDE):
        raise ModelError(f"the mmproj file gives no size of pictures and patches: {side!r}, {patch!r}")
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.data)
    resolutions = tuple(int(n) for n in mmproj.arrays.get("clip.vision.image_grid_pinpoints", ()))
    if not resolutions:
        return [_assemble("", _fit(image, side, side, _PAD), side, patch, 0)]
    small = _resize(image, side, side)
    if max(picture.width, picture.height) <= side:
        return [_assemble("whole", small, side, patch, 0)]
    width, height = _best(picture.width, picture.height, resolutions)
    if width % side or height % side:
        raise ModelError(f"the mmproj file's resolution {width}×{height} is no multiple of its tiles of {side}")
    tiles = _assemble("tiles", _fit(image, width, height, _PAD_TILES), side, patch, 0)
    # Upstream's mtmd gives the decoder the tiles first.
    return [_assemble("whole", small, side, patch, tiles.tokens.size), tiles]


def _assemble(name: str, image: Image.Image, side: int, patch: int, first: int) -> View:
    """A view of tiles of side × side, row by row, whose tokens count from `first`."""
    n = side // patch  # a rest of the side is never looked at
    columns, rows = image.width // side, image.height // side
    pixels = np.asarray(image).reshape(rows, side, columns, side, 3)[:, : n * patch, :, : n * patch]
    tokens = first + np.arange(rows * columns * n * n).reshape(rows, columns, n, n).swapaxes(1, 2)
    return View(name, pixels.reshape(rows * n * patch, columns * n * patch, 3), tokens.reshape(rows * n, columns * n))


def _fit(image: Image.Image, width: int, height: int, ground: tuple[int, int, int]) -> Image.Image:
    """The picture as large as it fits into width × height, in the middle of `ground`; upstream's `img_tool::resize`."""
    if image.size == (width, height):
        return image
    # In 32 bits as upstream: the double's ceiling is another one now and then.
    scale = min(np.float32(width) / np.float32(image.width), np.float32(height) / np.float32(image.height))
    new_width = min(int(np.ceil(np.float32(image.width) * scale)), width)
    new_height = min(int(np.ceil(np.float32(image.height) * scale)), height)
    out = Image.new("RGB", (width, height), ground)
    out.paste(_resize(image, new_width, new_height), ((width - new_width) // 2, (height - new_height) // 2))
    return out


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    # Pillow takes the cheaper direction first; upstream rounds after the horizontal one.
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def _best(width: int, height: int, resolutions: tuple[int, ...]) -> tuple[int, int]:
    """Upstream's `select_best_resolution`: where most of the picture's pixels are left, and of those the smallest."""
    best, most, least = (0, 0), 0, 0
    for w, h in zip(resolutions[::2], resolutions[1::2], strict=False):
        if not (0 < w <= _MAX_SIDE and 0 < h <= _MAX_SIDE):
            raise ModelError(f"the mmproj file gives an impossible resolution: {w}×{h}")
        scale = min(np.float32(w) / np.float32(width), np.float32(h) / np.float32(height))
        left = min(int(np.float32(width) * scale) * int(np.float32(height) * scale), width * height)
        if left > most or (left == most and w * h - left < least):
            best, most, least = (w, h), left, w * h - left
    return best
