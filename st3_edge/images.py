"""Pictures from outside, bounded before they are decoded."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import os
import stat
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors import ImageError, one_line

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_ASPECT = 100
MIN_SIDE = 2

# Raster formats only: others of Pillow's run helper programs or hold more than a picture.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class RGB:
    """A decoded picture: `data` holds height * width * 3 bytes, row by row, red first."""

    width: int
    height: int
    data: bytes

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels, in hex: equal for equal pictures, wherever they came from."""
        return hashlib.sha256(f"{self.width}x{self.height}:".encode() + self.data).hexdigest()


ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | RGB


def load(source: ImageSource) -> RGB:
    """Decodes a path, bytes of a picture file, a `data:` URL, or a PIL image; what is decoded already is returned.

    EXIF rotation is applied, transparency is laid on white, and of an animation the first frame is taken. Nothing is
    fetched from a network. Raises ImageError for what is no picture, is damaged, or is outside the bounds: at most
    MAX_BYTES and MAX_PIXELS, sides of at least MIN_SIDE, one side at most MAX_ASPECT times the other.
    """
    if isinstance(source, RGB):
        return source
    if isinstance(source, Image.Image):
        return _decode(source, "picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(bytes(source), "picture")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open(_data_url(source), "picture of the data URL")
    if isinstance(source, str) and source.partition("://")[0].lower() in ("http", "https", "ftp"):
        raise ImageError("pictures are not fetched from a network: download it, and give the file")
    if isinstance(source, (str, os.PathLike)):
        return _open(_read(source), f"picture {_name(source)}")
    raise ImageError(f"a picture is a path, bytes, a data: URL or a PIL image, not {type(source).__name__}")


def data_url(path: str) -> str:
    """A picture file as a `data:` URL, which JSON can hold. Raises ImageError as `load` does."""
    data = _read(path)
    _open(data, f"picture {_name(path)}")
    return "data:;base64," + base64.b64encode(data).decode()


def _name(source: str | os.PathLike[str]) -> str:
    text = str(source)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _read(source: str | os.PathLike[str]) -> bytes:
    name = _name(source)
    try:
        # Checked before it is opened: opening a pipe would wait for its writer.
        found = Path(source).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(f"picture {name} is not a file")
        with Path(source).open("rb") as file:
            # read(n) asks for n bytes of memory, whatever the file holds.
            data = file.read(min(found.st_size, MAX_BYTES) + 1)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ImageError(f"picture {name} cannot be read: {one_line(reason)}") from e
    return data


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data: URL of a picture has no ',' before its data")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(f"the picture of the data URL is larger than {MAX_BYTES >> 20} MiB")
    raw = urllib.parse.unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as e:
        raise ImageError(f"the data: URL of a picture is not valid base64: {one_line(e)}") from e


def _open(data: bytes, name: str) -> RGB:
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
    if not data:
        raise ImageError(f"{name} is empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own bound is wider than ours; _check_size says it in our words.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as e:
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels: {one_line(e)}") from e
    except Exception as e:  # Pillow's readers raise many kinds for damaged headers
        raise ImageError(f"{name} is no PNG, JPEG, WebP, GIF, BMP, TIFF or PPM picture") from e
    with image:
        return _decode(image, name)


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{name} is {width}×{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size}: each side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size}: at most {MAX_PIXELS:,} in all are accepted")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{size}: one side may be at most {MAX_ASPECT} times the other")


def _decode(image: Image.Image, name: str) -> RGB:
    _check_size(image.width, image.height, name)
    # Pillow scales to 16 bits what it reads from PNG and PPM as 32-bit numbers.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError(f"{name} has gray values of no known range: save it with 8 or 16 bits a pixel")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except Exception as e:  # truncated or damaged data: OSError, SyntaxError, zlib.error, ...
        raise ImageError(f"{name} is damaged: {one_line(e)}") from e
    return RGB(rgb.width, rgb.height, rgb.tobytes())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would clip 16 bits at 255 instead of scaling them.
        wide: Any = np.asarray(image)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")
