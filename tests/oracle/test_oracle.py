"""The oracle against what DESIGN.md says in numbers, and against itself by another way."""

from __future__ import annotations

import numpy as np
import pytest

from oracle import attention, rounding, schedule


def test_budget_of_the_design() -> None:
    """Breaks if cuts or shares are not the method's: 32 layers, start 4, stride 4, keep 0.6 give 0.307."""
    cuts = schedule.cut_layers(32, 4, 4)
    assert cuts == (3, 7, 11, 15, 19, 23, 27)
    assert schedule.real_budget(32, cuts, 0.6) == pytest.approx(0.307, abs=5e-4)
    assert schedule.resolve(32, keep=0.6).counts(576) == [346, 208, 125, 75, 45, 27, 16]


def test_solved_keep_gives_the_budget() -> None:
    """Breaks if the solved keep misses the budget, or an impossible one is solved."""
    for n_layer, budget in ((32, 0.3), (16, 0.5), (12, 0.9), (8, 1.0)):
        s = schedule.resolve(n_layer, budget=budget)
        assert schedule.real_budget(n_layer, s.cuts, s.keep) == pytest.approx(budget, abs=1e-9)
    with pytest.raises(ValueError, match="budget"):
        schedule.resolve(32, budget=0.1)


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
