"""Gemma 3: sliding windows, images whose tokens see each other, tokens that the graph scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mrope
import numpy as np
import pytest
from annealing import Conversation, native
from cases import SEED
from mrope import Family, converse, drawn_keys, resolve, words
from native_runtime import Context, Image, Model
from oracle import llama as oracle

from st3_edge.commands.bench.shapes import Shape

WINDOW = 48  # less than an image
FAMILY = Family(
    "gemma3",
    Shape(8, 128, 4, 2, 192, n_vocab=320, tied=True, rope_base=1e6),
    metadata=(
        ("attention.sliding_window", WINDOW),
        ("attention.sliding_window_pattern", 3),
        ("rope.freq_base_swa", 10000.0),
    ),
)
KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2, "st3.anneal_tokens": 12}


class GemmaContext(Context):
    """A context that decodes images as mtmd does: their tokens see each other."""

    def prefill(self, pieces: Sequence[Sequence[int] | Image], p0: int = 0, seq: int = 0) -> int:
        """st3_prefill."""
        seen = [replace(p, non_causal=True) if isinstance(p, Image) else p for p in pieces]
        return super().prefill(seen, p0, seq)

    def decode(self, rows: Sequence[int] | np.ndarray, p0: int, outputs: str = "last", seq: int = 0) -> int:
        """llama_decode."""
        L = self.rt.llama
        L.llama_set_causal_attn(self.ptr, not isinstance(rows, np.ndarray))
        try:
            return super().decode(rows, p0, outputs, seq)
        finally:
            L.llama_set_causal_attn(self.ptr, True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope.write(tmp_path_factory.mktemp("gemma3") / "model.gguf", FAMILY, SEED)


def prompt(number: int) -> list[oracle.Piece]:
    """Two images, one longer than the window, with text before, between and after them."""
    rng = np.random.default_rng([SEED, 60, number])
    return [
        [1, *words(FAMILY, rng, 3)],
        mrope.picture(FAMILY, rng, 9, 8),
        words(FAMILY, rng, 2),
        mrope.picture(FAMILY, rng, 5, 6),
        words(FAMILY, rng, int(rng.choice([5, 70]))),
    ]


def keys_of(number: int) -> dict:
    rng = np.random.default_rng([SEED, 61, number])
    if number == 0:
        return {"st3.preset": "st3", "st3.budget": 0.3}
    return {
        **drawn_keys(rng, number),
        "st3.anneal": "linear",
        "st3.anneal_tokens": int(rng.integers(4, 16)),
        "st3.anneal_floor": 0.2,
    }


@pytest.mark.parametrize("number", range(5))
def test_conversation(rt, path, tally, number: int) -> None:
    """Breaks if a window goes by other positions than those of the tokens that stayed, if an image is causal, a text
    row is not scaled, or anything that test_mrope asks for is wrong."""
    keys, kv = keys_of(number), "Q8_0" if number == 3 else "F16"
    with Model(rt, path, keys) as model, GemmaContext(model, n_ctx=1024, kv=kv) as ctx:
        talk = Conversation(ctx, path, resolve(FAMILY, keys), kv, tally, name="gemma3")
        rng = np.random.default_rng([SEED, 62, number])
        converse(FAMILY, talk, rng, prompt(number), prompt(number + 100))


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_side_by_side(rt, path, tally, unified: bool) -> None:
    """Breaks if a row's window, or what its images see ahead, is that of another sequence."""
    with Model(rt, path, KEYS) as model, GemmaContext(model, n_ctx=1024, n_seq=2, unified=unified) as ctx:
        talks = [Conversation(ctx, path, resolve(FAMILY, KEYS), "F16", tally, "two of gemma3", seq) for seq in (0, 1)]
        mrope.side_by_side(FAMILY, talks, [prompt(0), prompt(1)], np.random.default_rng([SEED, 63]))


def give(ctx: Context, pieces: list[oracle.Piece]) -> None:
    """Pieces by llama_decode, as mtmd's helper does; the last one asks."""
    for i, piece in enumerate(pieces):
        at = ctx.positions()[1] + 1
        if isinstance(piece, oracle.Image):
            ctx.announce(len(piece.embd), piece.nx, piece.ny)
            assert ctx.decode(piece.embd, at, "none") == 0
        else:
            assert ctx.decode(piece, at, "last" if i == len(pieces) - 1 else "none") == 0


def follow(ctx: Context, n: int = 6) -> list[np.ndarray]:
    out = [ctx.logits()]
    for i in range(n):
        assert ctx.decode([7 + i], ctx.positions()[1] + 1) == 0
        out.append(ctx.logits())
    return out


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_waiting_states_and_another_question(rt, path) -> None:
    """Breaks if an image that waits, in a context or in a state, forgets that its tokens see each other, also where its
    question was taken back."""
    pieces = prompt(0)
    with Model(rt, path, KEYS) as model:
        with GemmaContext(model, n_ctx=512) as ctx:
            assert ctx.prefill(native(pieces)) == 0
            want = follow(ctx)
        with GemmaContext(model, n_ctx=512) as ctx, GemmaContext(model, n_ctx=512) as other:
            give(ctx, pieces)
            assert ctx.report()["mode"] == "pruned-prefill"
            assert same(follow(ctx), want)
            n = len(pieces[-1])
            assert ctx.seq_rm(0, sum(len(getattr(p, "embd", p)) for p in pieces) - n + 1, -1)
            assert ctx.report(0)["waiting"] > 100
            state = ctx.save(0)
            assert other.restore(state, 0) == len(state)
            for c in (ctx, other):
                give(c, [pieces[-1][1:]])
                assert same(follow(c), want)


def test_what_waits_is_computed_as_it_came(rt, path) -> None:
    """Breaks if an image whose tokens see each other is computed as causal when it cannot be pruned in the graph."""
    pieces = prompt(0)
    off = {"st3.preset": "st3", "st3.keep": 1.0, "st3.anneal": "none"}
    got = []
    for n_batch in (512, 100):
        with Model(rt, path, off) as model, GemmaContext(model, n_ctx=512, n_batch=n_batch) as ctx:
            give(ctx, pieces)
            assert ctx.report()["mode"] == ("pruned-prefill" if n_batch == 512 else "evict-only")
            got.append(follow(ctx))
    assert all(oracle.nmse(a, b) < 1e-5 for a, b in zip(*got, strict=True))
