"""Pictures that come as several images: tiles of one picture, one right after the other or with text between."""

from __future__ import annotations

import numpy as np
import pytest
from native_runtime import Context, Image, Model
from test_waiting import KEYS, SHAPE, follow, length, picture, same, words

N_STEPS = 8


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


def give(ctx: Context, pieces: list, names: list[str], at: int = 0) -> int:
    """Pieces by llama_decode, images announced by these names in turns; returns the position that follows."""
    names = list(names)
    for i, piece in enumerate(pieces):
        if isinstance(piece, Image):
            ctx.announce(len(piece.embd), piece.nx, piece.ny, names.pop(0))
            assert ctx.decode(piece.embd, at, "none") == 0
        else:
            assert ctx.decode(piece, at, "last" if i == len(pieces) - 1 else "none") == 0
        at += length([piece])
    return at


def tiles(grids: list[tuple[int, int]]) -> list[Image]:
    return [picture(i, nx, ny) for i, (nx, ny) in enumerate(grids)]


def joined(parts: list[Image], nx: int, ny: int) -> Image:
    return Image(np.concatenate([p.embd for p in parts]), nx, ny)


@pytest.mark.parametrize("grids", [[(8, 8)] * 3, [(8, 8), (8, 4)], [(8, 8), (5, 7)], [(4, 4)] * 7], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_tiles_of_a_picture_have_one_quota(model, grids: list[tuple[int, int]], known: bool) -> None:
    """Breaks if tiles that follow each other are not the one image that their embeddings in a row are, bit for bit."""
    parts = tiles(grids)
    n, widths = sum(nx * ny for nx, ny in grids), {nx for nx, _ in grids}
    stack = known or all(nx == ny for nx, ny in grids)  # else what nobody says is taken for one row
    nx = widths.pop() if len(widths) == 1 and stack else n
    with Context(model, n_ctx=512) as ctx:
        assert ctx.prefill([[1, 5], joined(parts, nx, n // nx), words(0, 20)]) == 0
        want, kept = follow(ctx, n + 22, N_STEPS), ctx.kept(4)
    with Context(model, n_ctx=512) as ctx:
        given = parts if known else [Image(p.embd) for p in parts]
        end = give(ctx, [[1, 5], *given, words(0, 20)], ["a"] * len(grids))
        report = ctx.report()
        assert (report["mode"], report["given"]) == ("pruned-prefill", n)
        assert report["images"] == [{"n": n, "nx": nx, "ny": n // nx}]
        assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), kept, strict=True))
        assert same(follow(ctx, end, N_STEPS), want)


@pytest.mark.parametrize("names", [["a", "b"], ["", ""], ["a", ""], ["", "a"]])
def test_other_pictures_stay_apart(model, names: list[str]) -> None:
    """Breaks if images that are not said to be of one picture share a quota."""
    with Context(model, n_ctx=512) as ctx:
        give(ctx, [[1, 5], *tiles([(8, 8), (8, 8)]), words(0, 20)], names)
        assert [image["n"] for image in ctx.report()["images"]] == [64, 64]


def test_tiles_with_text_between_have_a_quota_each(model) -> None:
    """Breaks if text is taken into an image, or the tiles of one prompt go on in the next."""
    with Context(model, n_ctx=512) as ctx:
        a, b, c = tiles([(8, 8), (8, 8), (6, 6)])
        end = give(ctx, [[1, 5], a, [7], b, words(0, 20)], ["a", "a"])
        assert [image["n"] for image in ctx.report()["images"]] == [64, 64]
        give(ctx, [c, words(1, 9)], ["a"], end)
        assert [image["n"] for image in ctx.report()["images"]] == [64, 64, 36]


def test_a_tile_may_come_in_parts_and_wait_for_room(model) -> None:
    """Breaks if a tile's second batch begins another image, or a refused one is joined twice."""
    a, b = tiles([(8, 8), (8, 8)])
    with Context(model, n_ctx=512) as ctx:
        ctx.announce(64, 8, 8, "a")
        assert ctx.decode(a.embd, 0, "none") == 0
        ctx.announce(64, 8, 8, "a")
        assert ctx.decode(b.embd[:50], 64, "none") == 0
        assert ctx.decode(b.embd[50:], 60, "none") != 0, "positions that are there"
        assert ctx.decode(b.embd[50:], 114, "none") == 0
        assert ctx.decode(words(0, 9), 128) == 0
        assert ctx.report()["images"] == [{"n": 128, "nx": 8, "ny": 16}]


@pytest.mark.parametrize("n_batch", [64, 100])
def test_tiles_that_cannot_wait_are_one_image_too(model, n_batch: int) -> None:
    """Breaks if evict-only gives each tile a quota where the pruned prompt has one."""
    parts = tiles([(8, 8)] * 3)
    with Context(model, n_ctx=512, n_batch=n_batch) as ctx:
        give(ctx, [[1, 5], *parts, words(0, 20)], ["a"] * 3)
        report = ctx.report()
        assert report["mode"] == "evict-only"
        assert report["images"] == [{"n": 192, "nx": 8, "ny": 24}]
        assert report["held"] == [192, 96, 96, 48, 48, 24, 24, 12]


def test_sixty_four_tiles_and_an_overview(model) -> None:
    """Breaks if a graph has no room for so many images, or a prompt no room for their text."""
    parts = [[t % 300 + 3, picture(t % 5, 4, 4)] for t in range(65)]
    pieces = [[1], *[x if isinstance(x, Image) else [x] for part in parts for x in part], words(0, 12)]
    with Context(model, n_ctx=2048) as ctx:
        give(ctx, pieces, ["a"] * 65)
        report = ctx.report()
        assert (report["mode"], report["given"], len(report["images"])) == ("pruned-prefill", 65 * 16, 65)
        assert report["per_layer"] == [65 * n for n in (16, 8, 8, 4, 4, 2, 2, 1)]
        assert np.isfinite(ctx.logits()).all()
