"""Random pictures, whole and damaged, in every writing: each is refused in one line, or read as what it is."""

from __future__ import annotations

import base64
import io
import math
import random
import struct
import time
import urllib.parse
import zlib
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, features

from st3_edge import ImageError
from st3_edge.prompts.images import RGB, load

from . import isolated

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "1"),
    "PPM": ("RGB", "L"),
    "AVIF": ("RGB",),
}
_BATCH = 40


def _picture(rng: random.Random) -> tuple[str, Image.Image]:
    form = rng.choice(_FORMATS)
    width, height = rng.randint(2, 90), rng.randint(2, 90)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    if rng.random() < 0.5:
        image = image.resize((max(2, width // 8), max(2, height // 8))).resize((width, height))
    return form, image.convert(rng.choice(_MODES.get(form, ("RGB", "L", "RGBA", "P", "LA", "1"))))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _harmless(rng: random.Random, form: str, data: bytes) -> bytes:
    """The same picture in another file."""
    if form == "JPEG":
        return data[: -rng.choice((1, 2))] + bytes(rng.choice((0, 0, 9)))
    if form == "PNG":
        at = data.index(rng.choice((b"IDAT", b"IEND"))) - 4
        kind = rng.choice((b"zTXt", b"tEXt", b"iTXt", b"prVt"))
        size = rng.choice((10, 2**12, 3 * 2**20))
        body = b"key\0\0" + zlib.compress(bytes(size)) if kind == b"zTXt" else b"key\0\0\0\0\0" + b"x" * (size // 9)
        return data[:at] + _chunk(kind, body) + data[at:]
    return data


def _damaged(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not out:
            break
        at = rng.randrange(len(out))
        change = rng.randrange(5)
        if change == 0:
            out[at] = rng.randrange(256)
        elif change == 1:
            del out[at:]
        elif change == 2:
            out[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", struct.pack("<I", 2**31))
            )
        elif change == 3:
            out[at:at] = out[at : at + rng.randrange(64)]
        else:
            del out[at : at + rng.randrange(16)]
    return bytes(out)


def _source(rng: random.Random, data: bytes) -> Any:
    """Other ways to write these bytes."""
    text = base64.b64encode(data).decode()
    way = rng.randrange(7)
    head = rng.choice(("data:image/png;base64,", "data:;base64,", "DATA:image/x;q=1;BASE64,"))
    return (
        data,
        bytearray(data),
        head + text,
        head + text.rstrip("="),
        head + text.replace("+", "-").replace("/", "_"),
        head + "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "data:image/png," + urllib.parse.quote(data),
    )[way]


def _make(rng: random.Random) -> tuple[Any, str, bytes | None]:
    """A source, what was done to it, and the file that it must be read as (None: any, or none)."""
    form, image = _picture(rng)
    out = io.BytesIO()
    options = {"progressive": rng.random() < 0.3, "quality": rng.choice((30, 75, 95))} if form == "JPEG" else {}
    image.save(out, form, **options)
    data = out.getvalue()
    fate = rng.random()
    if fate < 0.25:
        return _source(rng, data), f"whole {form}", data
    if fate < 0.4:
        return _source(rng, _harmless(rng, form, data)), f"harmless {form}", data
    return _source(rng, _damaged(rng, data)), f"damaged {form}", None


def _check(made: tuple[Any, str, bytes | None]) -> str:
    source, what, same = made
    started = time.process_time()
    try:
        got = load(source)
    except ImageError as e:
        assert same is None, (what, str(e))
        assert "\n" not in str(e)
        assert len(str(e)) < 500
        return "refused"
    finally:
        assert time.process_time() - started < 10, what
    assert isinstance(got, RGB)
    assert len(got.data) == got.width * got.height * 3
    if same is not None:
        with Image.open(io.BytesIO(same)) as image:
            assert (got.width, got.height) == image.size, what
            if image.mode == "RGB":
                assert got.data == image.tobytes(), what
    return "read"


def run(rng: random.Random, seconds: float, most: float = math.inf) -> Counter[str]:
    """Tries pictures for so long, and about `most` of them; returns how many of what."""
    tried: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    load(b"P5 2 2 255\n" + bytes(4))  # imports what children need
    while isolated.until(end) and tried["inputs"] < most:
        batch = [_make(rng) for _ in range(_BATCH)]
        tried["inputs"] += len(batch)
        tried.update(isolated.each(_check, batch, 60))
    return tried
