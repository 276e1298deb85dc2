"""ST3Config: what it takes, and the metadata keys it becomes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_edge import CURVES, PRESETS, RANKS, ConfigError, ST3Config
from st3_edge.config import VISION_TYPES

SHARES = st.floats(0, 1)
WHOLE = st.integers(1, 2**32 - 1)


def test_a_preset_is_set_only_where_the_file_carries_none():
    # broken if a default were written over what the model file carries, or a file without a schedule were not pruned
    assert ST3Config().overrides() == {"st3.preset": "st3"}
    assert ST3Config(budget=0.5).overrides({"st3.start": 2}) == {"st3.preset": "st3", "st3.budget": 0.5}
    assert ST3Config().overrides({"st3.preset": "pvtp"}) == {}
    assert ST3Config(preset="off").overrides({"st3.preset": "pvtp"}) == {"st3.preset": "off"}


@pytest.mark.parametrize(("given", "carried"), [("keep", "budget"), ("budget", "keep")])
def test_budget_or_keep_beside_the_other_one_in_the_file_is_told(given, carried):
    # broken if it reached native code, which cannot know that only one of the two was the user's
    with pytest.raises(ConfigError, match=f"carries st3.{carried}.*give {carried} instead"):
        ST3Config(**{given: 0.5}).overrides({f"st3.{carried}": 0.5})


@given(
    preset=st.sampled_from([name for name in PRESETS if name != "off"]),
    budget=SHARES.filter(lambda b: b > 0),
    start=WHOLE,
    stride=WHOLE,
    min_keep=WHOLE,
    min_share=SHARES,
    coverage=SHARES | st.sampled_from([0, 1]),
    merge=st.booleans(),
    rank=st.sampled_from(RANKS),
    seed=WHOLE,
    anneal=st.sampled_from(CURVES),
    anneal_tokens=WHOLE,
    anneal_floor=st.floats(0.01, 1) | st.just(1),
    anneal_interval=WHOLE,
    anneal_score=st.sampled_from(["random", "last-mean", "text-max-sum+last-mean"]),
    vision_type=st.sampled_from(VISION_TYPES),
)
def test_overrides_have_the_types_that_the_bindings_tell_apart(**values):
    # broken if an int such as budget=1 went out as an integer, or a count as a real: the library refuses those
    overrides = ST3Config(**values).overrides()
    assert overrides == {f"st3.{name}": value for name, value in values.items()}
    for key, value in overrides.items():
        types = dict.fromkeys(("preset", "rank", "anneal", "anneal_score", "vision_type"), str) | {"merge": bool}
        types |= dict.fromkeys(("budget", "min_share", "coverage", "anneal_floor"), float)
        assert type(value) is types.get(key.removeprefix("st3."), int)


@given(st.floats().filter(lambda x: not 0 < x <= 1))
def test_a_budget_outside_its_range_is_refused(value):
    # broken by a comparison that lets NaN, infinities or 0 pass
    with pytest.raises(ConfigError, match="budget"):
        ST3Config(budget=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "ST3"),
        ("preset", ""),
        ("preset", 1),
        ("keep", 1.5),
        pytest.param("keep", 10**400, id="keep-huge"),
        ("keep", "0.5"),
        ("coverage", -0.1),
        ("coverage", math.nan),
        ("merge", 1),
        ("merge", "true"),
        ("rank", "similarity"),
        ("budget", True),
        ("start", 0),
        ("start", 1.0),
        ("stride", 0),
        ("stride", 2**32),
        ("min_keep", -1),
        ("min_share", 1.5),
        ("seed", True),
        ("score", ""),
        ("score", "last"),
        ("score", "last-mean+"),
        ("score", "first-mean"),
        ("score", 3),
        ("score", "+".join(["last-mean"] * 13)),
        ("score", "random"),
        ("anneal", "cubic"),
        ("anneal", 1),
        ("anneal_tokens", 0),
        ("anneal_floor", 1.01),
        ("anneal_floor", math.nan),
        ("anneal_interval", 0),
        ("anneal_score", "best"),
        ("vision_type", "bf16"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(name, value):
    # broken if any field went unchecked: the value would reach native code
    with pytest.raises(ConfigError, match=name):
        ST3Config(**{name: value})


def test_an_exponential_curve_needs_a_floor_that_it_can_reach():
    # broken if a floor of 0 reached native code, which refuses it when a model loads
    with pytest.raises(ConfigError, match="anneal_floor"):
        ST3Config(anneal="exponential", anneal_floor=0)
    ST3Config(anneal="linear", anneal_floor=0)


def test_budget_and_keep_exclude_each_other():
    # broken if one of the two silently won
    with pytest.raises(ConfigError, match="exclude"):
        ST3Config(budget=0.5, keep=0.5)


@pytest.mark.parametrize("score", ["last-mean", "text-max-sum", "last-mean-sum+text-max", "last-max+text-mean-sum"])
def test_scores_of_the_grammar_are_taken(score):
    # broken by a pattern that is narrower than native/st3.h's
    assert ST3Config(score=score).overrides()["st3.score"] == score


@pytest.mark.parametrize("values", [{"budget": 0.3}, {"min_keep": 0, "merge": False}, {"vision_type": "file"}])
def test_nothing_goes_with_preset_off(values):
    # broken if a value that no layer reads were taken without a word, as the command line does not
    with pytest.raises(ConfigError, match=f"preset off drops nothing, so there is nothing for {', '.join(values)} to"):
        ST3Config(preset="off", **values)


def test_numpys_numbers_are_numbers():
    # broken if they were refused, or reached native code as another type than Python's own
    given = ST3Config(budget=np.float32(0.5), start=np.int64(4))
    assert given == ST3Config(budget=0.5, start=4)
    assert [type(value) for value in given.overrides().values()] == [str, float, int]
    for value in (np.True_, np.array([4]), np.float64(4)):
        with pytest.raises(ConfigError):
            ST3Config(start=value)
