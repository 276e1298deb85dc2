"""The oracle against what docs/method.md says in numbers, and against itself by another way."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from oracle import attention, llama, rounding, schedule
from st3_edge.commands.bench import random_model


def test_budget_of_the_design() -> None:
    """Breaks if cuts or shares are not the method's: 32 layers, start 4, stride 4, keep 0.6 give 0.307."""
    cuts = schedule.cut_layers(32, 4, 4)
    assert cuts == (3, 7, 11, 15, 19, 23, 27)
    assert schedule.mean_share(32, cuts, 0.6) == pytest.approx(0.307, abs=5e-4)
    assert schedule.resolve(32, keep=0.6, start=4, stride=4).counts(576) == [346, 208, 125, 75, 45, 27, 16]
    assert schedule.resolve(32, budget=0.2).per_layer([576]) == [576] + 31 * [100]  # 1 + 31 * 0.174 of 32


def test_solved_keep_gives_the_budget() -> None:
    """Breaks if the solved keep misses the budget, or an impossible one is solved."""
    for n_layer, budget in ((32, 0.3), (16, 0.5), (12, 0.9), (8, 1.0)):
        s = schedule.resolve(n_layer, budget=budget)
        assert schedule.mean_share(n_layer, s.cuts, s.keep, s.min_share) == pytest.approx(budget, abs=1e-9)
        assert s.budget([10**6]) == pytest.approx(budget, abs=1e-5)
    with pytest.raises(ValueError, match="budget"):
        schedule.resolve(32, budget=0.1, start=4)


def test_no_layer_is_starved() -> None:
    """Breaks if a layer is left with less than half of what the layers after the first cut have on average."""
    for n_layer, budget in ((32, 0.3), (16, 0.3), (40, 0.1), (22, 0.05), (32, 0.5)):
        s = schedule.resolve(n_layer, budget=budget, start=max(1, int(n_layer * budget / 2)), stride=n_layer // 8)
        after = s.per_layer([576])[s.cuts[0] + 1 :]
        assert min(after) >= 0.5 * sum(after) / len(after) - 2
        assert s.target(576, min(after), 10**6) == min(after)
        assert schedule.resolve(n_layer, "paper", budget=budget).cuts[0] + 1 <= max(1, n_layer * budget / 2)
    assert schedule.resolve(40, "paper", budget=0.1).cuts[0] + 1 == 2  # half of the budget
    assert schedule.resolve(16, budget=0.1, stride=2).min_share == pytest.approx(0.03)  # of a mean of 0.04
    assert schedule.resolve(16, budget=0.07, stride=2).min_share == pytest.approx(0.75 * 0.12 / 15)
    for keys in ({"keep": 0.6}, {"preset": "fastv", "budget": 0.4}):
        assert schedule.resolve(32, stride=4, **keys).min_share == 0.0
    assert schedule.resolve(32).min_share == 0.0, "one cut: annealing goes down to its floor"


def test_spread_order() -> None:
    """Breaks if a patch is missing, or another one is farther from those chosen before."""
    for nx, ny in ((1, 1), (5, 1), (4, 4), (7, 5), (24, 24)):
        order = schedule.spread_order(nx, ny)
        assert sorted(order) == list(range(nx * ny))
        at = np.array([(i % nx, i // nx) for i in order])
        for n in range(1, min(len(order), 60)):
            gap = ((at[:, None] - at[None, :n]) ** 2).sum(-1).min(1)
            best = gap[n:].max()
            assert gap[n] == best
            assert order[n] == min(i for i, g in zip(order[n:], gap[n:], strict=True) if g == best)
    assert schedule.spread_order(5, 5)[0] == 12
    assert schedule.spread_order(4, 4)[0] == 5


def test_ties_go_to_the_lower_index() -> None:
    """Breaks if equal ranks are not taken in order."""
    assert schedule.best(np.array([1.0, 2, 2, 1, 2]), 2).tolist() == [1, 2]


def test_probabilities() -> None:
    """Breaks if a softmax does not sum to one, or a row that sees nothing is not all zeros."""
    rng = np.random.default_rng(3)
    mask = np.where(rng.random((5, 9)) < 0.3, -np.inf, 0.0)
    mask[1] = -np.inf
    p = attention.probabilities(rng.standard_normal((4, 5, 8)), rng.standard_normal((2, 9, 8)), mask, 0.3)
    assert np.allclose(p.sum(-1), [[1, 0, 1, 1, 1]] * 4)
    assert not p[:, mask == -np.inf].any()


def test_rotation_keeps_products() -> None:
    """Breaks if the rotation before a quantized cache is not orthonormal."""
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 3, 128))
    for size in (0, 64, 128):
        assert np.allclose(rounding.rotate(q, size) @ rounding.rotate(k, size).T, q @ k.T)
    assert rounding.rotation_size(192, True) == 64
    assert rounding.rotation_size(128, True) == 128
    assert rounding.rotation_size(80, True) == 0


def test_annealing_curves() -> None:
    """Breaks if a curve does not fall from 1 to its floor over its tokens, or has another shape."""
    want = {
        "none": [1, 1, 1, 1, 1, 1],
        "linear": [1, 0.8, 0.6, 0.4, 0.2, 0.2],
        "cosine": [1, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2 + 0.4 * (1 - 2**-0.5), 0.2, 0.2],
        "exponential": [1, 0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2, 0.2],
    }
    for curve, shares in want.items():
        s = schedule.resolve(8, anneal=curve, anneal_tokens=4, anneal_floor=0.2)
        assert [s.share(t) for t in (0, 1, 2, 3, 4, 1000)] == pytest.approx(shares)


def test_annealing_targets() -> None:
    """Breaks if a target rounds otherwise, undercuts min_keep, or cells are freed off the interval or too late."""
    s = schedule.resolve(8, anneal="linear", anneal_tokens=10, anneal_floor=0.0, min_keep=3, min_share=0.0)
    assert [s.target(15, 15, t) for t in range(11)] == [15, 14, 12, 11, 9, 8, 6, 5, 3, 3, 3]
    assert s.target(2, 2, 10) == 2
    s = schedule.resolve(8, anneal="linear", anneal_tokens=10, anneal_floor=0.0, anneal_interval=4, min_share=0.0)
    assert [s.target_before(100, 100, t) for t in range(1, 11)] == [60, None, None, None, 20, None, None, None, 1, None]


def test_annealing_defaults() -> None:
    """Breaks if a preset anneals that should not, a key cannot say otherwise, or a score is not inherited."""
    for preset in schedule.PRESETS[1:]:
        s = schedule.resolve(16, preset)
        assert s.anneal == ("linear" if preset in ("st3", "paper") else "none")
        assert s.merge == (preset in ("st3", "pvtp")) and schedule.resolve(16, preset, merge=True).merge
        assert (s.anneal_tokens, s.anneal_floor, s.anneal_interval) == (64, 0.5, 1)
        assert s.anneal_random == (preset == "random")
        assert schedule.resolve(16, preset, anneal="cosine").anneal == "cosine"
    assert schedule.resolve(16, score="text-max-sum").anneal_terms == schedule.Term.parse("text-max-sum")
    assert schedule.resolve(16, "random", anneal_score="last-max").anneal_terms == schedule.Term.parse("last-max")
    alone = schedule.resolve(16, keep=1.0, start=16)
    assert alone.cuts == () and alone.counts(9) == [] and alone.per_layer([9]) == [9] * 16


@pytest.mark.parametrize(
    "keys",
    [
        {"anneal": "sudden"},
        {"anneal": ""},
        {"anneal_tokens": 0},
        {"anneal_floor": -0.1},
        {"anneal_floor": 1.1},
        {"anneal_floor": float("nan")},
        {"anneal": "exponential", "anneal_floor": 0.0},
        {"anneal_interval": 0},
        {"anneal_score": "first-mean"},
        {"anneal_score": ""},
        {"anneal_score": "random+last-mean"},
        {"start": 16, "budget": 0.5},
        {"start": 17, "keep": 1.0},
    ],
)
def test_annealing_errors(keys: dict) -> None:
    """Breaks if a schedule that makes no sense is resolved."""
    with pytest.raises(ValueError, match=r"."):
        schedule.resolve(16, **keys)


def test_random_order() -> None:
    """Breaks if the generator is not the standard's mt19937, or if images and seeds share their order."""
    draw = np.random.MT19937()
    draw._legacy_seeding(5489)
    numbers = draw.random_raw(10000)
    assert (int(numbers[0]), int(numbers[-1])) == (3499211612, 4123659995)  # the second one is in the C++ standard
    got = schedule.random_order(7, 0, 50)
    assert sorted(np.rint(got * 50)) == list(range(50))
    assert not np.array_equal(got, schedule.random_order(8, 0, 50))
    assert not np.array_equal(got, schedule.random_order(7, 1, 50))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> llama.Decoder:
    path = tmp_path_factory.mktemp("oracle") / "model.gguf"
    random_model.write_text(path, random_model.Shape(5, 64, 4, 2, 96, n_vocab=272), "F32", 11)
    return llama.Decoder(path)


def prompt() -> list[llama.Piece]:
    rng = np.random.default_rng(12)
    a, b = (llama.Image(rng.standard_normal((n * n, 64)).astype(np.float32), n, n) for n in (4, 3))
    return [[1, 5], a, [6], b, [7, 8, 9]]


def test_steps_are_one_long_prompt(decoder: llama.Decoder) -> None:
    """Breaks if a cache, a position or a mask of the oracle's own steps or batches is off."""
    pieces, more = prompt(), [20, 21, 22, 23, 24]
    want = decoder.prefill([*pieces, more]).logits
    stepped = decoder.prefill(pieces)
    for token in more:
        decoder.step(stepped, token)
    asked = decoder.prefill(pieces)
    decoder.text(asked, more)
    parts = decoder.begin()
    for piece in [*pieces, more]:
        if isinstance(piece, llama.Image):
            decoder.picture(parts, piece)
        else:
            decoder.text(parts, piece)
    for got in (stepped, asked, parts):
        assert llama.nmse(got.logits, want) < 1e-9  # keys and values are rounded to F32
    assert [(im.first, im.n, im.p0) for im in parts.images] == [(0, 16, 2), (16, 9, 19)]


@pytest.mark.parametrize("merge", [False, True])
def test_removed_tokens_are_unseen_from_then_on(decoder: llama.Decoder, merge: bool) -> None:
    """Breaks if a removal hides a token from other layers, too late, too early, or hides another one; or if what is
    left then does not count for those that left."""
    pieces, tokens = prompt(), [20, 21, 22, 23, 24, 25]
    anneal = {"anneal": "linear", "anneal_tokens": 6, "anneal_floor": 0.1}
    s = schedule.resolve(5, start=2, stride=2, keep=1.0, merge=merge, **anneal)
    result = decoder.prefill(pieces, s)
    held = [copy.deepcopy(result.layers)]
    for token in tokens:
        decoder.step(result, token)
        held.append(copy.deepcopy(result.layers))
    assert [len(h[0].visual) - len(tokens[:t]) - 6 for t, h in enumerate(held)] == [25, 22, 17, 14, 10, 6, 3]
    counts = [[h[0].weight[h[0].visual // 16 == image].sum() for image in (0, 1)] for h in held]
    assert counts == [[16, 9]] * 7 if merge else counts[-1] == [2, 1]
    # the same by one pass over all rows, in which the row of token t does not see what is gone by then
    x = decoder.embed([*pieces, tokens])
    n, names = len(x), np.concatenate([[-1] * 2, range(16), [-1], range(16, 25), [-1] * 9])
    for i in range(5):
        mask = np.where(np.tril(np.ones((n, n))) > 0, 0.0, -np.inf)
        for t in range(len(tokens)):
            layer, row = held[t + 1][i], n - len(tokens) + t
            there = layer.visual >= 0
            mask[row, names >= 0] = -np.inf
            mask[row, layer.pos[there]] = np.log(layer.weight[there]).astype(np.float16)
        y = decoder._norm(x, f"blk.{i}.attn_norm.weight")
        q, k = (decoder._heads(y, f"blk.{i}.attn_{c}.weight", np.arange(n)) for c in "qk")
        p = attention.probabilities(q, k, mask, decoder.head**-0.5)
        v = np.repeat(decoder._heads(y, f"blk.{i}.attn_v.weight", None), 2, 0)
        x = x + (p @ v).swapaxes(0, 1).reshape(n, -1) @ decoder.w(f"blk.{i}.attn_output.weight").T
        y = decoder._norm(x, f"blk.{i}.ffn_norm.weight")
        gate = y @ decoder.w(f"blk.{i}.ffn_gate.weight").T
        up = y @ decoder.w(f"blk.{i}.ffn_up.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ decoder.w(f"blk.{i}.ffn_down.weight").T
    assert llama.nmse(result.logits, decoder._logits(x[-1])) < 1e-9


def test_attention_is_what_scores_are_taken_from(decoder: llama.Decoder) -> None:
    """Breaks if a layer's probabilities were of other rows, or of another layer."""
    pieces = prompt()
    s = schedule.resolve(5, start=2, stride=2, keep=0.5, score="text-mean", rank="score")
    cut = decoder.prefill(pieces, s).cuts[0]
    seen = list(decoder.attention(pieces))
    assert [p.shape for p in seen] == [(4, 3, 31)] * 5
    assert all(np.allclose(p.sum(-1), 1) and not p[:, 0, -2:].any() for p in seen)
    visual = [*range(2, 18), *range(19, 28)]
    assert np.allclose(seen[1][:, :, visual].mean((0, 1)), cut.score, rtol=1e-6)


def test_records_accumulate(decoder: llama.Decoder) -> None:
    """Breaks if the prefill, a step or a question is not one record each, or scores are not their mean."""
    s = schedule.resolve(5, start=2, stride=2, keep=0.5, anneal="cosine", score="last-mean", anneal_tokens=30)
    result = decoder.prefill(prompt(), s)
    assert [im.records for im in result.images] == [1, 1]
    for im in result.images:
        for stage in range(3):
            inside = np.isin(im.ids, result.held(stage))
            assert (im.total[stage][inside] > 0).all() and im.total[stage][inside].sum() < 1
    decoder.step(result, 20)
    decoder.text(result, [21, 22])
    assert [(im.records, im.t) for im in result.images] == [(3, 1), (3, 1)]
    decoder.prefill([prompt()[1], [30]], result=result)
    assert [(im.records, im.t, im.number) for im in result.images] == [(4, 1, 0), (4, 1, 1), (1, 0, 2)]
    before = [im.total[1].copy() for im in result.images]
    decoder.step(result, 23)
    for im, total in zip(result.images, before, strict=True):
        inside = np.isin(im.ids, result.held(1))
        assert ((im.total[1] > total) == inside).all()
    cut = result.steps[1]
    assert np.array_equal(
        cut.score,
        np.concatenate(
            [b[np.isin(im.ids, cut.left)] / n for im, b, n in zip(result.images, before, (4, 4, 1), strict=True)]
        ),
    )


def test_evict_only_sees_what_the_cuts_of_a_full_model_would(decoder: llama.Decoder) -> None:
    """Breaks if images wait after their question, a cut reads another layer, or cells of other stages leave."""
    s = schedule.resolve(5, start=1, stride=2, keep=0.5, score="last-mean-sum", rank="score", anneal="none")
    _, a, _, b, question = prompt()
    result = decoder.begin(s)
    decoder.picture(result, a)
    decoder.picture(result, b)
    assert [(im.n, im.waits) for im in result.images] == [(25, True)], "what directly goes on is the same image"
    decoder.text(result, question)
    whole = [llama.Image(np.concatenate([a.embd, b.embd]), 5, 5), question]
    assert llama.nmse(result.logits, decoder.prefill(whole).logits) < 1e-9, "the question itself sees everything"
    assert [len(result.held(s)) for s in range(3)] == result.images[0].n0 == [25, 13, 7]
    pruned = decoder.prefill(whole, s)
    assert np.array_equal(result.cuts[0].kept, pruned.cuts[0].kept), "no row was dropped before the first cut"
    assert set(result.held(2)) < set(result.held(1))
    decoder.text(result, [30])
    assert result.images[0].n0 == [25, 13, 7] and result.cuts == []


def test_a_weight_counts_as_equal_keys(decoder: llama.Decoder) -> None:
    """Breaks if a token of weight 3 gets other attention than three tokens with the same key together."""
    rng = np.random.default_rng(8)
    q, k = (
        rng.standard_normal((decoder.n_head, 1, decoder.head)),
        rng.standard_normal((decoder.n_head_kv, 5, decoder.head)),
    )
    at = np.arange(5)
    once = llama.Layer(k, k, at, at, np.array([1, 3, 1, 1, 1.0]))
    cells = [0, 1, 1, 1, 2, 3, 4]
    thrice = llama.Layer(k[:, cells], k[:, cells], at[cells], at[cells], np.ones(7))
    p = decoder._attention(q, thrice)
    want = np.stack([p[..., [j for j, c in enumerate(cells) if c == i]].sum(-1) for i in range(5)], -1)
    assert np.abs(decoder._attention(q, once) - want).max() < 1e-3  # the mask is of type F16


def test_distance_spares_the_best_of_tokens_that_are_alike() -> None:
    """Breaks if the higher of two alike is the one that loses, or one that is like none loses."""
    toward = np.array([[1, 0], [0, 1], [0.8, 0.6], [-1, 0.0]])
    seen = [llama.Seen(0, 4, 2, 2, 0, 0)]
    got = llama.by_distance(np.array([4.0, 2.0, 3.0, 1.0]), np.arange(4), seen, np.arange(4), toward)
    assert np.allclose(got, [4, 2 * 0.4, 3 * 0.2, 1])
