"""The cache behind a pruned prompt, by llama.cpp's own memory and state functions."""

from __future__ import annotations

import ctypes as C

import cases
import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Image, Model
from oracle import llama as oracle

SHAPE = cases.SHAPES["gqa-32"]
KEYS = {"st3.preset": "pvtp", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2}
N_PROMPT = 2 + 81 + 70


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


@pytest.fixture
def ctx(model):
    with Context(model, n_ctx=256) as c:
        yield c


def prompt(number: int = 0) -> list:
    rng = np.random.default_rng([SEED, 9, number])
    words = [int(t) for t in rng.integers(3, SHAPE.n_vocab, 70)]
    return [[1, 5], Image(rng.standard_normal((81, SHAPE.n_embd)).astype(np.float32), 9, 9), words]


def generate(ctx: Context, at: int, n: int) -> list[np.ndarray]:
    """Logits before and after each of n greedy steps from position `at` on."""
    out = [ctx.logits()]
    for i in range(n):
        assert ctx.decode([int(np.argmax(out[-1]))], at + i) == 0
        out.append(ctx.logits())
    return out


def test_rewind(rt, ctx) -> None:
    """Breaks if generated positions cannot be taken back from every stage, or prompt cells go with them."""
    assert ctx.prefill(prompt()) == 0
    first = generate(ctx, N_PROMPT, 6)
    memory = rt.llama.llama_get_memory(ctx.ptr)
    assert rt.llama.llama_memory_seq_rm(memory, 0, N_PROMPT + 2, -1)
    assert ctx.positions() == (0, N_PROMPT + 1)
    assert ctx.decode([int(np.argmax(first[2]))], N_PROMPT + 2) == 0
    assert oracle.nmse(ctx.logits(), first[3]) < 1e-9


@pytest.mark.parametrize("second", [[[7, 8, 9]], [Image(np.ones((16, SHAPE.n_embd), np.float32), 4, 4), [7]]])
def test_prompt_that_goes_on(ctx, second) -> None:
    """Breaks if a prompt part at a later position overwrites cells, or is refused without a reason."""
    assert ctx.prefill(prompt()) == 0
    code = ctx.prefill(second, p0=N_PROMPT)
    assert code == 0, ctx.rt.last_error()
    n = sum(len(p.embd) if isinstance(p, Image) else len(p) for p in second)
    assert ctx.positions() == (0, N_PROMPT + n - 1)
    report = ctx.report()
    assert report["mode"] in ("pruned-prefill", "off", "evict-only")
    assert np.isfinite(ctx.logits()).all()


def test_text_first_then_image(model, ctx) -> None:
    """Breaks if cells that are already there are not seen, or scored wrongly, by a prompt that is pruned."""
    pieces = prompt()
    with Context(model, n_ctx=256) as one:
        assert one.prefill(pieces) == 0
        want, kept = one.logits(), one.kept(4)
    assert ctx.prefill(pieces[:1]) == 0
    assert ctx.prefill(pieces[1:], p0=2) == 0
    if ctx.report()["mode"] != "pruned-prefill":
        assert ctx.report()["reason"]
        return
    assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), kept, strict=True))
    assert oracle.nmse(ctx.logits(), want) < 1e-6


def test_many_prompts(ctx) -> None:
    """Breaks if cells of a cleared prompt are never used again."""
    want = None
    for round_ in range(12):
        ctx.clear()
        assert ctx.prefill(prompt(round_ % 3)) == 0
        last = generate(ctx, N_PROMPT, 3)[-1]
        if round_ % 3 == 0:
            want = last if want is None else want
            assert np.array_equal(last, want)


def saved(rt, ctx) -> bytes:
    """The state of sequence 0."""
    size = rt.llama.llama_state_seq_get_size(ctx.ptr, 0)
    assert size > 0
    raw = (C.c_uint8 * size)()
    assert rt.llama.llama_state_seq_get_data(ctx.ptr, raw, size, 0) == size
    return bytes(raw)


def restore(rt, ctx, raw: bytes) -> int:
    """Bytes read, 0 where the state is refused."""
    return rt.llama.llama_state_seq_set_data(ctx.ptr, (C.c_uint8 * max(1, len(raw)))(*raw), len(raw), 0)


def test_state(rt, model, ctx) -> None:
    """Breaks if a saved state is read back as another state."""
    assert ctx.prefill(prompt()) == 0
    raw = saved(rt, ctx)
    token = int(np.argmax(ctx.logits()))
    assert ctx.decode([token], N_PROMPT) == 0
    want = ctx.logits()
    with Context(model, n_ctx=256) as other:
        assert restore(rt, other, raw) == len(raw)
        assert other.positions() == (0, N_PROMPT - 1)
        assert other.decode([token], N_PROMPT) == 0
        assert oracle.nmse(other.logits(), want) < 1e-9


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_truncated_state(rt, ctx, model, share: float) -> None:
    """Breaks if a truncated state crashes, or leaves the stages that came before its end filled."""
    assert ctx.prefill(prompt()) == 0
    raw = saved(rt, ctx)
    with Context(model, n_ctx=256) as other:
        assert restore(rt, other, raw[: int(share * (len(raw) - 1))]) == 0
        assert other.positions() == (-1, -1)


def test_scrambled_state(rt, ctx, model) -> None:
    """Breaks if counts, positions or types in a state are believed: a crash, or a context that is spoilt."""
    assert ctx.prefill(prompt()) == 0
    want, raw = ctx.logits(), saved(rt, ctx)
    rng = np.random.default_rng(SEED)
    with Context(model, n_ctx=256) as other:
        for n in range(200):
            bad = bytearray(raw)
            for at in rng.integers(0, len(raw) if n % 2 else 64, 3):
                bad[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
            restore(rt, other, bytes(bad))
            other.decode([5], other.positions()[1] + 1)
            other.clear()
        assert other.prefill(prompt()) == 0
        assert np.array_equal(other.logits(), want)


def test_full_context(model) -> None:
    """Breaks if decoding past the context crashes instead of saying that there is no room."""
    with Context(model, n_ctx=256) as ctx:
        assert ctx.prefill(prompt()) == 0
        assert [ctx.decode([5], i) for i in range(N_PROMPT, 256)] == [0] * (256 - N_PROMPT)
        assert [ctx.decode([5], 256) for _ in range(3)] == [1, 1, 1]
        assert ctx.positions() == (0, 255)


@pytest.mark.parametrize("unified", [False, True])
def test_two_sequences(model, unified: bool) -> None:
    """Breaks if a prompt of one sequence scores, drops or sees cells of another."""
    alone = []
    for number in (0, 1):
        with Context(model, n_ctx=256) as ctx:
            assert ctx.prefill(prompt(number)) == 0
            alone.append([ctx.kept(4), *generate(ctx, N_PROMPT, 2)])
    with Context(model, n_ctx=512, n_seq=2, unified=unified) as ctx:
        for seq in (0, 1):
            assert ctx.prefill(prompt(seq), seq=seq) == 0
            assert ctx.report()["mode"] == "pruned-prefill"
            assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), alone[seq][0], strict=True))
            assert oracle.nmse(ctx.logits(), alone[seq][1]) < 1e-6
        for step in (0, 1):
            for seq in (1, 0):
                assert ctx.decode([int(np.argmax(alone[seq][1 + step]))], N_PROMPT + step, seq=seq) == 0
                assert oracle.nmse(ctx.logits(), alone[seq][2 + step]) < 1e-5
