"""Pictures from outside: bounded, and read right."""

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin, features

from st3_edge import ImageError
from st3_edge.prompts.image_files import FORMATS, SUFFIXES, quiet
from st3_edge.prompts.images import MAX_BYTES, RGB, data_url, file_of, load, load_base64


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


def test_the_file_of_a_picture_on_a_command_line(tmp_path):
    # broken if what inspect reads by a URL were not known for the file that it must not overwrite
    path = tmp_path / "in put.png"
    assert file_of(str(path)) == path
    for url in (path.as_uri(), "FILE:" + path.as_uri()[5:], "file://localhost" + path.as_uri()[7:]):
        assert file_of(url) == path
    assert file_of("-") is file_of("data:;base64,AAAA") is None
    with pytest.raises(ImageError, match="no other machine"):
        file_of("file://elsewhere/in.png")


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


@pytest.mark.parametrize("name", [os.fsencode, int, str])
def test_a_path_of_a_programs_own_kind(tmp_path, name):
    # broken by a TypeError of pathlib's: a path may be bytes, and what is none may be anything
    (tmp_path / "5.png").write_bytes(encoded(noise()))

    class Own:
        def __fspath__(self):
            return name(5 if name is int else str(tmp_path / "5.png"))

    if name is int:
        with pytest.raises(ImageError, match="cannot be read"):
            load(Own())
    else:
        assert load(Own()) == load(noise())


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


@pytest.mark.parametrize(
    ("width", "height", "data"),
    [
        (1000, 1000, b""),
        (2, 2, bytes(13)),
        (-2, -2, bytes(12)),
        (0, 0, b""),
        (2.0, 2, bytes(12)),
        (2, 2, bytearray(12)),
    ],
)
def test_pixels_of_another_number_than_a_pictures_sides_are_refused(width, height, data):
    # broken if native code read beyond its end what somebody made by hand
    with pytest.raises(ImageError, match="RGB"):
        RGB(width, height, data)


def test_decoded_pictures_are_bounded_too():
    # broken if what is not decoded here went on in any shape
    with pytest.raises(ImageError, match="at most 100 times"):
        load(RGB(1000, 2, bytes(6000)))


def test_threads_leave_warnings_as_they_were():
    # broken if two of them silenced Pillow at once: the later put back what the earlier had set
    data, before = encoded(noise(64, 64)), list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with quiet():
            inside.set()
            leave.wait(60)

    threads = [threading.Thread(target=first, daemon=True), threading.Thread(target=load, args=(data,), daemon=True)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    threads[1].join(0.2)  # without a lock it is within by now
    leave.set()
    for thread in threads:
        thread.join(60)
    assert warnings.filters == before


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
        "data:image/png;base64,AAAA\ud800",
        "data:,\udfff",
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


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_a_jpeg_without_its_end_marker_is_whole(options):
    # broken if a file that every viewer opens were refused
    data = encoded(noise(64, 48), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    assert load(data[:-2]) == load(data[:-1]) == load(data)
    assert load(data[:-2] + bytes(100)) == load(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 400))
def test_a_jpeg_that_lacks_pixels_is_refused(cut):
    # broken if an end marker put behind half a picture made it whole
    data = encoded(noise(64, 48), "JPEG", quality=90)
    with pytest.raises(ImageError):
        load(data[:-2][:-cut])


def test_a_large_photo_is_read_at_half_its_size():
    # broken if a phone's photo of 108 megapixels were refused, or decoded in full
    image = Image.new("L", (12_000, 9_000), 90)
    image.paste(200, (0, 0, 6_000, 9_000))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    got = load(encoded(image, "JPEG", exif=exif))
    assert (got.width, got.height) == (6_000, 4_500)
    assert (got.data[0], got.data[-1]) == (90, 200)


def test_the_largest_photo_is_bounded():
    # broken if no bound were left
    data = bytearray(encoded(Image.new("L", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(ImageError, match="20000×20000"):
        load(bytes(data))


def png_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 * 2**20))),
        png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(bytes(2 * 2**20))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 * 2**20))),
        png_chunk(b"tEXt", b"note\0" + b"x", crc=0),
        png_chunk(b"iCCP", b"profile\0\0no zlib"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_text_and_profiles_of_a_png_are_no_matter(chunk, before):
    # broken if Pillow's limits on what is not shown decided
    data = encoded(noise())
    at = data.index(b"IDAT" if before else b"IEND") - 4
    assert load(data[:at] + chunk + data[at:]) == load(data)


def test_damaged_exif_is_no_matter():
    # broken if a picture were refused for what a camera wrote beside it
    data = encoded(noise(16, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)
    assert load(data).width == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda b64: b64.replace("+", "-").replace("/", "_"),
        lambda b64: b64.rstrip("="),
        lambda b64: b64.replace("+", " "),
        lambda b64: "\r\n".join(b64[i : i + 60] for i in range(0, len(b64), 60)),
        lambda b64: " ".join(b64[i : i + 61] for i in range(0, len(b64), 61)) + " ",
        lambda b64: b64.replace("+", "%2B").replace("=", "%3D"),
    ],
)
@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/png; charset=x; BASE64 ,", "data:;base64,"])
def test_base64_in_other_writings(change, head):
    # broken if what a form, a mail or another library wrote were refused
    for height in range(5, 12):
        data = encoded(noise(7, height))
        assert load(head + change(base64.b64encode(data).decode())) == load(data)


def test_a_data_url_may_be_percent_encoded():
    # broken if data without base64 were cut, or too long for a bound on base64
    data = encoded(noise())
    assert load("data:image/png," + quote(data)) == load(data)


def test_file_urls(tmp_path):
    # broken if a name's escapes stayed, or another machine's file were looked for here
    path = tmp_path / "a picture é.png"
    path.write_bytes(encoded(noise()))
    assert load(path.as_uri()) == load("file://localhost" + path.as_uri()[7:]) == load(path)
    with pytest.raises(ImageError, match="no other machine"):
        load("file://elsewhere/a.png")


def test_avif_and_heic_are_read_where_libraries_are():
    # broken if a phone's format were refused though it can be read
    image = Image.new("RGB", (64, 48), "red")
    if features.check("avif"):
        got = load(encoded(image, "AVIF"))
        assert (got.width, got.height) == (64, 48)
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(image).save(out)
    got = load(out.getvalue())
    assert (got.width, got.height) == (64, 48)
    assert got.data[0] > 200 > 60 > got.data[1]


def test_without_its_library_a_heic_picture_says_what_to_do(monkeypatch):
    # broken if it said "no picture"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        load(b"\0\0\0\x1cftypheic" + bytes(100))


def test_a_picture_from_a_pipe():
    # broken if standard input, or a shell's <(...), could not be a picture
    data = encoded(noise())
    code = "import sys; from st3_edge.prompts import images; "
    code += "sys.stdout.buffer.write(images.load_argument(sys.argv[1]).data)"
    for word in ("-", "/dev/stdin"):
        program = [sys.executable, "-c", code, word]
        assert (
            subprocess.run(program, input=data, capture_output=True, timeout=60, check=True).stdout == load(data).data
        )


def test_base64_alone_is_ollamas():
    # broken if it were taken for the name of a file
    data = encoded(noise(40, 40))
    assert load_base64(base64.b64encode(data).decode()) == load(data)
    for text in ("no such file.png", "A" * 5000):
        with pytest.raises(ImageError):
            load_base64(text)


def test_nothing_of_pillows_is_changed():
    # broken if a limit of the whole process were lifted for one picture
    def limits():
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK

    before = limits()
    load(encoded(noise(64, 48), "JPEG")[:-2])
    assert limits() == before


def test_endings_of_names_are_of_formats_that_are_read():
    # broken if a folder's pictures were passed over, or a file that cannot be read were taken for one
    of = Image.registered_extensions()
    assert {of[ending] for ending in SUFFIXES if ending in of} >= set(FORMATS)
    assert {ending for ending in SUFFIXES if of.get(ending) not in FORMATS} == {".heic", ".heif"}
