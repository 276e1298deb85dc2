"""scripts/quality.py: what its grids compare, and what its tables make of answers. Nothing is run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
import quality  # noqa: E402
from oracle import schedule  # noqa: E402

N_LAYER = 16


def resolve(config) -> schedule.Schedule:
    return schedule.resolve(N_LAYER, **{k.removeprefix("st3."): v for k, v in config.keys})


def configs(grid):
    return quality.GRIDS[grid].configs(quality.GRIDS[grid].budgets, N_LAYER)


@pytest.mark.parametrize("grid", ["methods", "scores", "anneal"])
def test_what_is_compared_is_in_the_grid(grid):
    # broken by a name that nothing has: its differences would silently be left out
    names = [c.name for c in configs(grid)]
    assert names[0] == "off" and len(set(names)) == len(names)
    assert {other for c in configs(grid) for other in c.against.values()} <= set(names)
    files = {quality.file_of(Path("work"), c) for c in configs(grid)}
    assert len(files) == len(names), "two configurations would share their answers"


def test_methods_are_compared_at_the_same_cost():
    # broken if a preset did not follow its budget; `vtw` drops all, so whole layers are as near as it comes
    for c in configs("methods")[1:]:
        asked = float(c.name.partition(" @ ")[2])
        tolerance = 0.5 / N_LAYER + 1e-9 if c.name.startswith("vtw") else 0.001
        assert resolve(c).budget([576]) == pytest.approx(asked, abs=tolerance), c.name


def test_scores_are_compared_at_the_same_counts():
    # broken if a score came with a schedule of its own
    for b in ("0.5", "0.4", "0.3"):
        counts = {c.name: resolve(c).per_layer([576]) for c in configs("scores") if c.name.endswith(f" @ {b}")}
        free = counts.pop(f"text-max c0 min_share 0 @ {b}")
        assert len(counts) == 9 and len({tuple(c) for c in counts.values()}) == 1
        assert free[-1] < counts[f"random @ {b}"][-1]


def test_grids_share_the_default():
    # broken if the table of scores had another default than the table of methods
    of = {c.name: quality.file_of(Path(), c) for grid in ("methods", "scores") for c in configs(grid)}
    assert of["pvtp @ 0.3"] == of["text-max c0 @ 0.3"] and of["off"].name == "off.jsonl"


def test_the_interval_of_a_known_difference():
    # broken if scenes were not weighed by what was asked of them, or the two were drawn apart
    print("seed 3")
    rng = np.random.default_rng(3)
    b = np.stack([rng.integers(0, 2, 400), np.ones(400)], 1).astype(float)
    a = b.copy()
    a[:40, 0] -= 1  # paired: 10 points less in each draw but for which scenes are drawn
    mean, low, high = quality.interval(a, b, rng)
    half = 1.96 * 100 * np.sqrt(0.1 * 0.9 / 400)
    assert mean == pytest.approx(-10) and [low, high] == pytest.approx([-10 - half, -10 + half], abs=0.5)
    weighed = quality.interval(np.array([[3.0, 3], [0, 1], [0, 0]]), np.array([[0.0, 3], [0, 1], [0, 0]]), rng)
    assert weighed == [75, 0, 100]  # of scenes that are asked: none, one or both of the first
    ratios = quality.interval(np.array([[2.0, 4]] * 9), np.array([[2.0, 8]] * 9), rng)
    assert ratios == [25, 25, 25]  # each by what is asked of it


def answers(n: int, wrong: int, nats: float) -> dict[int, dict]:
    """n scenes with a fact each, the first few wrong; a caption and KL in the first alone."""
    rows: dict[int, dict] = {i: {"scene": i, "facts": [["color", i >= wrong]]} for i in range(n)}
    rows[0] |= {"objects": [1, 2, 4], "tokens": 50, "held": 0.5, "second": [1, 1], "kl facts": [nats, 4]}
    rows[0]["schedule"] = {"budget": 0.5}
    return rows


def test_a_row_tells_of_the_scenes_that_all_have():
    # broken if a configuration that got further were judged by scenes that the others lack
    configs = [quality.config("off"), quality.config("st3 @ 0.5", {"off": "off"}, preset="st3", budget=0.5)]
    done = {"off": answers(10, 1, 0.0), "st3 @ 0.5": answers(8, 2, 2.0)}
    (off, st3), n = quality.table(configs, done)
    assert n == 8 and off["asked"]["facts"] == 8 and off["facts"] == 87.5 and st3["facts"] == 75
    assert st3["facts - off"][0] == -12.5 and st3["color"] == 75 and st3["captions"] == 33.33
    assert st3["found"] == 25 and st3["named"] == 50 and st3["asked"]["found"] == 4
    assert st3["kl facts"] == 0.5 and st3["asked"]["kl facts"] == 4 and st3["held"] == 50
    about = {"scenes": n, "style": "known", "grid": "methods", "command": "c", "commit": "d", "processor": "p"}
    page = quality.markdown([off, st3], {**about, "smallest": quality.smallest([off, st3])})
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert [len(t) for t in tables] == [4, 3]
    assert all(len({line.count("|") for line in t}) == 1 for t in tables)
    assert "**none of these** by the differences" in page


def test_the_smallest_budget_is_one_from_which_on_all_hold():
    # broken by a lucky small budget, or one whose interval alone fails
    def row(budget, facts, captions):
        return {
            "name": f"st3 @ {budget}",
            "keys": {"st3.budget": budget},
            "facts - off": facts,
            "captions - off": captions,
        }

    good, wide, bad = [-0.5, -1.5, 0.5], [-0.9, -2.5, 0.5], [-1.5, -1.9, -1.0]
    rows = [row(0.75, good, good), row(0.5, good, wide), row(0.4, good, bad), row(0.3, good, good)]
    assert quality.smallest(rows) == {"point": 0.5, "interval": 0.75}
    assert quality.smallest([*rows[:2], rows[3]]) == {"point": 0.3, "interval": 0.75}
    assert quality.smallest(rows[2:]) == {"point": None, "interval": None}


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    # broken if a torn line were believed, or what is there were run again
    configs = [quality.config("off"), quality.config("a", preset="st3")]
    file = quality.file_of(tmp_path, configs[1])
    lines = [json.dumps({"scene": i, "facts": []}) for i in range(25)]
    file.write_text("\n".join(lines)[:-5])
    done = {c.name: quality.lines_of(quality.file_of(tmp_path, c)) for c in configs}
    assert set(done["a"]) == set(range(24))
    left = [(name, indices.start) for name, _, indices in quality.tasks(configs, done, 30)]
    assert left == [("off", 0), ("off", 20), ("a", 20)]
