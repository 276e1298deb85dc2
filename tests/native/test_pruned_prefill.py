"""Pruned prefill against the oracle: the tokens kept at every cut, the logits, and decoding from there on."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from annealing import AGAIN, MOST_ERROR, NEAR_TIE, check_owners, decoder, native
from cases import SEED
from native_runtime import Context, Image, Model
from oracle import llama as oracle

N_CASES = 100
EXCUSES = ("near-ties", "cuts decided by the rounding of a quantized cache")


def held(pieces, kept: list[np.ndarray]) -> list[np.ndarray]:
    """The positions of visual tokens in each stage, given the indices kept at each cut."""
    sizes = [(len(p.embd), True) if isinstance(p, oracle.Image) else (len(p), False) for p in pieces]
    positions = np.flatnonzero(np.concatenate([np.full(n, visual) for n, visual in sizes]))
    return [positions, *(positions[k] for k in kept)]


def seen(ctx: Context, case: cases.Case) -> dict[str, list[np.ndarray]]:
    """What the oracle is to follow: positions of visual tokens in each stage, and who stands for whom."""
    n = len(case.schedule.cuts)
    return {
        "follow": held(case.pieces, ctx.kept(n)),
        **({"owners": ctx.owners(n)} if case.schedule.merge else {}),
    }


def check_kept(path, case: cases.Case, ctx: Context, tally: dict[str, int]) -> oracle.Result:
    """Kept indices equal the oracle's at each cut, or differ between tokens whose scores all but tie.

    A quantized cache turns the last bit of a number into a step of its code, so there the oracle's own choice may
    hang on rounding: such a cut is counted apart.
    """
    kept, native = ctx.kept(len(case.schedule.cuts)), seen(ctx, case)
    result = decoder(path).prefill(case.pieces, case.schedule, case.kv, **native)
    for i, (cut, got) in enumerate(zip(result.cuts, kept, strict=True)):
        tally["cuts"] = tally.get("cuts", 0) + 1
        check_owners(cut, tally)
        assert np.all(np.diff(got) > 0), f"cut {i}: indices not ascending"
        if np.array_equal(cut.kept, got):
            continue
        margin, word = cut.margin(got), EXCUSES[0]
        # a distance jumps where two scores change places
        unsteady = case.kv != "F16" or case.schedule.distance
        if margin >= NEAR_TIE and unsteady and chosen_by_rounding(path, case, native, cut, i, got):
            margin, word = 0.0, EXCUSES[1]
        assert margin < NEAR_TIE, f"cut {i}: kept {got.tolist()}, oracle {cut.kept.tolist()}, margin {margin:.1e}"
        tally[word] = tally.get(word, 0) + 1
    return result


def chosen_by_rounding(path, case: cases.Case, native: dict, first: oracle.Cut, i: int, got: np.ndarray) -> bool:
    """Whether float's noise moves the scores in question as far as they lie apart."""
    dec = decoder(path)
    try:
        for n in range(AGAIN):
            dec.noise = np.random.default_rng([cases.SEED, case.number, i, n])
            again = dec.prefill(case.pieces, case.schedule, case.kv, **native).cuts[i]
            if first.is_rounding(again, got):
                return True
    finally:
        dec.noise = None
    return False


def check_composed(ctx: Context, case: cases.Case) -> None:
    """After each cut, the owner of a token is a kept one: the owner of its owner so far, and a kept one its own."""
    if not case.schedule.merge:
        return
    n = len(case.schedule.cuts)
    before = np.arange(sum(len(p.embd) for p in case.pieces if isinstance(p, oracle.Image)))
    for kept, owners in zip(ctx.kept(n), ctx.owners(n), strict=True):
        assert np.array_equal(owners, np.where(before < 0, -1, owners[before]))
        assert np.array_equal(np.unique(owners[owners >= 0]), kept) and np.array_equal(owners[kept], kept)
        before = owners


@pytest.mark.parametrize("number", range(N_CASES))
def test_kept_tokens_and_logits(rt, random_gguf, tally, number: int) -> None:
    """Breaks if a score, a quota, an order, a mask, a position or a KV cell of any stage is wrong."""
    case = cases.make(number, SEED)
    path = random_gguf(cases.SHAPES[case.model])
    with Model(rt, path, case.keys) as model, Context(model, n_ctx=512, kv=case.kv) as ctx:
        assert ctx.prefill(native(case.pieces)) == 0, rt.last_error()
        report = ctx.report()
        assert report["mode"] == "pruned-prefill", report
        assert report["cuts"] == list(case.schedule.cuts)
        result = check_kept(path, case, ctx, tally)
        check_composed(ctx, case)
        error = oracle.nmse(ctx.logits(), result.logits)
    tally["cases"] = tally.get("cases", 0) + 1
    worst = f"{case.kv} worst logits NMSE x 1e-9"
    tally[worst] = max(tally.get(worst, 0), round(error * 1e9))
    assert error <= MOST_ERROR[case.kv], f"{case.model} {case.kv} {case.keys}: NMSE {error:.2e}"


def test_near_ties_are_rare(tally) -> None:
    """Breaks if ties excuse more than one cut in fifty, which the gaps between scores do not."""
    if tally.get("cases", 0) < N_CASES:
        pytest.skip("needs the whole of test_kept_tokens_and_logits")
    assert sum(tally.get(word, 0) for word in EXCUSES) <= tally["cuts"] / 50


@pytest.mark.parametrize("model_name", list(cases.SHAPES))
@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
def test_decode_continues(rt, random_gguf, model_name: str, kv: str) -> None:
    """Breaks if a generated token sees a dropped cell, misses a kept one, or gets a pruned position."""
    shape = cases.SHAPES[model_name]
    rng = np.random.default_rng([SEED, 1, shape.n_layer])
    pieces = cases.prompt(rng, shape, 2, 70)
    keys = {"st3.preset": "pvtp", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 1, "st3.score": "text-max-sum"}
    path = random_gguf(shape)
    with Model(rt, path, keys) as model, Context(model, n_ctx=512, kv=kv) as ctx:
        assert ctx.prefill(native(pieces)) == 0
        case = cases.Case(0, model_name, kv, keys, pieces)
        result = decoder(path).prefill(pieces, case.schedule, kv, **seen(ctx, case))
        assert ctx.positions() == (0, result.n_pos - 1)
        for _ in range(12):
            got = ctx.logits()
            assert oracle.nmse(got, result.logits) <= MOST_ERROR[kv]
            token = int(np.argmax(got))
            # greedy: the same token, unless two all but tie
            assert result.logits.max() - result.logits[token] < 0.02 * np.ptp(result.logits)
            assert ctx.decode([token], result.n_pos) == 0
            decoder(path).step(result, token, kv)


def test_pruning_changes_the_answer(rt, random_gguf) -> None:
    """Breaks if parity holds only because nothing is dropped: the full model's logits must be far away."""
    case = cases.make(0, SEED)
    path = random_gguf(cases.SHAPES[case.model])
    full = decoder(path).prefill(case.pieces, None, case.kv)
    pruned = decoder(path).prefill(case.pieces, case.schedule, case.kv)
    assert oracle.nmse(pruned.logits, full.logits) > 1e-2


@pytest.mark.parametrize("score", ["text-mean", "text-max-sum"])
def test_long_text_scores_with_its_last_rows(rt, random_gguf, tally, score: str) -> None:
    """Breaks if more, fewer or other than the last 512 text rows score."""
    shape = cases.SHAPES["mha-32"]
    pieces = cases.prompt(np.random.default_rng([SEED, 3]), shape, 1, 560)
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2, "st3.score": score}
    case = cases.Case(0, "mha-32", "F16", keys, pieces)
    path = random_gguf(shape)
    with Model(rt, path, keys) as model, Context(model, n_ctx=1024) as ctx:
        assert ctx.prefill(native(pieces)) == 0
        assert oracle.nmse(ctx.logits(), check_kept(path, case, ctx, tally).logits) <= MOST_ERROR[case.kv]


def test_a_prompt_of_thousands_of_rows(rt, random_gguf, tally) -> None:
    """Breaks if parts of the feed-forward network go back together in another order, or the graph lacks room."""
    shape = cases.SHAPES["mha-32"]
    rng = np.random.default_rng([SEED, 4])
    pieces = [[1, 5], oracle.Image(rng.standard_normal((47 * 47, shape.n_embd)).astype(np.float32), 47, 47), [7] * 70]
    keys = {"st3.preset": "pvtp", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2}
    case = cases.Case(0, "mha-32", "F16", keys, pieces)
    path = random_gguf(shape)
    with Model(rt, path, keys) as model, Context(model, n_ctx=4096) as ctx:
        assert ctx.prefill(native(pieces)) == 0
        assert ctx.report()["mode"] == "pruned-prefill"
        assert oracle.nmse(ctx.logits(), check_kept(path, case, ctx, tally).logits) <= MOST_ERROR[case.kv]


def test_keeping_everything_is_the_full_model(rt, random_gguf) -> None:
    """Breaks if a cut that drops nothing changes rows, positions or cells."""
    case = cases.make(3, SEED)
    path = random_gguf(cases.SHAPES[case.model])
    got = []
    for keys in ({"st3.preset": "st3", "st3.keep": 1.0}, {"st3.preset": "off"}):
        with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
            assert ctx.prefill(native(case.pieces)) == 0
            report = ctx.report()
            got.append(ctx.logits())
            assert set(report["per_layer"]) == {report["given"]}
    assert oracle.nmse(got[0], got[1]) < 1e-6


def test_second_prompt_starts_afresh(rt, random_gguf) -> None:
    """Breaks if scores, kept tokens or cells of one prompt leak into the next prompt of the same context."""
    one, two = cases.make(0, SEED), cases.make(5, SEED)
    assert one.model == two.model
    path = random_gguf(cases.SHAPES[one.model])
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2}
    with Model(rt, path, keys) as model:
        with Context(model, n_ctx=512) as ctx:
            assert ctx.prefill(native(two.pieces)) == 0
            want, kept = ctx.logits(), ctx.kept(3)
        with Context(model, n_ctx=512) as ctx:
            assert ctx.prefill(native(one.pieces)) == 0
            ctx.clear()
            assert ctx.prefill(native(two.pieces)) == 0
            assert np.array_equal(ctx.logits(), want)
            assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(3), kept, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(rt, random_gguf, threads: int) -> None:
    """Breaks if two threads race in the span-attention op or in the cut."""
    case = cases.make(4, SEED)
    with Model(rt, random_gguf(cases.SHAPES[case.model]), case.keys) as model:
        got = []
        for n in (2, threads):
            with Context(model, n_ctx=512, threads=n) as ctx:
                assert ctx.prefill(native(case.pieces)) == 0
                got.append((ctx.kept(1)[0], ctx.logits()))
    assert np.array_equal(got[0][0], got[1][0])
    assert oracle.nmse(got[0][1], got[1][1]) < 1e-9


def test_random_preset(rt, random_gguf) -> None:
    """Breaks if `random` reads the attention, ignores its seed, or favours a part of the picture."""
    shape = cases.SHAPES["mha-32"]
    path = random_gguf(shape)
    hits = np.zeros(100)
    for seed in range(40):
        keys = {"st3.preset": "random", "st3.seed": seed, "st3.start": 1, "st3.stride": 9, "st3.keep": 0.5}
        runs = []
        with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
            for draw in range(2 if seed < 3 else 1):
                embd = np.random.default_rng([SEED, seed, draw]).standard_normal((100, shape.n_embd))
                ctx.clear()
                assert ctx.prefill([[1], Image(embd, 10, 10), [5, 6, 7]]) == 0
                runs.append(ctx.kept(1)[0])
        assert len(runs[0]) == 50
        assert all(np.array_equal(runs[0], r) for r in runs), "depends on the picture"
        hits[runs[0]] += 1
    # 40 fair draws: each token 20 times, standard deviation 3.2; each quarter of the picture 500 times, 14
    assert hits.min() >= 4 and hits.max() <= 36
    assert np.abs(hits.reshape(4, 25).sum(1) - 500).max() < 80
