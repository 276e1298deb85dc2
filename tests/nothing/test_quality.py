"""scripts/quality.py: what its grids compare, and what its tables make of answers. Nothing is run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]
import quality  # noqa: E402
import quality_answers  # noqa: E402
import quality_tables  # noqa: E402
from oracle import schedule  # noqa: E402
from quality_grids import GRIDS, config  # noqa: E402
from quality_subjects import Embedded  # noqa: E402

N_LAYER = 16


def resolve(config) -> schedule.Schedule:
    return schedule.resolve(N_LAYER, **{k.removeprefix("st3."): v for k, v in config.keys})


def configs(grid):
    return GRIDS[grid].made(GRIDS[grid].budgets, N_LAYER)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_compared_is_in_the_grid(grid):
    # broken by a name that nothing has: its differences would silently be left out
    names = [c.name for c in configs(grid)]
    assert names[0] == "off" and len(set(names)) == len(names)
    assert {other for c in configs(grid) for other in c.against.values()} <= set(names)
    files = {quality.file_of(Path("work"), c) for c in configs(grid)}
    assert len(files) == len(names), "two configurations would share their answers"


@pytest.mark.parametrize("grid", ["quality", "methods", "choices"])
def test_all_are_compared_at_the_same_cost(grid):
    # broken if a preset or a key left its budget
    for c in configs(grid)[1:]:
        asked = float(c.name.partition(" @ ")[2])
        assert resolve(c).budget([576]) == pytest.approx(asked, abs=0.003), c.name


def test_grids_share_the_default():
    # broken if a page had another default than the next
    of = {(grid, c.name): quality.file_of(Path(), c) for grid in GRIDS for c in configs(grid)}
    assert of["quality", "pvtp @ 0.2"] == of["long", "pvtp @ 0.2"]
    assert of["quality", "st3 @ 0.2"] == of["methods", "st3 @ 0.2"] and of["quality", "off"].name == "off.jsonl"


def test_the_interval_of_a_known_difference():
    # broken if scenes were not weighed by what was asked of them, or the two were drawn apart
    print("seed 3")
    rng = np.random.default_rng(3)
    b = np.stack([rng.integers(0, 2, 400), np.ones(400)], 1).astype(float)
    a = b.copy()
    a[:40, 0] -= 1  # paired: 10 points less in each draw but for which scenes are drawn
    mean, low, high = quality_tables.interval(a, b, rng)
    half = 1.96 * 100 * np.sqrt(0.1 * 0.9 / 400)
    assert mean == pytest.approx(-10) and [low, high] == pytest.approx([-10 - half, -10 + half], abs=0.5)
    weighed = quality_tables.interval(np.array([[3.0, 3], [0, 1], [0, 0]]), np.array([[0.0, 3], [0, 1], [0, 0]]), rng)
    assert weighed == [75, 0, 100]  # of scenes that are asked: none, one or both of the first
    ratios = quality_tables.interval(np.array([[2.0, 4]] * 9), np.array([[2.0, 8]] * 9), rng)
    assert ratios == [25, 25, 25]  # each by what is asked of it


def answers(n: int, wrong: int, nats: float) -> quality_tables.Rows:
    """n scenes of two styles with a fact each, the first few wrong; a caption and KL in the first alone."""
    rows: quality_tables.Rows = {}
    for i in range(n):
        key = ("known" if i < 6 else "gray", i)
        rows[key] = {"scene": i, "measures": ["facts"], "facts": [["color", i >= wrong]]}
    rows["known", 0] |= {"objects": [1, 2, 4], "tokens": 50, "held": 0.5, "second": [1, 1], "kl facts": [nats, 4]}
    rows["known", 0] |= {"early": [[1, 2, 4], [4, 4, 4]], "schedule": {"budget": 0.5}}
    return rows


def test_a_row_counts_the_scenes_that_all_have():
    # broken if a configuration that got further were judged by scenes that the others lack
    configs = [config("off"), config("st3 @ 0.5", {"off": "off"}, preset="st3", budget=0.5)]
    done = {"off": answers(10, 1, 0.0), "st3 @ 0.5": answers(8, 2, 2.0)}
    rows = quality_tables.table(configs, done, ["known", "gray"], Embedded())
    assert [(r["style"], r["name"], r["scenes"]) for r in rows] == [
        (style, c.name, n) for style, n in (("all", 8), ("known", 6), ("gray", 2)) for c in configs
    ]
    off, st3 = rows[:2]
    assert off["asked"]["facts"] == 8 and off["facts"] == 87.5 and st3["facts"] == 75
    assert st3["facts - off"][0] == -12.5 and st3["color"] == 75 and st3["captions"] == 33.33
    assert st3["found"] == 25 and st3["named"] == 50 and st3["asked"]["found"] == 4 and st3["early"] == 71.43
    assert st3["kl facts"] == 0.5 and st3["asked"]["kl facts"] == 4 and st3["held"] == 50
    assert rows[3]["facts"] == 66.67 and rows[5]["facts"] == 100
    about = {"first": 0, "grid": "quality", "command": "c", "commit": "d", "processor": "p"}
    page = quality_tables.markdown(rows, about, Embedded())
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert [len(t) for t in tables] == [4, 3] * 3
    assert all(len({line.count("|") for line in t}) == 1 for t in tables)
    del rows[1]["tokens"]  # as where another grid has asked `off` more than this one asks
    assert quality_tables.markdown(rows, about, Embedded()).count(" tokens |") == page.count(" tokens |") - 1


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    # broken if a torn line were believed, or what is there were run again
    configs = [config("off"), config("a", preset="st3")]
    file = quality.file_of(tmp_path, configs[1])
    lines = [json.dumps({"scene": i, "measures": ["facts", "captions"], "facts": [["color", True]]}) for i in range(25)]
    file.write_text("\n".join(lines)[:-5])
    done = {c.name: quality.rows_of(quality.file_of(tmp_path, c), "known") for c in configs}
    assert set(done["a"]) == {("known", i) for i in range(24)}

    def left(grid):
        made = quality.tasks(configs, done, ["known"], range(30), GRIDS[grid])
        return [(t.name, t.indices.start, t.measures) for t in made]

    both, more = ("facts", "captions"), ("facts", "captions", "second")
    assert left("methods") == [("off", 0, both), ("off", 20, both), ("a", 20, both)]
    assert left("quality") == [("off", 0, more), ("a", 0, more[2:]), ("off", 20, more), ("a", 20, more)]


def test_what_was_asked_at_two_times_is_one_row():
    # broken if the second run's rows took the place of the first's
    rows: quality_tables.Rows = {}
    quality.add(rows, "known", {"scene": 3, "measures": ["facts"], "facts": [["color", True]]})
    quality.add(rows, "known", {"scene": 3, "measures": ["second"], "second": [1, 1]})
    assert rows == {
        ("known", 3): {"scene": 3, "measures": ["facts", "second"], "facts": [["color", True]], "second": [1, 1]}
    }


def test_the_same_scenes_are_described_by_all():
    # broken if grids that ask less described other scenes: their rows would not be paired
    some = [i for i in range(20) if quality_answers.described(("facts", "captions"), i, 1)]
    assert some == [0, 5, 10, 15] and all(quality_answers.described(("every caption",), i, 1) for i in range(20))
    assert [i for i in range(6) if quality_answers.described(("captions",), i, 3)] == [0, 1, 2, 5]
    assert not any(quality_answers.described(("facts",), i, 5) for i in range(20))


def test_a_first_cut_that_is_too_late_for_the_budget_is_left_out():
    # broken if a short model were asked for what its schedule refuses, or a long one not for all
    starts = [[c.start for c in GRIDS["choices"].made((0.3,), n) if c.name.startswith("one cut")] for n in (16, 30)]
    assert starts == [[2, 3, 4], list(range(2, 9))]
