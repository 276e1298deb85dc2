"""scripts/bench_schedules.py: what its pairs compare. Nothing is run."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
import bench_schedules  # noqa: E402
from oracle import schedule  # noqa: E402


def test_scoring_is_all_that_its_pair_differs_in():
    # broken if the sides dropped other numbers of tokens, or the one without scoring read attention all the same
    a, b = (
        schedule.resolve(32, **{k.removeprefix("st3."): v for k, v in keys.items()})
        for keys in bench_schedules.pairs(0.3)["scoring"]
    )
    assert a.per_layer([576]) == b.per_layer([576])
    for step in (1, 16, 64, 200):
        assert [a.target(576, n, step) for n in (576, 100)] == [b.target(576, n, step) for n in (576, 100)]
    assert a.random and not a.anneal_terms and not b.random and b.terms and b.anneal_terms


def test_a_pairs_summary():
    # broken by a mean for a median, A / B, or a turn that warms up among the others
    told = bench_schedules.summary(np.array([[50.0, 1, 2, 9], [70, 2, 4, 6]]))
    assert told == {"n": 3, "first_ms": [50, 70], "ms": [2, 4], "ratio": 2, "of_sums": 1}
    other = {**told, "first_ms": [30, 50], "ms": [4, 2], "ratio": 0.5, "of_sums": 4}
    both = bench_schedules.together([told, other])
    assert both == {"first_ms": [40, 60], "ms": [3, 3], "ratio": 1, "of_sums": 2, "rounds": [told, other]}
