"""`st3-edge inspect` on the embedded model: the patches are where the encoder sees them, and those that were kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st3_edge import Llava
from st3_edge.commands.inspect import figure
from st3_edge.commands.inspect.patches import views
from st3_edge.prompts.images import RGB, load

SEED = 11
CAPTION = "Describe the image."
SIDE, GRID = 336, 24


def noise(width: int, height: int, rng: np.random.Generator) -> RGB:
    return RGB(width, height, rng.integers(0, 256, (height, width, 3), np.uint8).tobytes())


def seen_again(llava: Llava, pixels: np.ndarray) -> np.ndarray:
    """The visual tokens of a square that the encoder takes as it is."""
    assert pixels.shape == (SIDE, SIDE, 3)
    return llava.visual_tokens(RGB(SIDE, SIDE, np.ascontiguousarray(pixels).tobytes()))


def test_a_view_is_what_the_encoder_sees(llava):
    # broken by another size, padding, colour or rounding than upstream's: the visual tokens would be others
    rng = np.random.default_rng(SEED)
    for _ in range(12):
        picture = noise(*(int(n) for n in rng.integers(8, 700, 2)), rng)
        (view,) = views(picture, llava.tiles(picture), "mlp")
        np.testing.assert_array_equal(seen_again(llava, view.pixels), llava.visual_tokens(picture))


def test_tiles_are_what_the_encoder_of_tiles_sees(llava, files, tiled):
    # broken if tiles were cut elsewhere, in another order, or from another of the file's resolutions
    rng = np.random.default_rng(SEED)
    shapes = set()
    with Llava(files[0], tiled, n_threads=1) as of_tiles:
        for size in ((300, 200), (500, 400), (300, 560), (1100, 300), (337, 336), *rng.integers(100, 900, (2, 2))):
            picture = noise(*(int(n) for n in size), rng)
            found = of_tiles.visual_tokens(picture)
            for view in views(picture, of_tiles.tiles(picture), "mlp"):
                shapes.add(view.tokens.shape)
                for y in range(0, len(view.tokens), GRID):
                    for x in range(0, len(view.tokens[0]), GRID):
                        at = np.s_[14 * y :, 14 * x :]
                        tile = seen_again(llava, view.pixels[at][:SIDE, :SIDE])
                        of_tile = view.tokens[y : y + GRID, x : x + GRID]
                        np.testing.assert_array_equal(found[of_tile.ravel()], tile)
    assert {(24, 24), (48, 48), (24, 48), (48, 24), (24, 72)} <= shapes


def run(command, *arguments: str):
    return command("inspect", "--threads", "1", "--max-tokens", "12", *arguments)


def test_a_picture_by_its_url_is_not_overwritten(command, picture: str, tmp_path: Path) -> None:
    # broken if what is read were known by its path alone
    source = tmp_path / "in.png"
    source.write_bytes(before := Path(picture).read_bytes())
    done = run(command, source.as_uri(), "What is red?", "-o", str(source), "--force")
    assert done.returncode == 1 and "is one of the files to read" in done.stderr
    assert source.read_bytes() == before


def traced(command, *arguments: str) -> dict:
    done = command("ask", "--threads", "1", "--max-tokens", "12", "--json", "--trace", *arguments)
    return json.loads(done.stdout)


def panels(sheet: np.ndarray, n: int, plain: np.ndarray):
    """The pixels of a picture's first n panels in the figure; `plain`: the first one, where nothing is dropped."""
    size = len(plain)
    (y,) = [y for y in range(len(sheet) - size) if np.array_equal(sheet[y : y + size, 40 : 40 + size], plain)]
    below = np.flatnonzero((sheet[y + size :, 40:60] != 255).any(axis=2).all(axis=1))  # no text is as wide as a panel
    rows = [y, y + size + int(below[0])] if n > 5 else [y]
    for i in range(n):
        x = 40 + (i % 5) * (figure._PANEL + 20)
        yield sheet[rows[i // 5] :, x:][:size, :size]


def gone(html: str, step: int) -> list[np.ndarray]:
    """For each panel of the page, which patches it shows as dropped at a step."""
    out = []
    for svg in re.findall("<svg viewBox.*?</svg>", html, re.S):
        mask = np.zeros((GRID, GRID), bool)
        for left, outline in re.findall(r'<path data-left="(\d+)" style="[^"]*" d="([^"]*)"', svg):
            for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v", outline) if int(left) <= step else ():
                mask[int(y), int(x) : int(x) + int(width)] = True
        out.append(mask)
    return out


def test_both_files_show_the_patches_that_the_report_says_were_kept(command, tmp_path, scenes, llava):
    # broken if a picture showed other patches than were kept, in another place, or under another layer
    picture = str(scenes[1].picture)
    options = (
        picture,
        CAPTION,
        "--start",
        "2",
        "--stride",
        "2",
        "--keep",
        "0.6",
        "--anneal",
        "linear",
        "--anneal-tokens",
        "8",
        "--anneal-floor",
        "0.5",
    )
    done = run(command, *options, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.png"]
    got = traced(command, *options)
    assert done.stdout == got["answer"] + "\n"
    kept = [np.isin(np.arange(GRID**2), k).reshape(GRID, GRID) for k in [range(GRID**2), *got["kept"]]]

    (view,) = views(load(picture), llava.tiles(picture), "mlp")
    cell = figure._PANEL // GRID
    plain = Image.fromarray(view.pixels).resize((GRID * cell,) * 2, Image.Resampling.LANCZOS)
    plain = np.asarray(plain)
    sheet = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    unlike = [mask for i, mask in enumerate(kept) if i == 0 or (mask != kept[i - 1]).any()]  # one panel each
    for mask, panel in zip(unlike, panels(sheet, len(unlike), plain), strict=True):
        wide = np.kron(mask, np.ones((cell, cell), bool))
        assert np.array_equal(panel[wide], plain[wide])
        grayed = plain[~wide] * (1 - figure.GONE_ALPHA) + np.array(figure.GONE) * figure.GONE_ALPHA
        assert np.abs(panel[~wide] - grayed).max(initial=0) <= 0.5

    html = (tmp_path / "out.html").read_text()
    assert [np.array_equal(~mask, shown) for mask, shown in zip(kept, gone(html, 0), strict=True)] == [True] * len(kept)
    first_layers = [0, *(cut + 1 for cut in got["schedule"]["cuts"])]
    end = [GRID**2 - int(mask.sum()) for mask in gone(html, 11)]
    assert end == [got["visual_tokens"]["held"][layer] for layer in first_layers]
    assert "".join(re.findall("<span>(.*?)</span>", html)) == got["answer"]


def test_several_pictures_and_one_that_is_given_as_data_have_a_row_each(command, tmp_path, scenes):
    # broken if the second picture's patches were taken for the first one's
    from st3_edge.prompts import images

    sources = [str(scenes[0].picture), images.data_url(str(scenes[1].picture))]
    done = run(command, *sources, CAPTION, "-o", str(tmp_path / "out.html"), "--preset", "pvtp")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
    got = traced(command, *sources, CAPTION, "--preset", "pvtp")
    shown = gone((tmp_path / "out.html").read_text(), 0)
    n = len(got["kept"]) + 1
    assert len(shown) == 2 * n
    for i in range(2):
        for kept, mask in zip(got["kept"], shown[i * n + 1 : (i + 1) * n], strict=True):
            assert np.flatnonzero(~mask.ravel()).tolist() == [k - i * 576 for k in kept if k // 576 == i]


def test_pictures_in_tiles_are_shown_as_a_whole_and_in_tiles(command, tmp_path, files, tiled):
    # broken if the tiles' visual tokens were not found, or ended the command
    path = tmp_path / "wide.png"
    Image.fromarray(
        np.frombuffer(noise(600, 300, np.random.default_rng(SEED)).data, np.uint8).reshape(300, 600, 3)
    ).save(path)
    done = run(command, str(path), CAPTION, "--model", files[0], "--mmproj", tiled, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "out.html").read_text()
    assert "wide.png, whole" in html and "wide.png, tiles" in html and "in 48 × 24 patches" in html
    assert Image.open(tmp_path / "out.png").width == 1400


@pytest.mark.parametrize(
    ("n", "options", "says"),
    [
        (1, ("--preset", "off"), "Not pruned (off)."),
        (8, ("--n-ctx", "5200"), "(evict-only: the image and its question"),
    ],
)
def test_a_page_says_where_the_prompt_was_not_pruned(command, tmp_path, scenes, n, options, says):
    # broken if what evict-only or no pruning at all left were shown as ST3's work
    pictures = [str(scenes[i % len(scenes)].picture) for i in range(n)]
    done = run(command, *pictures, CAPTION, "-o", str(tmp_path / "out.html"), *options)
    assert done.returncode == 0, done.stderr
    assert says in (tmp_path / "out.html").read_text()


def test_what_cannot_be_is_refused_before_the_model_and_nothing_is_lost(command, tmp_path, picture):
    # broken if a file were replaced unasked, a picture written over, or a person waited for an error
    taken, own = tmp_path / "taken.png", tmp_path / "own.png"
    taken.write_text("mine")
    own.write_bytes(open(picture, "rb").read())  # noqa: PTH123, SIM115
    before = own.read_bytes()
    missing = ("--model", "none.gguf", "--mmproj", "none.gguf")  # told of first, were it looked at first
    for arguments, says in [
        ((picture, CAPTION, "-o", str(taken)), "exists (--force replaces it)"),
        ((picture, CAPTION, "-o", str(tmp_path / "taken")), "exists (--force replaces it)"),
        ((str(own), CAPTION, "-o", str(own), "--force"), "is one of the files to read"),
        ((picture, CAPTION, "-o", str(tmp_path / "none" / "out")), "there is no folder"),
        ((str(taken), CAPTION, "-o", str(tmp_path / "out")), "is no PNG"),
    ]:
        done = run(command, *arguments, *missing)
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("st3-edge: error: ") and says in line
    assert taken.read_text() == "mine" and own.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.png", "taken.png"]
    assert run(command, picture, CAPTION, "-o", str(taken), "--force").returncode == 0
    assert Image.open(taken).format == "PNG"
