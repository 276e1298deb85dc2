"""scripts/plots.py: what it draws is what the results hold. Skipped without matplotlib (the extra `plot`)."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("**/*.json"))


@pytest.fixture(scope="module")
def plots():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("plots")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def bench() -> dict:
    row = {"stock": [9.0, 8.0, 10.0], "st3": [4.0, 4.0, 5.0], "ideal": 2.5, "share": 0.88, "gain_share": None}
    schedule = {"preset": "st3", "budget": 0.5005}
    return {
        "machine": {"processor": "P"},
        "setup": {"shape": "s", "type": "Q4_0", "visual": 6, "text": 4, "generate": 2, "schedule": schedule},
        "pairs": [{}, {}, {}],
        "summary": {
            "prefill_ms": {**row, "ratio": 2.2, "ratio_pairs": [2.0, 2.2, 2.4]},
            "decode_16_tps": {**row, "ratio": 0.9, "ratio_pairs": [0.8, 0.9, 1.0]},
        },
    }


def test_bars_are_the_ratios(plots):
    # broken if a bar showed another metric's ratio, or a range its own inverse
    (ax,) = plots.ratios(bench()).axes
    assert [bar.get_width() for bar in ax.patches] == [2.2, 0.9]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["prefill", "decode, 16 tokens"]
    ends = [line.get_segments()[0][:, 0].tolist() for line in ax.collections]
    assert [2.0, 2.4] in ends and [0.8, 1.0] in ends and ends.count([2.5, 2.5]) == 2
    assert [text.get_text().strip() for text in ax.texts] == ["2.20, 88% of 2.50", "0.90, 88% of 2.50"]


def test_shapes_stand_in_the_order_given_with_their_own_ratios(plots):
    # broken if a shape's bars were another's
    results = []
    for i in (1, 2):
        result = bench()
        row = result["summary"]["prefill_ms"]
        result["setup"]["shape"] = f"s{i}"
        metrics = ("prefill_ms", "first_token_ms", "decode_64_tps")
        result["summary"] = {name: {**row, "ratio": i + j / 10} for j, name in enumerate(metrics)}
        results.append(result)
    (ax,) = plots.shapes(results).axes
    bars = sorted(ax.patches, key=lambda bar: bar.get_y())
    assert [bar.get_width() for bar in bars] == [1.0, 1.1, 1.2, 2.0, 2.1, 2.2]
    assert [label.get_text().split()[0] for label in ax.get_yticklabels()] == ["s1", "s2"]
    assert ax.get_title() == "Random weights; preset st3, budget 0.50; P"


def test_points_are_the_shares_right_and_bars_the_intervals(plots):
    # broken if a method's points were another's, or an interval stood on its head
    def row(name, facts, budget, span, **keys):
        keys = {f"st3.{k}": v for k, v in keys.items()}
        asked = {"facts": 100, "count": 0, "captions": 0}
        row = {"style": "all", "name": name, "keys": keys, "facts": facts, "asked": asked}
        return row | {"schedule": {"budget": budget}} | ({"facts - off": span} if span else {})

    rows = [
        row("off", 90.0, 1, None),
        row("st3 @ 0.5", 85.0, 0.5, [-5.0, -8.0, -2.0], preset="st3"),
        row("st3 @ 0.2", 70.0, 0.2, [-20.0, -25.0, -15.0], preset="st3"),
        row("random @ 0.5", 60.0, 0.5, [-30.0, -34.0, -27.0], preset="random"),
        row("random, merging @ 0.5", 80.0, 0.5, [-10.0, -14.0, -7.0], preset="random", merge=True),
        {**row("st3 @ 0.5", 1.0, 0.5, [-89.0, -89.0, -89.0], preset="st3"), "style": "gray"},
    ]
    (ax,) = plots.budgets({"rows": rows}).axes
    st3, random, merging = ax.containers
    assert [c.get_label() for c in ax.containers] == ["st3", "random", "random, merging"]
    assert merging.lines[0].get_color() == random.lines[0].get_color() != st3.lines[0].get_color()
    assert st3.lines[0].get_ydata().tolist() == [70.0, 85.0] and random.lines[0].get_ydata().tolist() == [60.0]
    np.testing.assert_allclose(st3.lines[0].get_xdata(), [0.2, 0.5], atol=0.01)
    (bars,) = st3.lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[65.0, 75.0], [82.0, 88.0]]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_results_that_are_there_can_be_drawn(plots, path, tmp_path):
    # broken if a result's file changed its form and nobody drew it again
    result = json.loads(path.read_text())
    draw = plots.drawing(result)
    if draw is None:
        assert path.stem not in ("quality", "anneal", "kv-memory-7b")
        return
    figure = draw(result)
    figure.savefig(tmp_path / "plot.svg")
    plots.plt.close(figure)


def test_the_map_of_the_schedule_has_every_layer_and_token(plots):
    # broken if layers were drawn upside down, or a stage's number stood in another one's rows
    fig = plots.schedule_map(n_layer=8, visual=100, tokens=20)
    held = np.asarray(fig.axes[0].images[0].get_array())
    assert held.shape == (8, 21) and held[0, 0] == 100
    assert (np.diff(held, axis=0) <= 0).all() and (np.diff(held, axis=1) <= 0).all()
    for text in fig.axes[0].texts:
        x, y = text.get_position()
        assert held[int(y), 0 if x < 10 else 20] == int(text.get_text())
