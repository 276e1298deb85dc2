"""`st3-edge inspect` without a model: where patches lie, what page and figure show of them, which files are written."""

import base64
import hashlib
import io
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ModelError
from st3_edge.commands.inspect import figure, output, page
from st3_edge.commands.inspect.patches import views
from st3_edge.commands.inspect.seen import see
from st3_edge.errors import OutputError, one_line
from st3_edge.prompts.images import RGB
from st3_edge.report import Milliseconds, Report, Trace

SEED = 3
SIDE, PATCH = 28, 7  # of the vision encoder here: 4 × 4 patches
GRID = 4


def mmproj(*resolutions: int, **metadata):
    """The header of a vision half, as far as it is looked at."""
    keys = {"projector_type": "mlp", "vision.image_size": SIDE, "vision.patch_size": PATCH, **metadata}
    arrays = {"clip.vision.image_grid_pinpoints": resolutions} if resolutions else {}
    return SimpleNamespace(metadata={f"clip.{k}": v for k, v in keys.items()}, arrays=arrays)


def picture(width: int, height: int, seed: int = SEED) -> RGB:
    """Noise, so that no two patches are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return RGB(width, height, pixels.tobytes())


def seen(
    left, question="What?", pieces=("It", " is"), name="a.png", header=None, mode="pruned-prefill", owners=(), **native
):
    """What page and figure take: one picture of 4 × 4 patches, a layer a stage."""
    n_stages, given = np.shape(left)
    kept = np.count_nonzero(np.asarray(left) != 0, axis=1).tolist()
    native = {
        "mode": mode,
        "reason": None,
        "preset": "st3",
        "cuts": list(range(n_stages - 1)),
        "counts": [[n] for n in kept[1:]],
        "budget": 0.5,
        "score": "text-max",
        "coverage": 0.0,
        "merge": True,
        "rank": "score",
        "anneal": {"curve": "linear", "tokens": 8, "floor": 0.5, "interval": 1, "score": "text-max"},
        "given": given,
        "per_layer": kept,
        "held": kept,
        "kv_bytes": {"allocated": 100, "live": 60, "full": 80},
        "flops": {"prefill": 7, "prefill_full": 9},
        **native,
    }
    trace = Trace([1, -1, 2], [], [], list(pieces), [given], np.asarray(left).tolist(), list(owners))
    report = Report.from_native(native, Milliseconds(1, 2, 3, 4), trace=trace)
    report.answer, report.n_generated = "".join(pieces), len(pieces)
    return see(question, [name], [picture(40, 30)], report, "/models/m.gguf", header or mmproj())


LEFT = st.lists(st.lists(st.integers(-1, 6), min_size=16, max_size=16), min_size=1, max_size=4)


@settings(max_examples=40)
@given(st.integers(2, 90), st.integers(2, 90))
def test_a_picture_is_padded_to_a_square_with_the_picture_in_its_middle(width, height):
    # broken if it were stretched, cropped, padded on one side, or in another colour than the encoder's
    (view,) = views(RGB(width, height, b"\xff\x00\x00" * (width * height)), mmproj())
    assert view.pixels.shape == (SIDE, SIDE, 3) and view.patch == PATCH
    assert np.array_equal(view.tokens, np.arange(GRID**2).reshape(GRID, GRID))
    inside = (view.pixels == (255, 0, 0)).all(axis=-1)
    assert (inside | (view.pixels == (122, 116, 104)).all(axis=-1)).all()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert inside[np.ix_(rows, columns)].all()
    scale = SIDE / max(width, height)
    for at, side in ((rows, height), (columns, width)):
        assert side * scale - 1e-3 <= len(at) < side * scale + 1 + 1e-3
        before, after = at[0], SIDE - 1 - at[-1]
        assert after - before in (0, 1)


def test_a_patch_is_where_its_pixels_are():
    # broken if rows and columns, or the order of patches, were mixed up
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[PATCH * 2 : PATCH * 3, PATCH * 1 : PATCH * 2] = 255  # row 2, column 1
    (view,) = views(RGB(SIDE, SIDE, pixels.tobytes()), mmproj())
    lit = view.pixels.reshape(GRID, PATCH, GRID, PATCH, 3).any(axis=(1, 3, 4))
    assert view.tokens[lit].tolist() == [2 * GRID + 1]


def test_a_rest_of_the_side_that_makes_no_patch_is_not_shown():
    # broken if patches were spread over it: the last ones would be a few pixels off
    (view,) = views(picture(SIDE + 3, SIDE + 3), mmproj(**{"vision.image_size": SIDE + 3}))
    whole = np.frombuffer(picture(SIDE + 3, SIDE + 3).data, np.uint8).reshape(SIDE + 3, SIDE + 3, 3)
    assert np.array_equal(view.pixels, whole[:SIDE, :SIDE]) and view.tokens.shape == (GRID, GRID)


def test_tiles_go_row_by_row_and_the_whole_picture_comes_last():
    # broken if a tile's tokens were spread over the rows, tiles went column by column, or the whole came first
    given = picture(2 * SIDE, SIDE)
    whole, tiles = views(given, mmproj(2 * SIDE, SIDE, SIDE, 2 * SIDE))
    assert (whole.name, tiles.name) == ("whole", "tiles")
    grid = np.arange(16).reshape(GRID, GRID)
    assert tiles.tokens.shape == (GRID, 2 * GRID)
    assert np.array_equal(tiles.tokens[:, :GRID], grid)
    assert np.array_equal(tiles.tokens[:, GRID:], 16 + grid)
    assert np.array_equal(whole.tokens, 32 + grid)
    pixels = np.frombuffer(given.data, np.uint8).reshape(SIDE, 2 * SIDE, 3)
    assert np.array_equal(tiles.pixels, pixels)  # of its size: nothing is scaled


@settings(max_examples=40)
@given(st.integers(2, 120), st.integers(2, 120))
def test_every_visual_token_of_a_tiled_picture_has_one_place(width, height):
    # broken by a resolution that is not the best one upstream's rule finds, or tiles that overlap
    sizes = [(2, 2), (1, 2), (2, 1), (3, 1), (1, 3)]
    found = views(picture(width, height), mmproj(*(SIDE * n for size in sizes for n in size)))
    tokens = np.concatenate([view.tokens.ravel() for view in found])
    assert np.array_equal(np.sort(tokens), np.arange(len(tokens)))
    assert (len(found) == 1) == (max(width, height) <= SIDE)
    if len(found) == 2:
        rows, columns = (n // GRID for n in found[1].tokens.shape)

        def left(w, h):
            scale = min(w * SIDE / width, h * SIDE / height)
            return min(width * height, int(width * scale + 1e-4) * int(height * scale + 1e-4))

        assert (columns, rows) in sizes
        assert left(columns, rows) >= 0.93 * max(left(*size) for size in sizes)  # 32 bits, and their rounding


@pytest.mark.parametrize(
    "header",
    [
        mmproj(projector_type="ldp"),
        mmproj(projector_type=None),
        mmproj(**{"vision.image_size": 0}),
        mmproj(**{"vision.image_size": 2**20}),
        mmproj(**{"vision.patch_size": SIDE + 1}),
        mmproj(**{"vision.patch_size": "7"}),
        mmproj(SIDE + 1, SIDE),
        mmproj(-SIDE, SIDE),
        mmproj(2**30, 2**30),
    ],
)
def test_a_file_that_does_not_say_where_patches_lie_is_told_from_one_that_does(header):
    # broken if patches were drawn where they are not, or a size from outside were believed
    with pytest.raises(ModelError) as caught:
        views(picture(40, 30), header)
    assert "\n" not in str(caught.value)
    shown = seen([[-1] * 16, [0] * 8 + [-1] * 8], header=header)
    assert shown.unknown and shown.pictures[0].views == []
    assert shown.unknown in text_of(page.html(shown)) and Image.open(io.BytesIO(figure.png(shown))).width == 1400
    assert figure.counts(shown)[1].startswith("layer 1: 8 of 16")


def test_patches_that_are_not_as_many_as_the_visual_tokens_are_not_drawn():
    # broken if another preprocessing than the encoder's went unnoticed
    shown = seen([[-1] * 9])
    assert "16" in shown.unknown and "9" in shown.unknown and shown.pictures[0].views == []


class Parsed(HTMLParser):
    """The page's tags, and its text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._raw = "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag) -> None:
        self._raw = False

    def handle_data(self, data) -> None:
        self.text += "" if self._raw else data


def text_of(html: str) -> str:
    return Parsed(html).text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;</p></title><b>"


@given(st.text(max_size=30).map(lambda text: text + EVIL), st.text(max_size=30).map(lambda text: EVIL + text))
@settings(max_examples=40)
def test_what_comes_from_outside_is_text_in_the_page_and_nothing_else(question, piece):
    # broken if a question, an answer, a file's name or a reason could bring a tag or a script
    harmless = Parsed(page.html(seen([[0, 4] * 8], "q", ["a", "b"], "c"))).tags
    html = page.html(seen([[0, 4] * 8], question, [piece, "b"], f"d{EVIL}", reason=EVIL))
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in harmless]
    assert [attrs.keys() for _, attrs in parsed.tags] == [attrs.keys() for _, attrs in harmless]

    def plain(text: str) -> str:
        """Without what a browser makes of line ends, and of NUL."""
        return re.sub("\r\n?", "\n", text).replace("\0", "")

    for part in (EVIL, *plain(question + piece).split(EVIL)):
        assert part in plain(parsed.text)


def test_the_page_needs_nothing_but_itself():
    # broken if anything were loaded from elsewhere, or the script were not the one that the policy allows
    html = page.html(seen([[-1] * 16, [0, 1, 2, -1] * 4], pieces=["a", "b", "c", "d"]))
    for tag, attrs in Parsed(html).tags:
        assert tag not in ("link", "iframe", "object", "embed") and "src" not in attrs
        assert attrs.get("href", "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    (script,) = re.findall("<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def cells(path: str, rows: int, columns: int) -> np.ndarray:
    """The cells that an outline of runs covers."""
    out = np.zeros((rows, columns), bool)
    assert re.fullmatch(r"(M\d+ \d+h\d+v1h-\d+z)*", path)
    for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
        assert width == back and not out[int(y), int(x) : int(x) + int(width)].any()
        out[int(y), int(x) : int(x) + int(width)] = True
    return out


@settings(max_examples=40)
@given(LEFT, st.integers(1, 7))
def test_the_page_shows_of_every_step_what_was_held_then(left, n_pieces):
    # broken if a patch were drawn in another place, at another step, or twice; or a count were another step's
    shown = seen(left, pieces=["x"] * n_pieces)
    html = page.html(shown)
    assert html.count("<svg viewBox") == len(left)
    for svg, of_stage in zip(re.findall("<svg viewBox.*?</figcaption>", html, re.S), left, strict=True):
        assert svg.startswith(f'<svg viewBox="0 0 {GRID} {GRID}">')
        paths = re.findall(r'<path data-left="(\d+)" style="([^"]*)" d="([^"]*)"/>', svg)
        assert svg.count("<path") == len(paths)
        held = re.search(r'<b data-held="([\d ]*)">', svg)[1].split()
        assert len(held) == n_pieces
        for step in range(n_pieces):
            gone = sum(
                (cells(d, GRID, GRID).astype(int) for at, _, d in paths if int(at) <= step), np.zeros((4, 4), int)
            )
            expected = [0 <= at <= step for at in of_stage]
            assert gone.ravel().tolist() == expected
            assert int(held[step]) == 16 - sum(expected)
            assert np.array_equal(shown.held(step)[left.index(of_stage)], ~np.array(expected))
        assert all((style == "") == (at == "0") for at, style, _ in paths)  # without a script: the first step


@pytest.mark.parametrize("mode", ["off", "evict-only"])
def test_a_prompt_that_was_not_pruned_is_said_to_be_so(mode):
    # broken if a page let a person believe that ST3 had worked
    for left in ([[-1] * 16], [[-1] * 16, [0] * 16]):
        told = text_of(page.html(seen(left, mode=mode, reason="the reasons are many")))
        assert "Not pruned" in told and f"({mode}: the reasons are many)" in told
    assert "Not pruned" not in text_of(page.html(seen([[-1] * 16])))


def test_the_figure_shows_kept_patches_as_they_are_and_grays_the_others():
    # broken if a mask were upside down, transposed or off by a patch
    shown = seen([[-1] * 16, [-1, 0, 0, -1, 0] + [0] * 11])
    (view,) = shown.pictures[0].views
    sheet = np.asarray(Image.open(io.BytesIO(figure.png(shown))).convert("RGB")).astype(float)
    cell = figure._PANEL // GRID
    plain = np.asarray(Image.fromarray(view.pixels).resize((GRID * cell,) * 2, Image.Resampling.LANCZOS)).astype(float)
    width = GRID * cell
    (y,) = [y for y in range(len(sheet) - width) if np.array_equal(sheet[y : y + width, 40 : 40 + width], plain)]
    second = sheet[y : y + width, 40 + figure._PANEL + 20 :][:, :width]
    for row in range(GRID):
        for column in range(GRID):
            at = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            kept = row * GRID + column in (0, 3)
            ground = (
                plain[at] if kept else plain[at] * (1 - figure.GONE_ALPHA) + np.array(figure.GONE) * figure.GONE_ALPHA
            )
            assert np.abs(second[at] - ground).max() <= (0 if kept else 0.5)


# after the cut, the upper half is the first patch's and the lower half the last one's
OWNERS = [0] * 8 + [15] * 8
HALVES = [[-1] * 16, [-1] + [0] * 14 + [-1]]


def test_the_figure_shows_in_place_of_each_patch_the_one_that_stands_for_it():
    # broken if owners were another view's, transposed, or a dropped patch were shown as itself
    shown = seen(HALVES, owners=[OWNERS])
    (view,) = shown.pictures[0].views
    drawn = np.asarray(figure.mosaic(shown, np.array(OWNERS).reshape(GRID, GRID), PATCH))
    patches = view.pixels.reshape(GRID, PATCH, GRID, PATCH, 3).swapaxes(1, 2)
    for place, owner in enumerate(OWNERS):
        y, x = divmod(place, GRID)
        at = np.s_[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        assert np.array_equal(drawn[at], patches[divmod(owner, GRID)])
    without = Image.open(io.BytesIO(figure.png(seen(HALVES))))
    assert Image.open(io.BytesIO(figure.png(shown))).height > without.height
    assert (np.asarray(figure.mosaic(shown, np.full((1, 1), -1), PATCH)) == figure.GONE).all()


def test_the_page_says_of_each_patch_which_one_stands_for_it():
    # broken if a stage had another's owners, or a script of the page were not allowed to run
    html = page.html(seen(HALVES, owners=[OWNERS]))
    assert re.findall('data-owners="([^"]*)"', html) == [" ".join(map(str, of)) for of in (range(16), OWNERS)]
    allowed = re.search('script-src ([^"]*)"', html)[1]
    for script in re.findall("<script>(.*?)</script>", html, re.S):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed
    assert "Point at a patch" in html and "Point at a patch" not in page.html(seen(HALVES))


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=200) | st.just("long" * 50), st.integers(100, 1000), st.booleans())
def test_any_text_fits_its_width(text, width, tail):
    # broken by a letter that no font has, a line without spaces, or a control character
    drawn = figure._text(text, 20, figure._INK, width, 2, tail)
    assert drawn.width == width and drawn.height <= 2 * 27
    font = figure._font(20, text := one_line(text))
    assert all(font.getlength(line) <= width for line in figure._wrap(text, font, width))


@pytest.mark.parametrize("pieces", [(), ("",), ("\n", "猫", " \t"), tuple("abcdefg" * 100)])
def test_any_answer_can_be_drawn(pieces):
    # broken by an empty answer, or one of more words than there is room for
    shown = seen([[-1] * 16, [0, 1, 2, 3] * 4], pieces=pieces)
    assert Image.open(io.BytesIO(figure.png(shown))).width == 1400
    assert f"of {len(pieces)} was chosen" in page.html(shown) or len(pieces) < 2


def test_the_figure_is_drawn_where_no_font_is_installed(monkeypatch):
    # broken if a system's fonts were counted on; the letters that Pillow's own lacks would be boxes in our own words
    monkeypatch.setattr(figure, "_FONTS", ())
    figure._fonts.cache_clear()
    try:
        assert figure._text("24 × 24, layers 0–1", 20).tobytes() == figure._text("24 x 24, layers 0-1", 20).tobytes()
    finally:
        figure._fonts.cache_clear()


@pytest.mark.parametrize(
    ("given", "sources", "expected"),
    [
        (None, ["/photos/cat.jpg", "dog.png"], ["cat-st3.png", "cat-st3.html"]),
        (None, ["data:;base64,AAAA"], ["picture-st3.png", "picture-st3.html"]),
        ("out", ["a"], ["out.png", "out.html"]),
        ("out.v1", ["a"], ["out.v1.png", "out.v1.html"]),
        ("x/out.png", ["a"], ["x/out.png"]),
        ("OUT.HTML", ["a"], ["OUT.HTML"]),
        ("/", ["x/cat.jpg"], ["/cat-st3.png", "/cat-st3.html"]),
        ("none/", ["x/cat.jpg"], ["none/cat-st3.png", "none/cat-st3.html"]),
    ],
)
def test_the_files_are_those_that_were_named(given, sources, expected):
    # broken if a suffix were added to one that is there, or a data: URL became a name
    assert [str(path) for path in output.targets(given, sources)] == expected


def test_a_folder_is_where_the_files_go(tmp_path):
    # broken if it were the beginning of their names: .png and .html, which nobody sees, or files beside the folder
    for name in (str(tmp_path), f"{tmp_path}/"):
        assert output.targets(name, ["cat.jpg"]) == [tmp_path / "cat-st3.png", tmp_path / "cat-st3.html"]


@pytest.mark.parametrize("given", ["", "a.jpg", "x/a.JPEG", "a.webp"])
def test_names_of_what_is_not_written_are_refused(given):
    # broken if ".png" were written, or "a.jpg.png" where a JPEG was asked for
    with pytest.raises(OutputError):
        output.targets(given, ["cat.png"])


@pytest.mark.parametrize("said", [" ".join(f"word{i}" for i in range(400)), "图片显示一张小木桌" * 100])
def test_a_caption_shows_the_last_lines_and_is_wrapped_once(monkeypatch, said):
    # broken if the text were wrapped again for each word that is left out, which took seconds
    calls, drawn = [], []
    real = figure._wrap
    monkeypatch.setattr(figure, "_wrap", lambda *a: (calls.append(1), real(*a))[1])
    monkeypatch.setattr(figure.ImageDraw.ImageDraw, "text", lambda _, at, line, *__: drawn.append(line))
    figure._text(said, figure._SMALL, width=figure._PANEL, tail=True)
    assert len(calls) == 1
    assert len(drawn) == 2 and drawn[0].startswith("… ")
    shown = "".join(drawn).removeprefix("… ").replace(" ", "")
    assert said.replace(" ", "").endswith(shown) and len(shown) > 10


def test_nothing_is_replaced_unasked_and_what_is_read_never(tmp_path):
    # broken if a file of the user's were lost: by its own name, by another name of it, or by a folder's
    source, other, target = (tmp_path / name for name in ("in.png", "other.png", "new.png"))
    source.write_bytes(b"picture")
    other.write_bytes(b"other")
    (tmp_path / "link.png").symlink_to(source)
    os.link(source, tmp_path / "twin.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    refused = [
        ("other.png", False, "exists"),
        ("in.png", True, "is one of the files to read"),
        ("link.png", True, "is one of the files to read"),
        ("twin.png", True, "is one of the files to read"),
        ("folder.png", True, "is not a file"),
        ("pipe.png", True, "is not a file"),
        ("none/new.png", True, "there is no folder"),
        ("other.png/new.png", True, "Not a directory|there is no folder"),
        ("n" * 300 + ".png", True, "cannot be written"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for name, force, says in refused:
        with pytest.raises(OutputError, match=says) as caught:
            output.write(tmp_path / name, b"new", [source], force=force)
        assert "\n" not in str(caught.value)
    assert source.read_bytes() == b"picture" and other.read_bytes() == b"other"
    assert {path.name for path in tmp_path.iterdir()} == before
    output.write(other, b"new", [source], force=True)
    output.write(target, b"new", [source, tmp_path / "gone.png"], force=False)
    assert other.read_bytes() == target.read_bytes() == b"new"
