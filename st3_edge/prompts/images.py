"""Pictures from outside, bounded before they are decoded."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import stat
import sys
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import ImageError, one_line
from . import image_files

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_JPEG_PIXELS = 4 * MAX_PIXELS  # read at half its size
MAX_ASPECT = 100
MIN_SIDE = 2

# Files that are open already: opening these waits for nobody.
_OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


@dataclass(frozen=True)
class RGB:
    """A decoded picture: `data` holds height * width * 3 bytes, row by row, red first. Raises ImageError for another
    number of bytes, of which native code would read too many."""

    width: int
    height: int
    data: bytes

    def __post_init__(self) -> None:
        sides = (self.width, self.height)
        if not all(isinstance(n, int) and n > 0 for n in sides) or not isinstance(self.data, bytes):
            raise ImageError("an RGB picture has two sides, whole numbers above 0, and bytes")
        if len(self.data) != self.width * self.height * 3:
            raise ImageError(f"an RGB picture of {self.width}×{self.height} has not {len(self.data):,} bytes")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels, in hex: equal for equal pictures, wherever they came from."""
        return hashlib.sha256(f"{self.width}x{self.height}:".encode() + self.data).hexdigest()


ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | RGB


def load(source: ImageSource) -> RGB:
    """Decodes a path, bytes of a picture file, a `data:` or `file:` URL, or a PIL image; what is decoded already is
    returned.

    EXIF rotation is applied, transparency is laid on white, and of an animation the first frame is taken. Nothing is
    fetched from a network. Raises ImageError for what is no picture, is damaged, or is outside the bounds: at most
    MAX_BYTES and MAX_PIXELS (a JPEG of up to MAX_JPEG_PIXELS is read at half its size), sides of at least MIN_SIDE, one
    side at most MAX_ASPECT times the other.
    """
    if isinstance(source, RGB):
        _check_size(source.width, source.height, "picture")
        return source
    if isinstance(source, Image.Image):
        return _to_picture(source, "picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(bytes(source), "picture")
    scheme = source.partition(":")[0].lower() if isinstance(source, str) else ""
    if isinstance(source, str) and scheme == "data":
        return _open(_data_url(source), "picture of the data URL")
    if isinstance(source, (str, os.PathLike)):
        return _open(_read(source), f"picture {_name(source)}")
    raise ImageError(f"a picture is a path, bytes, a data: URL or a PIL image, not {type(source).__name__}")


def file_of(source: str) -> Path | None:
    """The file that a picture on a command line is in; None: standard input, or a data: URL. Raises ImageError."""
    if source == "-" or source[:5].lower() == "data:":
        return None
    if source[:5].lower() != "file:":
        return Path(source)
    try:
        return _file_url(source)
    except ValueError as e:
        raise ImageError(f"picture {_name(source)} cannot be read: {one_line(e)}") from e


def load_argument(source: str) -> RGB:
    """`load` for a word of a command line, where - is standard input."""
    if source != "-":
        return load(source)
    return _open(_all_of(sys.stdin.buffer, MAX_BYTES), "picture from standard input")


def load_base64(text: str) -> RGB:
    """A picture file in base64 alone, as Ollama takes them, or what `load` takes. Raises ImageError as `load` does."""
    try:
        data = _unbase64(text.encode(errors="replace"))
        return _open(data, "picture in base64")
    except ImageError:
        if len(text) > 1000 and ":" not in text[:8]:  # no name of a file
            raise
    return load(text)


def as_source(text: str) -> str:
    """What `load` takes for what `load_base64` takes."""
    try:
        _open(_unbase64(text.encode(errors="replace")), "picture in base64")
    except ImageError:
        return text
    return f"data:;base64,{text}"


def data_url(path: str) -> str:
    """A picture file as a `data:` URL, which JSON can hold; one that is one already is returned. Raises ImageError as
    `load` does."""
    if path[:5].lower() == "data:":
        load(path)
        return path
    data = _read(path)
    _open(data, f"picture {_name(path)}")
    return "data:;base64," + base64.b64encode(data).decode()


def _name(source: str | os.PathLike[str]) -> str:
    text = str(source)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _read(source: str | os.PathLike[str]) -> bytes:
    name = _name(source)
    if isinstance(source, str) and source.partition("://")[0].lower() in ("http", "https", "ftp"):
        raise ImageError("pictures are not fetched from a network: download it, and give the file")
    try:
        is_url = isinstance(source, str) and source[:5].lower() == "file:"
        path = _file_url(str(source)) if is_url else Path(os.fsdecode(source))
        # Checked before it is opened: opening a pipe would wait for its writer.
        found = path.stat()
        is_open = stat.S_ISFIFO(found.st_mode) and str(path).startswith(_OPEN_FILES)
        if not stat.S_ISREG(found.st_mode) and not is_open:
            raise ImageError(f"picture {name} is not a file")
        with path.open("rb") as file:
            return _all_of(file, MAX_BYTES)
    except (OSError, ValueError, TypeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ImageError(f"picture {name} cannot be read: {one_line(reason)}") from e


def _all_of(file: BinaryIO, most: int) -> bytes:
    """What a file holds, and where that is more than `most` bytes, one more."""
    out = bytearray()
    # In pieces: read(n) asks for n bytes of memory, whatever comes.
    while len(out) <= most and (piece := file.read(min(most + 1 - len(out), 2**18))):
        out += piece
    return bytes(out)


def _file_url(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"a file: URL names no other machine, as {parts.netloc!r}")
    return Path(urllib.request.url2pathname(parts.path))


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data: URL of a picture has no ',' before its data")
    if len(body) > 4 * MAX_BYTES:
        raise ImageError(f"the picture of the data URL is larger than {MAX_BYTES >> 20} MiB")
    raw = urllib.parse.unquote_to_bytes(body.encode(errors="replace"))
    if "base64" not in (word.strip().lower() for word in header.split(";")[1:]):
        return raw
    return _unbase64(raw)


def _unbase64(raw: bytes) -> bytes:
    """Base64 of either alphabet, padded or not, with white space in it. Raises ImageError."""
    raw = raw.translate(bytes.maketrans(b"-_", b"+/")).strip()
    # A "+" that went through a form comes back as a space: with it the length is right, or no lines are alike.
    spaced, parts = raw.replace(b" ", b"+"), raw.split()
    raw = b"".join(parts)
    if not len(spaced) % 4 and (len(raw) % 4 or len({len(part) for part in parts[:-1]}) > 1):
        raw = spaced
    raw = raw.rstrip(b"=")
    if len(raw) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(f"the picture in base64 is larger than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as e:
        raise ImageError(f"the base64 of a picture is not valid: {one_line(e)}") from e


def _open(data: bytes, name: str) -> RGB:
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
    if not data:
        raise ImageError(f"{name} is empty")
    try:
        image = image_files.read(data, MAX_PIXELS)
    except image_files.NoPicture as e:
        more = f": {one_line(e)}" if str(e) else ""
        raise ImageError(f"{name} is no PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or HEIC picture{more}") from e
    with image:
        return _to_picture(image, name, data)


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{name} is {width}×{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size}: each side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size}: at most {MAX_PIXELS:,} in all are accepted (of a JPEG {MAX_JPEG_PIXELS:,})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{size}: one side may be at most {MAX_ASPECT} times the other")


def _to_picture(image: Image.Image, name: str, data: bytes = b"") -> RGB:
    """`data`: the file that the image was opened from."""
    _check_size(image.width, image.height, name)
    # Pillow scales to 16 bits what it reads from PNG and PPM as 32-bit numbers.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError(f"{name} has gray values of no known range: save it with 8 or 16 bits a pixel")
    try:
        image = image_files.pixels(image, data, MAX_PIXELS)
        with image_files.quiet():
            with suppress(Exception):  # damaged EXIF, which pixels do not need
                image = ImageOps.exif_transpose(image)
            rgb = _to_rgb(image)
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
