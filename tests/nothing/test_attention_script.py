"""scripts/attention.py: its figures of a map whose figures are plain to see. Nothing is run."""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import attention


def test_figures_of_a_known_map():
    # broken if the fifth were of the lowest, if ties went to the later, or if the middle were off by one
    score, patches = np.zeros(10), np.zeros(10, bool)
    score[[3, 7]], patches[[3, 4]] = (0.2, 0.3), True
    assert attention.found(score, patches) == 50
    assert attention.found(np.ones(10), np.arange(10) < 2) == 100
    assert attention.half(np.array([1, 5, 1, 1])) == 1 and attention.half(np.ones(6)) == 3


def test_scores_reduce_heads_and_rows():
    p = np.array([[[0.1, 0.2], [0.3, 0.0]], [[0.5, 0.2], [0.1, 0.4]]])
    got = attention.scores(p)
    want = {"text-mean": [0.25, 0.2], "text-max": [0.5, 0.4], "last-mean": [0.2, 0.2], "last-max": [0.3, 0.4]}
    assert {k: v.round(6).tolist() for k, v in got.items()} == want


def test_the_page_has_a_line_for_each_layer():
    row = dict.fromkeys(("visual", "visual last", "first", "fixed", "half", *attention.SCORES), 0.5)
    about = {"title": "t", "questions": 1, "first": 0, "command": "c", "commit": "d", "processor": "p"}
    page = attention.page({**about, "layers": [row] * 3}).splitlines()
    table = [line for line in page if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
