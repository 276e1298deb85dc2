"""M-RoPE and deepstack: the tokens of an image share a position, and layers add rows to them."""

from __future__ import annotations

from pathlib import Path

import mrope
import numpy as np
import pytest
from annealing import Conversation, decoder, native
from cases import SEED
from mrope import FAMILIES, Family, RowContext, converse, drawn_keys, resolve, words
from native_runtime import Model
from oracle import llama as oracle
from oracle import mrope as oracle_mrope

KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2, "st3.anneal_tokens": 12}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory):
    """Writes a family's model once."""
    folder, made = tmp_path_factory.mktemp("mrope"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = mrope.write(folder / f"{name}.gguf", FAMILIES[name], SEED)
        return made[name]

    return make


def prompt(f: Family, number: int) -> list[oracle.Piece]:
    """Two images of different grids, with text before, between and after them."""
    rng = np.random.default_rng([SEED, 50, number])
    nx, ny = (int(n) for n in rng.integers(4, 11, 2))
    return [
        [1, *words(f, rng, 3)],
        mrope.picture(f, rng, nx, ny),
        words(f, rng, 2),
        mrope.picture(f, rng, ny, 5),
        words(f, rng, int(rng.choice([5, 70]))),
    ]


def keys_of(f: Family, number: int) -> dict:
    """The default, and draws of what else there is."""
    if number == 0:
        return {"st3.preset": "st3", "st3.budget": 0.3}
    rng = np.random.default_rng([SEED, 51, number])
    return {
        **drawn_keys(rng, number),
        "st3.coverage": float(rng.choice([0.0, 0.25])),
        "st3.anneal": str(rng.choice(["linear", "cosine", "exponential"])),
        "st3.anneal_tokens": int(rng.integers(4, 16)),
        "st3.anneal_floor": 0.2,
    }


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", FAMILIES)
def test_conversation(rt, path, tally, name: str, number: int) -> None:
    """Breaks if a rotary position, a row of deepstack, a mask, a score, a cut, an owner or a removed cell is wrong: in
    a first prompt, an answer, a question that follows, a second prompt with images, or an image cut down afterwards."""
    f = FAMILIES[name]
    keys, kv = keys_of(f, number), "Q8_0" if number == 3 else "F16"
    with Model(rt, path(name), keys) as model, RowContext(model, n_ctx=1024, kv=kv) as ctx:
        talk = Conversation(ctx, path(name), resolve(f, keys), kv, tally, name=name)
        decoder(path(name)).places = ctx.places
        rng = np.random.default_rng([SEED, 52, number])
        converse(f, talk, rng, prompt(f, number), prompt(f, number + 100))


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("name", ["qwen2vl", "qwen3vl"])
def test_sequences_side_by_side(rt, path, tally, name: str, unified: bool) -> None:
    """Breaks if a row gets the places, weights, scores or removed cells of another sequence's."""
    f = FAMILIES[name]
    with Model(rt, path(name), KEYS) as model, RowContext(model, n_ctx=1024, n_seq=2, unified=unified) as ctx:
        talks = []
        for seq, view in enumerate((ctx, ctx.beside())):
            dec = oracle_mrope.Decoder(path(name))
            dec.places = view.places
            talks.append(Conversation(view, dec, resolve(f, KEYS), "F16", tally, f"two of {name}", seq))
        rng = np.random.default_rng([SEED, 53])
        mrope.side_by_side(f, talks, [prompt(f, 0), prompt(f, 1)], rng)


def follow(ctx: RowContext, n: int = 6) -> list[np.ndarray]:
    """Logits now and after each of n fixed tokens."""
    out = [ctx.logits()]
    for i in range(n):
        assert ctx.decode([7 + i], len(ctx.places)) == 0
        out.append(ctx.logits())
    return out


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def give(ctx: RowContext, pieces: list[oracle.Piece], ask: bool = True) -> None:
    """Pieces by llama_decode, as mtmd's helper does; ask: the last token's logits."""
    for i, piece in enumerate(pieces):
        outputs = "last" if ask and i == len(pieces) - 1 else "none"
        if isinstance(piece, oracle.Image):
            ctx.announce(len(piece.embd), piece.nx, piece.ny)
        assert ctx.decode(piece.embd if isinstance(piece, oracle.Image) else piece, len(ctx.places), outputs) == 0


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(rt, path, family):
    with Model(rt, path(family.arch), KEYS) as m:
        yield m


@pytest.fixture(scope="module")
def fresh(model, family):
    """Logits of the prompt and 6 tokens, and what each layer held after it."""
    with RowContext(model, n_ctx=512) as ctx:
        assert ctx.prefill(native(prompt(family, 0))) == 0
        held = [ctx.held(i) for i in range(family.shape.n_layer)]
        return follow(ctx), held


@pytest.mark.parametrize("how", [{}, {"n_ubatch": 16}, {"n_seq": 2, "unified": True}], ids=str)
def test_waiting_is_prefill(model, family, fresh, how: dict) -> None:
    """Breaks if an image of one position does not wait, loses its grid, or keeps other tokens than st3_prefill does."""
    with RowContext(model, n_ctx=512, **how) as ctx:
        give(ctx, prompt(family, 0)[:2], ask=False)
        first = prompt(family, 0)[1]
        assert ctx.report(0)["waiting"] == len(ctx.places)
        assert ctx.positions() == (0, 4), "an image takes one position, as in stock"
        give(ctx, prompt(family, 0)[2:])
        report = ctx.report()
        assert (report["mode"], report["reason"], report["waiting"]) == ("pruned-prefill", None, 0)
        assert report["images"][0] == {"n": len(first.embd), "nx": first.nx, "ny": first.ny}
        assert all(np.array_equal(a, ctx.held(i)) for i, a in enumerate(fresh[1]))
        assert same(follow(ctx), fresh[0])


def test_an_image_may_come_in_parts(model, family, fresh) -> None:
    """Breaks if the parts of an image, which share a position, are refused or taken for several images."""
    with RowContext(model, n_ctx=512) as ctx:
        text, image, *rest = prompt(family, 0)
        assert ctx.decode(text, 0, "none") == 0
        ctx.announce(len(image.embd), image.nx, image.ny)
        before = len(ctx.places)
        ctx.add([image])
        for i in range(0, len(image.embd), 13):
            assert ctx.decode_at(image.embd[i : i + 13], ctx.places[before:][i : i + 13]) == 0
        give(ctx, rest)
        assert ctx.report()["images"][0] == {"n": len(image.embd), "nx": image.nx, "ny": image.ny}
        assert same(follow(ctx), fresh[0])


def test_tokens_out_of_order_are_cut_down_afterwards(model, family) -> None:
    """Breaks if rows whose places do not ascend are pruned in the graph, whose masks go by the order of rows."""
    with RowContext(model, n_ctx=512) as ctx:
        text, image, *_ = prompt(family, 0)
        assert ctx.decode(text, 0, "none") == 0
        ctx.announce(len(image.embd), image.nx, image.ny)
        before = len(ctx.places)
        ctx.add([image])
        order = np.arange(len(image.embd)).reshape(image.ny, image.nx).T.ravel()
        assert ctx.decode_at(image.embd[order], [ctx.places[before:][i] for i in order]) == 0
        assert ctx.decode([7, 8, 9], len(ctx.places)) == 0
        report = ctx.report()
        assert report["mode"] == "evict-only" and "ascend" in report["reason"]
        assert report["held"][-1] == report["counts"][-1][0] < len(image.embd)
        follow(ctx)


@pytest.mark.parametrize("n_pieces", [2, 3, 5])
@pytest.mark.parametrize("seq", [0, -1], ids=["one sequence", "all"])
def test_saved_states(model, family, fresh, n_pieces: int, seq: int) -> None:
    """Breaks if a state loses where the tokens of an image are: while it waits, while the answer grows, and where the
    question is taken back after it was restored."""
    pieces = prompt(family, 0)
    with RowContext(model, n_ctx=512) as ctx, RowContext(model, n_ctx=512) as other:
        give(ctx, pieces[:n_pieces], ask=n_pieces == 5)
        if n_pieces == 5:
            assert same(follow(ctx), fresh[0])
        state = ctx.save(seq)
        assert other.restore(state, seq) == len(state)
        other.places, other.visual, other.end = list(ctx.places), list(ctx.visual), ctx.end
        assert other.save(seq) == state
        if n_pieces == 5:
            for layer in range(family.shape.n_layer):
                assert np.array_equal(ctx.held(layer), other.held(layer))
            assert ctx.decode([5], len(ctx.places)) == other.decode([5], len(other.places)) == 0
            assert oracle.nmse(ctx.logits(), other.logits()) < 1e-6, "cells in another order are summed up in F16"
            question = len(other.places) - 7 - len(pieces[-1])
            assert other.seq_rm(0, question + 1)
            assert other.report(0)["waiting"] == question + 1
            pieces = [pieces[-1][1:]]
        else:
            pieces = pieces[n_pieces:]
        give(other, pieces)
        assert same(follow(other), fresh[0])


def test_another_question_about_the_same_pictures(model, family, fresh) -> None:
    """Breaks if taking back a question, or an image with it, leaves tokens that share the image's position."""
    pieces = prompt(family, 0)
    with RowContext(model, n_ctx=512) as ctx:
        give(ctx, pieces)
        follow(ctx)
        second = len(pieces[0]) + len(pieces[1].embd) + len(pieces[2])
        assert ctx.seq_rm(0, second)
        assert ctx.report(0)["waiting"] == second
        give(ctx, pieces[3:])
        assert same(follow(ctx), fresh[0])
        assert ctx.seq_rm(0, 0) and ctx.report(0)["waiting"] == 0
        assert [len(ctx.held(i)) for i in range(family.shape.n_layer)] == [0] * family.shape.n_layer
        give(ctx, pieces)
        assert same(follow(ctx), fresh[0])
