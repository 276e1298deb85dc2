"""Legal calls in an order that our own front ends do not use."""

from __future__ import annotations

import numpy as np
import pytest
from native_runtime import Context, Image, Model
from test_waiting import KEYS, SHAPE, picture, words


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


def test_many_sequences_share_a_prefix_of_text(model) -> None:
    """Breaks if text that was copied to others is computed, and needs cells, once for each of them."""
    prefix = words(9, 300)
    with Context(model, n_ctx=512, n_batch=512, n_seq=8, unified=True) as ctx:
        assert ctx.decode(prefix, 0, "none") == 0
        for seq in range(1, 8):
            ctx.seq_cp(0, seq)
        assert ctx.decode_rows([(7, 300, [seq]) for seq in range(8)]) == 0
        rows = [ctx.logits(i) for i in range(8)]
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_memory_functions_leave_logits_alone(model) -> None:
    """Breaks if what waits in another sequence takes the place of logits that nobody has read yet."""
    with Context(model, n_ctx=512, n_seq=3, unified=True) as ctx:
        assert ctx.decode(words(9, 12), 0, "none", seq=1) == 0
        assert ctx.decode(words(8, 12), 0) == 0
        want = ctx.logits()
        ctx.seq_cp(1, 2, 0, 4)
        assert np.array_equal(ctx.logits(), want)
        assert ctx.positions(2) == (0, 3)


def test_a_restored_state_is_copied_before_any_batch(model) -> None:
    """Breaks if a context knows only from its first batch on what computes for its memory."""
    with Context(model, n_ctx=512, n_seq=2, unified=True) as ctx:
        assert ctx.decode(words(9, 12), 0, "none") == 0
        raw = ctx.save(0)
    with Context(model, n_ctx=512, n_seq=2, unified=True) as ctx:
        assert ctx.restore(raw, 0) == len(raw)
        ctx.seq_cp(0, 1, 0, 4)
        assert ctx.positions(1) == (0, 3)
        ctx.clear()
        assert ctx.restore(raw, 0) == len(raw)
        assert ctx.seq_rm(0, 3, 5)


def test_an_announcement_ends_with_the_memory(model) -> None:
    """Breaks if what was announced before a clear makes an image of other embeddings, or a grid is believed."""
    image = picture(0)
    with Context(model, n_ctx=512) as ctx:
        ctx.announce(64, 64, 67108865)  # 64 as 32 bits have it
        embd = Image(image.embd)
        assert ctx.decode(embd.embd, 0, "none") == 0
        assert ctx.decode([5], 64) == 0
        assert [(im["nx"], im["ny"]) for im in ctx.report()["images"]] == [(64, 1)]
        ctx.clear()
        ctx.announce(64, 8, 8)
        ctx.clear()
        assert ctx.decode(embd.embd, 0, "none") == 0
        assert ctx.decode([5], 64) == 0
        assert ctx.report()["given"] == 0


def test_what_was_kept_is_told_of_the_last_prompts_images_alone(model) -> None:
    """Breaks if indices of one prompt are read as another's: after text, or after a second picture."""
    with Context(model, n_ctx=512) as ctx:
        assert ctx.prefill([[1], picture(0), words(0, 4)]) == 0
        assert ctx.report()["kept_from"] == [0]
        assert ctx.prefill([words(1, 4)], 69) == 0
        assert ctx.report()["kept_from"] == [None]
        assert ctx.prefill([picture(1), picture(2, 4, 4), words(2, 4)], 73) == 0
        assert ctx.report()["kept_from"] == [None, 0, 64]
