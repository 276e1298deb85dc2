"""Picture files to Pillow's images: what a viewer opens is opened, though Pillow by itself may refuse it.

Nothing process-wide of Pillow's is changed: no limits, no registered formats.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

# Raster formats only: others of Pillow's run helper programs or hold more than a picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Endings of names: of these formats, and of HEIC.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
)

_PNG = b"\x89PNG\r\n\x1a\n"
# All that pixels depend on; others hold text, colour profiles and the like, of any size.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_TAILS = (b"", *(bytes([a, b]) * 128 for a, b in ((0x55, 0xAA), (0x33, 0xCC), (0x0F, 0x69), (0x96, 0xE1))))
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class NoPicture(Exception):
    """Bytes that are none of the formats; the message says more where it is known."""


_quiet = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings; one thread after the other: each puts back the filters that it found."""
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(data: bytes, max_pixels: int) -> Image.Image:
    """Opens a picture file, as yet without its pixels; a JPEG of more than `max_pixels`, but not four times as many, at
    half its size. Raises NoPicture."""
    with quiet():
        try:
            image = _open(data)
        except NoPicture:
            if not data.startswith(_PNG):
                raise
            image = _open(_png_pixels(data))
        if data.startswith(_JPEG) and max_pixels < image.width * image.height <= 4 * max_pixels:
            # The decoder leaves out what half a size does not need.
            image.draft(None, (image.width // 2, image.height // 2))
        return image


def pixels(image: Image.Image, data: bytes, max_pixels: int) -> Image.Image:
    """The same image with its pixels; `data`: its file. Raises what Pillow raises for damage."""
    with quiet():
        try:
            image.load()
            return image
        except Exception:
            if data.startswith(_PNG):
                image = _open(_png_pixels(data))
                image.load()
                return image
            if data.startswith(_JPEG) and (ended := _ended(data, max_pixels)):
                return ended
            raise


def _open(data: bytes) -> Image.Image:
    Image.preinit()
    Image.init()
    reason = ""
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept and accept(data[:16]) is not True):
            continue
        try:
            # Not Image.open, whose limit of pixels is for the whole process.
            return factory(io.BytesIO(data), "")
        except Exception as e:  # Pillow's readers raise many kinds for damaged headers
            reason = str(e)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return _heif(data)
    raise NoPicture(reason)


def _heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as e:
        raise NoPicture("a HEIC picture needs pillow-heif: pip install pillow-heif") from e
    try:
        image: Image.Image = pillow_heif.HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call, unused-ignore]
    except Exception as e:
        raise NoPicture(str(e)) from e
    return image


def _png_pixels(data: bytes) -> bytes:
    """A PNG file with nothing but what its pixels depend on."""
    out = [_PNG]
    at = len(_PNG)
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] in _PNG_CHUNKS:
            out.append(data[at : at + 12 + size])
        at += 12 + size
    return b"".join(out)


def _ended(data: bytes, max_pixels: int) -> Image.Image | None:
    """A JPEG that lacks its end marker, if nothing but that is missing.

    Where pixels are missing, too, the decoder makes them up from whatever is put behind: several tails tell.
    """
    found = b""
    for tail in _JPEG_TAILS:
        # A lone first half of a marker would make another one with the tail.
        image = read(data.rstrip(b"\xff") + tail + _JPEG_END, max_pixels)
        try:
            image.load()
        except Exception:
            return None
        if found and image.tobytes() != found:
            return None
        found = image.tobytes()
    return image
