"""A kept token stands for those that left: what the oracle's parity tests, which merge by default, do not ask."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from annealing import native
from cases import SEED
from native_runtime import Context, Image, Model, NativeError
from oracle import llama as oracle

SHAPE = cases.SHAPES["gqa-32"]
KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2}


@pytest.fixture(scope="module")
def path(random_gguf):
    return random_gguf(SHAPE)


def prompt(n_images: int = 1) -> list[oracle.Piece]:
    return cases.prompt(np.random.default_rng([SEED, 30]), SHAPE, n_images, 20)


def answer(ctx: Context, at: int, n: int = 8) -> list[np.ndarray]:
    """Logits after each of n tokens from position `at` on."""
    out = []
    for i in range(n):
        assert ctx.decode([5 + i], at + i) == 0
        out.append(ctx.logits())
    return out


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("flash", [True, False])
def test_weights_of_one_change_no_bit(rt, path, kv: str, flash: bool) -> None:
    """Breaks if merging where nothing is dropped changes a mask, a row or a score."""
    if kv != "F16" and not flash:
        pytest.skip("a quantized V needs flash attention")
    got = []
    for merge in (True, False):
        keys = {**KEYS, "st3.keep": 1.0, "st3.merge": merge, "st3.anneal": "none"}
        with Model(rt, path, keys) as model, Context(model, n_ctx=512, kv=kv, flash=flash) as ctx:
            assert ctx.prefill(native(prompt(2))) == 0
            got.append([ctx.logits(), *answer(ctx, ctx.positions()[1] + 1)])
    assert all(np.array_equal(a, b) for a, b in zip(*got, strict=True))


def test_a_mask_without_flash_attention_has_weights_too(rt, path) -> None:
    """Breaks if the weights are left out of an F32 mask, in the prefill or in a decode."""
    got = []
    for flash in (True, False):
        # F32 and F16 masks round differently, and with distances that may change which of two like tokens stays
        keys = {**KEYS, "st3.rank": "score"}
        with Model(rt, path, keys) as model, Context(model, n_ctx=512, flash=flash) as ctx:
            assert ctx.prefill(native(prompt(2))) == 0
            got.append([ctx.logits(), *answer(ctx, ctx.positions()[1] + 1, 1)])
    for with_flash, without in zip(*got, strict=True):
        assert oracle.nmse(without, with_flash) < 1e-4


def test_tokens_that_are_all_alike_stand_for_themselves(rt, path) -> None:
    """Breaks if a kept token is owned by another, which leaves it no weight and the mask an infinity."""
    flat = np.repeat(np.random.default_rng(SEED).standard_normal((1, SHAPE.n_embd)), 64, 0).astype(np.float32)
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512) as ctx:
        assert ctx.prefill([[1, 5], Image(flat, 8, 8), [7, 8, 9]]) == 0
        for kept, owners in zip(ctx.kept(3), ctx.owners(3), strict=True):
            assert np.array_equal(owners[kept], kept)
        assert np.isfinite(ctx.logits()).all()
        assert all(np.isfinite(row).all() for row in answer(ctx, 69))


@pytest.mark.parametrize("rank", ["score", "distance"])
def test_the_most_images_with_a_cut_after_each_layer_fit_the_graph(rt, path, rank: str) -> None:
    """Breaks if the graph has no room for the nodes of 16 images, 7 cuts and three terms."""
    rng = np.random.default_rng([SEED, 31])
    pieces = [Image(rng.standard_normal((16, SHAPE.n_embd)).astype(np.float32), 4, 4) for _ in range(16)]
    keys = {**KEYS, "st3.start": 1, "st3.stride": 1, "st3.keep": 0.8, "st3.rank": rank}
    keys["st3.score"] = "last-mean-sum+text-max-sum+text-mean"
    with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
        assert ctx.prefill([*pieces, [5, 6, 7]]) == 0, rt.last_error()
        assert ctx.report()["mode"] == "pruned-prefill"
        assert all(len(of) == 256 and of.min() >= 0 for of in ctx.owners(7))


def test_there_are_no_owners_where_nothing_was_merged(rt, path) -> None:
    """Breaks if owners of an earlier prompt, or of one that was not merged, are given."""
    for keys in ({**KEYS, "st3.merge": False}, {"st3.preset": "off"}):
        with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
            assert ctx.prefill(native(prompt())) == 0
            with pytest.raises(NativeError, match="merged"):
                ctx.owners(1)
