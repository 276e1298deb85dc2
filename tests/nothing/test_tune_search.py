"""The search for a schedule, on made-up models: which candidates it asks for, and what it makes of the answers."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_edge.commands.tune import search
from st3_edge.commands.tune.search import STEPS, Candidate, Shape


@dataclass(frozen=True)
class Fake:
    candidate: Candidate
    cost: float
    kl: float
    complete: bool = True


class Model:
    """kl[shape][step]; cost: the budget, moved by up to `skew` of a step. Asked with a limit, it may give up early."""

    def __init__(self, kl, skew=None, gives_up=False):
        self.kl, self.skew, self.gives_up = kl, skew or {}, gives_up
        self.results: list[Fake] = []

    def __call__(self, candidate: Candidate, limit: float | None) -> Fake:
        shape, step = Shape(*candidate[:2]), round(candidate.budget * STEPS)
        assert candidate.budget == pytest.approx(step / STEPS, abs=1e-12)
        kl = self.kl[shape][step]
        complete = limit is None or kl <= limit or not self.gives_up
        result = Fake(candidate, candidate.budget + self.skew.get(shape, 0.0), kl, complete)
        self.results.append(result)
        return result


@st.composite
def spaces(draw):
    """Layers, some shapes, and what is kept in any case."""
    n_layer = draw(st.integers(2, 48))
    layers = st.lists(st.integers(1, n_layer - 1), min_size=1, max_size=4)
    return n_layer, search.shapes(draw(layers), draw(layers), n_layer), draw(st.sampled_from([0.0, 0.0, 0.1, 0.7]))


def tables(draw, shapes, falling):
    """KL of each shape at each step, many of them equal; 0 where nothing is dropped."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    kl = np.round(rng.random((len(shapes), STEPS)) ** rng.integers(1, 4), 2)
    if falling:
        kl = -np.sort(-kl)
    return {shape: [*row, 0.0] for shape, row in zip(shapes, kl.tolist(), strict=True)}


@given(spaces(), st.floats(0, 1), st.data())
def test_the_result_is_within_the_limit_and_none_that_was_measured_is_cheaper(space, limit, data):
    # broken if a candidate over the limit, or one that was given up early, could win; whatever KL does over the budgets
    n_layer, shapes, min_share = space
    skew = {s: data.draw(st.floats(-0.5 / STEPS, 0.5 / STEPS)) for s in shapes}
    model = Model(tables(data.draw, shapes, falling=False), skew, gives_up=True)
    search.search(shapes, n_layer, limit, model, min_share)
    asked = [r.candidate for r in model.results]
    assert len(set(asked)) == len(asked)
    for c in asked:
        assert Shape(*c[:2]) in shapes
        assert (c.start + (n_layer - c.start) * min_share) / n_layer < c.budget < 1

    fit = [r for r in model.results if r.complete and r.kl <= limit]
    best = search.best(model.results, limit)
    assert (best is None) == (not fit)
    if best:
        assert best in fit and all((best.cost, best.kl) <= (r.cost, r.kl) for r in fit)


@given(spaces(), st.floats(0, 1), st.data())
def test_where_kl_falls_with_the_budget_the_cheapest_of_all_is_found(space, limit, data):
    # broken by a bisection that is off by one, or a shape that is passed over
    n_layer, shapes, min_share = space
    model = Model(tables(data.draw, shapes, falling=True), gives_up=data.draw(st.booleans()))
    search.search(shapes, n_layer, limit, model, min_share)
    held = [
        step
        for shape in shapes
        for step in range(search.least_step(shape, n_layer, min_share), STEPS)
        if model.kl[shape][step] <= limit
    ]
    best = search.best(model.results, limit)
    assert (round(best.candidate.budget * STEPS) if best else None) == min(held, default=None)


@given(spaces(), st.floats(0, 1), st.data())
def test_a_shape_that_is_no_better_costs_one_measurement(space, limit, data):
    # broken if each shape were bisected anew: the ladder, four steps between two rungs, and one for each other shape
    n_layer, shapes, min_share = space
    (first, *_), kl = shapes, tables(data.draw, shapes[:1], falling=True)
    model = Model(dict.fromkeys(shapes, kl[first]))
    search.search(shapes, n_layer, limit, model, min_share)
    most = 4 + 4 + len(shapes) - 1
    if all(s.start >= first.start for s in shapes):  # else a smaller budget is within reach of another shape
        assert len(model.results) <= most


@given(st.lists(st.builds(Fake, st.just(None), st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=20))
def test_the_frontier_is_what_nothing_beats(results):
    # broken if a beaten one stayed, or one of equal cost and higher KL
    complete = [r for r in results if r.complete]
    frontier = search.frontier(results)
    for r in complete:
        assert any(f.cost <= r.cost and f.kl <= r.kl for f in frontier)
    for f in frontier:
        assert f in complete
        assert not any((r.cost <= f.cost and r.kl < f.kl) or (r.cost < f.cost and r.kl <= f.kl) for r in complete)
    assert frontier == sorted(frontier, key=lambda f: f.cost)


@pytest.mark.parametrize("n_layer", [2, 5, 16, 22, 32, 40, 80])
def test_the_shapes_fit_the_model_and_the_presets_own_comes_first(n_layer):
    # broken if a default could not be loaded: a cut needs a layer after it
    shapes = search.shapes(search.default_starts(n_layer), search.default_strides(n_layer), n_layer)
    assert shapes[0] == (1, n_layer)
    assert len(set(shapes)) == len(shapes)
    assert all(1 <= s.start < n_layer and 1 <= s.stride <= n_layer for s in shapes)
    assert any(s.stride == n_layer for s in shapes), "one cut alone"
    assert search.shapes([n_layer], [1], n_layer) == []
    assert search.shapes([1], [n_layer, 10**9], n_layer) == [(1, n_layer)]
