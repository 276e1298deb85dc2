"""Prompts that cannot be decoded: a clear code, and nothing left behind."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Image, Model
from oracle import llama as oracle

SHAPE = cases.SHAPES["mha-32"]
KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2}


def picture(n: int = 64, nx: int = 8, ny: int = 8) -> Image:
    return Image(np.random.default_rng([SEED, n]).standard_normal((n, SHAPE.n_embd)).astype(np.float32), nx, ny)


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


@pytest.fixture
def ctx(model):
    with Context(model, n_ctx=256) as c:
        yield c


GOOD = [[1, 5], picture(), [7, 8, 9]]


@cases.can_abort
def test_aborted_prefill_leaves_nothing(model, ctx) -> None:
    """Breaks if an abort in the middle of the graph leaves cells, or spoils the next prefill."""
    with Context(model, n_ctx=256) as fresh:
        assert fresh.prefill(GOOD) == 0
        want = fresh.logits()
    for after in (0, 1, 20, 100):
        calls = iter(range(10**9))
        ctx.abort_when(lambda calls=calls, after=after: next(calls) >= after)
        assert ctx.prefill(GOOD) != 0
        assert ctx.positions() == (-1, -1)
    ctx.abort_when(None)
    assert ctx.prefill(GOOD) == 0
    assert np.array_equal(ctx.logits(), want)


def test_prompt_longer_than_the_context(ctx) -> None:
    """Breaks if a prompt that does not fit is cut short, crashes, or leaves cells."""
    assert ctx.prefill([[1], picture(), [5] * 400]) != 0
    assert ctx.positions() == (-1, -1)
    assert ctx.prefill(GOOD) == 0


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [[1, 2], picture()],
        [[1], []],
        [[1, 2], picture(64, 8, 7), [3]],
        [[1, 2], picture(64, -8, -8), [3]],
        [[1, 10**6], picture(), [3]],
        [[1, -1], picture(), [3]],
    ],
    ids=["none", "ends in an image", "empty run", "grid", "negative grid", "token too large", "negative token"],
)
def test_unusable_pieces(rt, ctx, pieces) -> None:
    """Breaks if unusable arguments are decoded, crash, or are refused without a word."""
    assert ctx.prefill(pieces) == -100
    assert rt.last_error()
    assert ctx.positions() == (-1, -1)


def test_unusable_positions(rt, ctx) -> None:
    """Breaks if a negative position or a sequence that the context lacks reaches the decoder."""
    for p0, seq in ((-1, 0), (0, 1), (0, -1)):
        assert ctx.prefill(GOOD, p0=p0, seq=seq) == -100
        assert rt.last_error()


def test_too_small_ubatch_says_so(model, random_gguf) -> None:
    """Breaks if a prompt that exceeds the ubatch is pruned wrongly, or falls back without a reason."""
    full = oracle.Decoder(random_gguf(SHAPE)).prefill(
        [oracle.Image(p.embd, p.nx, p.ny) if isinstance(p, Image) else p for p in GOOD], None, "F16"
    )
    with Context(model, n_ctx=256, n_ubatch=32, n_batch=256) as ctx:
        assert ctx.prefill(GOOD) == 0
        report = ctx.report()
        assert report["mode"] != "pruned-prefill"
        assert report["reason"]
        assert oracle.nmse(ctx.logits(), full.logits) < 1e-3


def test_text_only_prompt(model) -> None:
    """Breaks if a prompt without images fails, or claims to have been pruned."""
    with Context(model, n_ctx=256) as ctx:
        assert ctx.prefill([[1, 2, 3, 4]]) == 0
        report = ctx.report()
        assert report["mode"] == "off"
        assert report["given"] == 0
        want = ctx.logits()
        ctx.clear()
        assert ctx.decode([1, 2, 3, 4], 0) == 0
        assert np.array_equal(ctx.logits(), want)
