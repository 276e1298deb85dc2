"""Prompts that cannot be decoded: a clear code, and nothing left behind."""

from __future__ import annotations

import ctypes

import cases
import numpy as np
import pytest
from annealing import MOST_ERROR
from cases import SEED
from native_runtime import Context, Image, Model, NativeError
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


def test_kept_tokens_are_those_of_the_last_prompt(model) -> None:
    """Breaks if a sequence without images, or a prompt of text alone, gets what another one kept."""
    with Context(model, n_ctx=512, n_seq=2) as ctx:
        assert ctx.prefill(GOOD) == 0
        kept = ctx.kept(1)
        assert len(kept[0]) == 32
        assert ctx.prefill([[5, 6]], p0=ctx.positions()[1] + 1) == 0
        with pytest.raises(NativeError):
            ctx.kept(1)
        assert ctx.prefill([[1, 5], picture(36, 6, 6), [7]], seq=1) == 0
        assert len(ctx.kept(1)[0]) == 18 and ctx.kept(1)[0].max() < 36


@pytest.mark.parametrize("p0", [1, 2**31 - 100])
def test_a_prompt_begins_where_the_sequence_ends(rt, ctx, p0: int) -> None:
    """Breaks if an empty sequence can begin anywhere."""
    assert ctx.prefill(GOOD, p0=p0) == -100
    assert "goes on at position 0" in rt.last_error() and ctx.positions() == (-1, -1)


def test_a_report_that_cannot_be_is_empty(rt) -> None:
    """Breaks if what was in the caller's memory could be taken for a report."""
    out = ctypes.create_string_buffer(b"garbage", 16)
    assert rt.lib.st3_report(None, 0, out, 16) == 0 and out.value == b""


def test_inputs_of_layers_are_not_extracted_from_pruned_rows(rt, ctx) -> None:
    """Breaks if a prompt whose layers' inputs are asked for is pruned: upstream aborts on layers with fewer rows."""
    ask = getattr(rt.lib, "_Z30llama_set_embeddings_layer_inpP13llama_contextjb", None)
    if ask is None:
        pytest.skip("another compiler's names")
    ask.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool]
    ask(ctx.ptr, 2, True)
    assert ctx.prefill(GOOD) == 0
    assert ctx.report()["mode"] == "evict-only" and ctx.report()["reason"] == "embeddings are asked for"


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


def test_too_small_batch_says_so(model, random_gguf) -> None:
    """Breaks if a prompt that exceeds the batch is pruned wrongly, or falls back without a reason."""
    full = oracle.Decoder(random_gguf(SHAPE)).prefill(
        [oracle.Image(p.embd, p.nx, p.ny) if isinstance(p, Image) else p for p in GOOD], None, "F16"
    )
    with Context(model, n_ctx=256, n_ubatch=32, n_batch=64) as ctx:
        assert ctx.prefill(GOOD) == 0
        report = ctx.report()
        assert report["mode"] != "pruned-prefill"
        assert report["reason"]
        assert oracle.nmse(ctx.logits(), full.logits) < MOST_ERROR["F16"]


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
