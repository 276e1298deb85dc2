"""KL divergence of next-token distributions, against sums in extended precision."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from st3_edge import divergence

LOGITS = st.floats(-60, 60, width=32)


def naive(full: np.ndarray, pruned: np.ndarray) -> list[float]:
    """Row by row, term by term, in long double, by the definition and not by log-softmax."""
    out = []
    for a, b in zip(full.astype(np.longdouble), pruned.astype(np.longdouble), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        out.append(float((p * np.log(p / q)).sum()))
    return out


@given(hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 40)), elements=LOGITS))
def test_kl_is_that_of_the_definition(pair):
    # broken by float32 in the softmax, by KL the wrong way round, or by a mean where a sum belongs
    got = divergence.kl_divergence(*pair)
    assert got.dtype == np.float64 and got.shape == pair.shape[1:2]
    assert (got >= 0).all()
    np.testing.assert_allclose(got, naive(*pair), rtol=1e-9, atol=1e-12)


def test_kl_of_a_known_pair():
    # broken if it were in bits, or symmetric: 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1)
    half, tenth = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.9, 0.1]]).astype(np.float32)
    assert divergence.kl_divergence(half, tenth)[0] == pytest.approx(0.5108256, abs=1e-6)
    assert divergence.kl_divergence(tenth, half)[0] == pytest.approx(0.3680642, abs=1e-6)


@given(hnp.arrays(np.float32, (3, 7), elements=LOGITS), st.floats(-50, 50, width=32))
def test_equal_distributions_are_at_no_distance(logits, shift):
    # broken if the logits' level mattered, or rounding gave a negative number
    assert (divergence.kl_divergence(logits, logits) == 0).all()
    np.testing.assert_allclose(divergence.kl_divergence(logits, logits + np.float32(shift)), 0, atol=1e-4)


def test_large_logits_do_not_overflow_and_impossible_tokens_add_nothing():
    # broken by exp() of what was not brought down first, or by 0 times infinity
    full = np.array([[1e4, -1e4, -np.inf], [5.0, 5.0, -np.inf]], np.float32)
    assert divergence.kl_divergence(full, full).tolist() == [0.0, 0.0]
    ruled_out = np.array([[0.0, -np.inf, 0.0]] * 2, np.float32)
    assert divergence.kl_divergence(full, ruled_out)[1] == np.inf


def test_logits_that_do_not_belong_together_are_refused():
    # broken if one row were broadcast over all
    with pytest.raises(ValueError, match="shapes"):
        divergence.kl_divergence(np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32))


def test_the_likeliest_token_is_compared_row_by_row():
    # broken along the wrong axis
    full, pruned = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 1]]
    assert divergence.same_top(full, pruned).tolist() == [True, False, False]


def test_the_interval_covers_the_mean_and_is_the_same_each_time():
    # broken by another seed each call, or percentiles of the values in place of those of their means
    values = np.random.default_rng(3).exponential(size=200).tolist()
    low, high = divergence.bootstrap_interval(values)
    assert (low, high) == divergence.bootstrap_interval(values)
    normal = 1.96 * np.std(values) / 200**0.5
    assert low == pytest.approx(np.mean(values) - normal, abs=0.3 * normal)
    assert high == pytest.approx(np.mean(values) + normal, abs=0.3 * normal)
    assert divergence.bootstrap_interval([0.25]) == (0.25, 0.25)
