"""What the pages and the header promise and no other test enters: rare types, callers and batches."""

from __future__ import annotations

import ctypes as C
from pathlib import Path

import cases
import mrope
import native_runtime
import numpy as np
import pytest
from annealing import Conversation, native
from mrope import resolve as resolve_gemma
from native_runtime import Context, Model
from oracle import llama as oracle
from test_evict_only import KEYS, SHAPE, picture, resolve, words
from test_gemma3 import FAMILY, GemmaContext, give
from test_gemma3 import KEYS as GEMMA_KEYS
from test_gemma3 import prompt as gemma_prompt

# --- other types of cache ---


@pytest.mark.parametrize(("kv", "number", "most"), [("BF16", 30, 9e-6), ("Q4_0", 2, 1e-6), ("Q5_1", 7, 1.5e-3)])
def test_other_types_of_cache(rt, random_gguf, tally, monkeypatch, kv: str, number: int, most: float) -> None:
    """Breaks if a row of K or V of such a type is read otherwise: by scores, by attention, or where weights are handed
    on."""
    monkeypatch.setitem(native_runtime.KV_TYPES, kv, number)
    with Model(rt, random_gguf(SHAPE), KEYS) as model, Context(model, n_ctx=512, kv=kv) as ctx:
        talk = Conversation(ctx, random_gguf(SHAPE), resolve(KEYS), kv, tally, f"cache {kv}", most_error={kv: most})
        talk.prefill([[1, 5], picture(), words(0, 70)])
        for token in words(1, 8):
            talk.step(token)
        talk.picture(picture(1, 6, 6))
        talk.text(words(3, 9))
        for token in words(4, 6):
            talk.step(token)
        talk.close()


# --- samplers in the backend ---


def sampler(rt) -> object:
    L = rt.llama
    chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
    L.llama_sampler_chain_add(chain, L.llama_sampler_init_greedy())
    return chain


@pytest.mark.parametrize("n_seq", [1, 2])
def test_samplers_in_the_backend(rt, random_gguf, tally, n_seq: int) -> None:
    """Breaks if questions of several sequences, whose tokens the graph samples, are computed one by one."""
    path = random_gguf(SHAPE)
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512, n_seq=2, unified=True) as ctx:
        for seq in range(n_seq):
            assert rt.llama.llama_set_sampler(ctx.ptr, seq, sampler(rt))
        talks, rows = [], []
        for seq in range(n_seq):
            talk = Conversation(ctx, path, resolve(KEYS), "F16", tally, "backend samplers", seq)
            image, question = picture(seq), words(seq, 12)
            assert ctx.decode([1, 5], 0, "none", seq) == 0
            assert ctx.picture(native_runtime.Image(image.embd, 8, 8), 2, seq) == 0
            rows += [(token, 66 + i, [seq]) for i, token in enumerate(question)]
            talks.append((talk, image, question))
        last = [12 * seq + 11 for seq in range(n_seq)]
        assert ctx.decode_rows(rows, last) == 0
        for talk, image, question in talks:
            report = ctx.report(talk.seq)
            if n_seq == 1:
                assert (report["mode"], report["reason"]) == ("pruned-prefill", None)
                talk.follow("prefill", [[1, 5], image, question], check_logits=False)
            else:
                assert report["mode"] == "evict-only"
                assert report["reason"] == "several sequences have backend samplers"
                talk.before("silent", [1, 5])
                talk.before("picture", image)
                talk.follow("text", question, check_logits=False)
            token = rt.llama.llama_get_sampled_token_ith(ctx.ptr, last[talk.seq])
            assert talk.result.logits.max() - talk.result.logits[token] < 0.02 * np.ptp(talk.result.logits)
            talk.close()


# --- images whose tokens see each other, and a smaller ubatch ---


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope.write(tmp_path_factory.mktemp("gemma3") / "model.gguf", FAMILY, cases.SEED)


SMALL = {"n_ctx": 512, "n_ubatch": 40}  # the images have 72 and 30 tokens


def test_an_image_that_sees_itself_is_refused_by_a_smaller_ubatch(rt, gemma) -> None:
    """Breaks if it is computed in parts that do not see each other, or anything of the prompt stays."""
    with Model(rt, gemma, GEMMA_KEYS) as model, GemmaContext(model, **SMALL) as ctx:
        assert ctx.prefill(native(gemma_prompt(0))) == -100
        assert "an image of 72 tokens that see each other does not fit n_ubatch, which is 40" in rt.last_error()
        assert ctx.positions() == (-1, -1)


def test_parts_of_an_image_that_sees_itself(rt, gemma) -> None:
    """Breaks if parts that fit are pruned as if they saw each other, or computed otherwise than stock does."""
    text, image, *_ = gemma_prompt(0)
    got = []
    for keys in ({**GEMMA_KEYS, "st3.keep": 1.0, "st3.anneal": "none"}, {"st3.preset": "off"}, GEMMA_KEYS):
        with Model(rt, gemma, keys) as model, GemmaContext(model, **SMALL) as ctx:
            assert ctx.decode(text, 0, "none") == 0
            ctx.announce(72, image.nx, image.ny)
            for i in (0, 36):
                assert ctx.decode(image.embd[i : i + 36], len(text) + i, "none") == 0
            assert ctx.decode([7, 8, 9], len(text) + 72) == 0
            got.append(ctx.logits())
            report = ctx.report()
    assert oracle.nmse(got[0], got[1]) < 1e-6
    assert (report["mode"], report["reason"]) == ("evict-only", "attention is not causal")
    assert report["per_layer"] == resolve_gemma(FAMILY, GEMMA_KEYS).per_layer([72])


def test_a_waiting_image_that_sees_itself_in_a_smaller_context(rt, gemma) -> None:
    """Breaks if one of a state that needs a larger ubatch to be computed as it came is lost, or computed in parts."""
    text, image, *_, question = gemma_prompt(0)
    with Model(rt, gemma, GEMMA_KEYS) as model, GemmaContext(model, n_ctx=512) as ctx:
        give(ctx, [text, image, question])
        want = ctx.logits()
        ctx.clear()
        assert ctx.decode(text, 0, "none") == 0
        ctx.announce(72, image.nx, image.ny)
        assert ctx.decode(image.embd, len(text), "none") == 0
        state = ctx.save(0)
        with GemmaContext(model, **SMALL) as small:
            assert small.restore(state, 0) == len(state)
            assert not small.seq_rm(0, 10, 20), "the middle of what waits: it is to be computed before"
            assert small.report(0)["waiting"] == len(text) + 72
            assert small.decode(question, len(text) + 72) == 0
            assert small.report()["mode"] == "pruned-prefill"
            assert np.array_equal(small.logits(), want)


# --- an image of several sequences ---


def decode_embeddings(ctx: Context, embd: np.ndarray, seqs: list[list[int]], places: list[int]) -> int:
    """llama_decode of embeddings [n, width] at those places of those sequences, without outputs."""
    L, n = ctx.rt.llama, len(embd)
    batch = L.llama_batch_init(n, embd.shape[1], 2)
    try:
        batch.n_tokens = n
        C.memmove(batch.embd, np.ascontiguousarray(embd, np.float32).ctypes.data, 4 * embd.size)
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = places[i], len(seqs[i]), 0
            for j, seq in enumerate(seqs[i]):
                batch.seq_id[i][j] = seq
        return L.llama_decode(ctx.ptr, batch)
    finally:
        L.llama_batch_free(batch)


@pytest.mark.parametrize("n_ubatch", [128, 40])
@pytest.mark.parametrize("shared", [False, True], ids=["rows of their own", "shared rows"])
def test_an_image_of_several_sequences(rt, random_gguf, tally, shared: bool, n_ubatch: int) -> None:
    """Breaks if such an image is pruned in the graph, or belongs to one of them, or a part of it to each."""
    path = random_gguf(SHAPE)
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512, n_seq=2, unified=True, n_ubatch=n_ubatch) as ctx:
        image = picture()
        ctx.announce(64, 8, 8)
        if shared:
            assert decode_embeddings(ctx, image.embd, [[0, 1]] * 64, list(range(64))) == 0
        else:
            both = np.concatenate([image.embd, image.embd])
            assert decode_embeddings(ctx, both, [[0]] * 64 + [[1]] * 64, 2 * list(range(64))) == 0
        for seq in (0, 1):
            talk = Conversation(ctx, path, resolve(KEYS), "F16", tally, "an image of two", seq)
            talk.before("picture", image)
            talk.text(words(seq, 12))
            assert ctx.report(seq)["mode"] == "evict-only"
            assert ctx.report(seq)["reason"] == "an image of several sequences"
            assert ctx.report(seq)["images"] == [{"n": 64, "nx": 8, "ny": 8}]
            for token in words(seq + 2, 4):
                talk.step(token)
            talk.close()
