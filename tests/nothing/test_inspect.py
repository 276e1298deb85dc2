"""`st3-edge inspect` without a model: where patches lie, what page and figure show of them, which files are written."""

import base64
import hashlib
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ImageError
from st3_edge.commands.chat import terminal
from st3_edge.commands.inspect import figure, output, page
from st3_edge.commands.inspect.patches import views
from st3_edge.commands.inspect.seen import see
from st3_edge.errors import OutputError, one_line
from st3_edge.prompts.images import RGB
from st3_edge.report import Milliseconds, Report, Trace
from st3_edge.runtime.vision import Tile

SEED = 3
SIDE, PATCH = 28, 7  # of the vision encoder here: 4 × 4 patches
GRID = 4


def picture(width: int, height: int, seed: int = SEED) -> RGB:
    """Noise, so that no two patches are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return RGB(width, height, pixels.tobytes())


def as_a_square(given: RGB) -> list[Tile]:
    """What an encoder of 4 × 4 patches sees."""
    image = Image.frombytes("RGB", (given.width, given.height), given.data)
    return [Tile(np.asarray(image.resize((SIDE, SIDE))), GRID**2)]


def seen(
    left,
    question="What?",
    pieces=("It", " is"),
    name="a.png",
    tiles=None,
    projector="mlp",
    mode="pruned-prefill",
    owners=(),
    **native,
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
    return see(question, [name], [picture(40, 30)], tiles or as_a_square, report, "/models/m.gguf", projector)


LEFT = st.lists(st.lists(st.integers(-1, 6), min_size=16, max_size=16), min_size=1, max_size=4)


def pixels_of(given: RGB) -> np.ndarray:
    return np.frombuffer(given.data, np.uint8).reshape(given.height, given.width, 3)


def smooth(width: int, height: int, seed: int = SEED) -> RGB:
    """A picture whose parts differ at any size."""
    coarse = Image.fromarray(pixels_of(picture(4, 4, seed)))
    return RGB(width, height, coarse.resize((width, height), Image.Resampling.BICUBIC).tobytes())


def test_a_patch_is_where_its_pixels_are():
    # broken if rows and columns, or the order of patches, were mixed up
    pixels = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    pixels[PATCH * 2 : PATCH * 3, PATCH * 5 : PATCH * 6] = 255  # row 2, column 5
    (view,) = views(RGB(2 * SIDE, SIDE, pixels.tobytes()), [Tile(pixels, 2 * GRID**2)], "any")
    lit = view.pixels.reshape(GRID, PATCH, 2 * GRID, PATCH, 3).any(axis=(1, 3, 4))
    assert view.tokens[lit].tolist() == [2 * 2 * GRID + 5] and view.patch == PATCH


def test_the_layers_that_held_a_patch_are_counted():
    # broken if what had left were shown as held, or a stage of one layer counted as one of many
    left = [[-1] * 16, [-1, 0] * 8, [-1, 3] * 8]
    for of_stages, share, row in ((left, 1 / 8, "██  ██  "), (left[::-1], 5 / 8, "██▒▒██▒▒")):
        got = seen(of_stages, pieces="12345", cuts=[0, 2], per_layer=[16] * 8)  # stages of 1, 2 and 5 layers
        shares = got.shares(got.n_steps - 1)
        assert shares.tolist() == [1, share] * 8
        assert terminal.shaded(shares.reshape(4, 4), " ░▒▓█", 80) == [row] * 4


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(4, 20), st.data())
def test_any_grid_is_found_by_its_number_of_tokens(columns, rows, patch, data):
    # broken if only squares were known, a rest of a side moved patches, or tokens that end rows were taken for some
    rest = data.draw(st.integers(0, (patch - 1) // max(rows, columns)))
    ends = data.draw(st.sampled_from([0, rows, rows - 1]))
    pixels = np.zeros((rows * patch + rest, columns * patch + rest, 3), np.uint8)
    (view,) = views(picture(40, 30), [Tile(pixels, rows * columns + ends)], "any")
    if view.tokens.shape == (rows, columns):
        width = columns + (view.tokens[0, -1] + 1 < view.tokens[1, 0] if rows > 1 else 0)
        assert np.array_equal(view.tokens, np.arange(rows * width).reshape(rows, width)[:, :columns])
    assert ends or view.tokens.shape == (rows, columns)


def test_a_rest_of_the_side_that_makes_no_patch_is_not_shown():
    # broken if patches were spread over it: the last ones would be a few pixels off
    given = picture(SIDE + 3, SIDE + 3)
    (view,) = views(given, [Tile(pixels_of(given), GRID**2)], "any")
    assert np.array_equal(view.pixels, pixels_of(given)[:SIDE, :SIDE]) and view.tokens.shape == (GRID, GRID)


@pytest.mark.parametrize(("columns", "rows"), [(1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (6, 1), (1, 6), (4, 4)])
@pytest.mark.parametrize("first", [False, True], ids=["whole last", "whole first"])
def test_tiles_are_put_together_again(columns, rows, first):
    # broken if a tile's tokens were spread over the rows, tiles went column by column, or another tile were the whole
    given = smooth(columns * SIDE, rows * SIDE)
    pixels = pixels_of(given)
    cut = [Tile(pixels[SIDE * y :, SIDE * x :][:SIDE, :SIDE], GRID**2) for y in range(rows) for x in range(columns)]
    small = Tile(np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)), GRID**2)
    whole, tiles = views(given, [small, *cut] if first else [*cut, small], "any")
    assert (whole.name, tiles.name) == ("whole", "tiles")
    assert np.array_equal(tiles.pixels, pixels) and np.array_equal(whole.pixels, small.pixels)
    before, grid = GRID**2 * first, np.arange(GRID**2).reshape(GRID, GRID)
    assert np.array_equal(whole.tokens, grid + (0 if first else len(cut) * GRID**2))
    for i in range(len(cut)):
        y, x = divmod(i, columns)
        assert np.array_equal(tiles.tokens[GRID * y :, GRID * x :][:GRID, :GRID], before + i * GRID**2 + grid)


def refused(_: RGB) -> list[Tile]:
    raise ImageError("no picture")


@pytest.mark.parametrize(
    ("projector", "tiles"),
    [("resampler", None), ("deepseekocr2", None), ("mlp", refused), ("mlp", lambda _: [Tile(np.zeros((8, 8, 3)), 63)])],
)
def test_patches_of_no_known_place_are_not_drawn(projector, tiles):
    # broken if patches were drawn where they are not
    shown = seen([[-1] * 16, [0] * 8 + [-1] * 8], projector=projector, tiles=tiles)
    assert shown.unknown and "\n" not in shown.unknown and shown.pictures[0].views == []
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
