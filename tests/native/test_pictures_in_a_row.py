"""Whose tokens come: what is announced of the same picture is one image, and nothing else is."""

from __future__ import annotations

import pytest
from native_runtime import Context, Image, Model
from test_waiting import KEYS, SHAPE, picture, words


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


def tile(ctx: Context, image: Image, at: int, of: str) -> int:
    ctx.announce(len(image.embd), image.nx, image.ny, of)
    return ctx.decode(image.embd, at, "none")


def test_a_picture_that_was_refused_is_not_joined_to_the_one_before(model) -> None:
    """Breaks if a picture's name is noted before its tokens are taken: given again, it would be a tile of another."""
    first, second = picture(10, 6, 6), picture(11, 6, 6)
    with Context(model, n_ctx=256) as ctx:
        assert ctx.decode(words(60, 200), 0, seq=0) == 0
        assert ctx.seq_rm(0, 150)
        assert tile(ctx, first, 150, "a") == 0
        assert ctx.decode(words(61, 40), 186, "none") == 0
        assert tile(ctx, second, 226, "b") == 1  # no room
        assert ctx.seq_rm(0, 186)
        assert tile(ctx, second, 186, "b") == 0
        assert ctx.decode([7, 8, 9], 222, "last") == 0
        assert [(i["nx"], i["ny"]) for i in ctx.report()["images"]] == [(6, 6), (6, 6)]


def test_a_picture_behind_another_of_an_earlier_prompt_is_its_own(model) -> None:
    """Breaks if the name of a picture stays when its tokens are taken back."""
    first, second = picture(12, 6, 6), picture(13, 6, 6)
    with Context(model, n_ctx=256) as ctx:
        for _ in range(2):  # the second time what waits again ends in another picture
            assert tile(ctx, first, 0, "a") == 0
            assert tile(ctx, second, 36, "b") == 0
            assert ctx.decode([7, 8, 9], 72, "last") == 0
            assert [(i["nx"], i["ny"]) for i in ctx.report()["images"]] == [(6, 6), (6, 6)]
            assert ctx.seq_rm(0, 36)
            assert tile(ctx, second, 36, "b") == 0
            assert ctx.decode([7, 8, 9], 72, "last") == 0
            assert [(i["nx"], i["ny"]) for i in ctx.report()["images"]] == [(6, 6), (6, 6)]
            assert ctx.seq_rm(0, 0)
