"""Pictures from outside: bounded, and read right."""

import base64
import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ImageError
from st3_edge.images import MAX_BYTES, RGB, data_url, load


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(width: int = 7, height: int = 5, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    # broken if a way in rotated, recoded or swapped channels
    image = noise()
    data = encoded(image)
    file = tmp_path / "a picture.png"
    file.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = RGB(7, 5, image.tobytes())
    for source in (file, str(file), data, bytearray(data), memoryview(data), url, image):
        assert load(source) == expected


def test_exif_rotation_is_applied():
    # broken if a phone's upright photo reached the model lying
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees
    got = load(encoded(image, exif=exif))
    assert (got.width, got.height) == (5, 7)
    assert got.data == image.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    # broken if hidden pixels of transparent areas were shown
    image = noise(mode=mode)
    image.putalpha(0)
    assert set(load(encoded(image)).data) == {255}


def test_a_palette_with_transparency_is_laid_on_white():
    # broken if only modes with an alpha band were looked at
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    assert set(load(encoded(image, transparency=0)).data) == {255}


def test_sixteen_bits_are_scaled():
    # broken by Pillow's own conversion, which clips all above 255 to white
    gray = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert set(load(encoded(gray)).data) == {0x80}
    pgm = b"P5 4 4 65535\n" + b"\x80\x00" * 16
    assert set(load(pgm).data) == {0x80}
    assert set(load(b"P5 4 4 1023\n" + b"\x02\x00" * 16).data) == {0x80}
    assert set(load(Image.open(io.BytesIO(pgm))).data) == {0x80}


@pytest.mark.parametrize(("kind", "value"), [(np.int32, 30_000), (np.float32, 0.5)])
def test_gray_values_of_no_known_range_are_refused(kind, value):
    # broken if they were clipped: all white, or all black, and answered about
    gray = Image.fromarray(np.full((4, 4), value, kind))
    for source in (gray, encoded(gray, "TIFF")):
        with pytest.raises(ImageError, match="8 or 16 bits"):
            load(source)


def test_the_first_frame_of_an_animation_is_taken():
    # broken if the last one were
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    got = load(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert got.data[:3] == b"\xff\x00\x00"


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_common_formats_are_read(form):
    # broken if the list of formats lost one
    assert load(encoded(Image.new("RGB", (8, 8), "white"), form)).data == b"\xff" * 192


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (1, 1, "at least 2"),
        (30_000, 30_000, "pixels"),
        (8_000, 8_000, "8000×8000"),
        (10_000, 3, "100 times"),
        (2, 10_000, "100 times"),
        (2**31 - 1, 2**31 - 1, "pixels"),
    ],
)
def test_sizes_out_of_bounds_are_refused_before_decoding(width, height, says):
    # broken if pixels were allocated first: these files hold none, so decoding would say "damaged"
    with pytest.raises(ImageError, match=says):
        load(png_header(width, height))


def test_a_pil_image_is_bounded_too():
    # broken if only files were checked
    with pytest.raises(ImageError, match="at least 2"):
        load(Image.new("RGB", (1, 1)))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_refused(form, part):
    # broken if a half picture were answered about
    data = encoded(noise(64, 64), form)
    with pytest.raises(ImageError):
        load(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no picture",
        "data:image/png",
        "data:image/png;base64,!!!",
        "data:image/png;base64,AAAA",
        "http://example.org/a.png",
        "HTTPS://example.org/a.png",
        "no such file.png",
        "a\0b.png",
        "x" * 5000,
        ".",
        "/dev/zero",
        "",
        None,
        7,
        {"url": "a.png"},
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source):
    # broken by any exception that is not ours, or by a fetch
    with pytest.raises(ImageError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    # broken if the file were opened before its kind was looked at: this test would hang
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a file"):
        load(tmp_path / "pipe")


def test_a_small_file_takes_little_memory(tmp_path):
    # broken if as much memory were asked for as the largest file may take
    path = tmp_path / "small.png"
    path.write_bytes(encoded(noise()))
    tracemalloc.start()
    try:
        load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_too_many_bytes_are_refused(tmp_path):
    # broken if the file were read whole before it was measured
    file = tmp_path / "large.png"
    with file.open("wb") as out:
        out.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match="larger than 64 MiB"):
        load(file)
    with pytest.raises(ImageError, match="larger than 64 MiB"):
        load("data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 8))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(data):
    # broken by an exception of Pillow's that is let through
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    file = bytearray(encoded(noise(16, 16), form))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = load(bytes(file))
    except ImageError as e:
        assert "\n" not in str(e)
    else:
        assert len(got.data) == got.width * got.height * 3


@given(st.text(max_size=60))
def test_any_data_url_is_refused_in_our_words(rest):
    # broken by an exception of base64's or urllib's that is let through
    with pytest.raises(ImageError):
        load("data:" + rest)


def test_a_digest_is_of_the_pixels_and_the_size(tmp_path):
    # broken if it were of the file, or of the bytes without their shape
    pixels = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(pixels)
    for name in ("a.png", "b.bmp"):
        image.save(tmp_path / name)
    digests = {load(source).digest for source in (image, tmp_path / "a.png", str(tmp_path / "b.bmp"))}
    assert len(digests) == 1
    changed = pixels.copy()
    changed[3, 5, 2] ^= 1
    others = [Image.fromarray(changed), Image.fromarray(pixels.reshape(6, 4, 3))]
    assert len({load(other).digest for other in others} | digests) == 3


def test_a_data_url_holds_the_file_itself(tmp_path):
    # broken if the picture were encoded anew, with loss or at another size
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    assert load(data_url(str(path))) == load(path)
    path.write_text("no picture")
    with pytest.raises(ImageError):
        data_url(str(path))
