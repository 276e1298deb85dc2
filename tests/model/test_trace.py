"""A call's trace: what each stage held when each token of the answer was chosen."""

import math

import pytest

from st3_edge import ST3Config

CAPTION = "Describe the image."


def traced(llava, pictures, **options) -> dict:
    llava.reset()
    llava.ask(pictures, CAPTION, temperature=0, trace=True, **{"max_tokens": 12, **options})
    return llava.last_report.to_dict()


def held(got: dict, stage: int, step: int) -> list[int]:
    """The visual tokens that a stage held when `step` tokens of the answer were read."""
    return [i for i, left in enumerate(got["left"][stage]) if left < 0 or left > step]


def assert_told(got: dict, step: int, key: str) -> None:
    """A step's counts are those that the report gives layer by layer."""
    first_layers = [0, *(cut + 1 for cut in got["schedule"]["cuts"])]
    counts = [len(held(got, stage, step)) for stage in range(len(first_layers))]
    assert counts == [got["visual_tokens"][key][layer] for layer in first_layers]


def test_what_left_at_which_token_is_what_was_kept_and_what_the_schedule_asks_for(load, picture, scenes):
    # broken if positions were taken for indices, a step were off by one, or a stage's first layer were another's
    floor, over = 0.25, 8
    config = ST3Config(preset="pyramiddrop", anneal="linear", anneal_floor=floor, anneal_tokens=over)
    with load(config) as llava:
        got = traced(llava, [picture, str(scenes[1].picture)])
    assert got["images"] == [576, 576] and len(got["pieces"]) == got["n_generated"] == 12
    counts = [[576, 576], *got["schedule"]["counts"]]
    assert len(got["left"]) == len(counts) == len(got["schedule"]["cuts"]) + 1
    assert held(got, 0, 0) == list(range(1152))
    for stage, kept in enumerate(got["kept"], 1):
        assert held(got, stage, 0) == kept
    for stage, images in enumerate(counts):
        for step in range(12):  # the last token is chosen, and not read
            share = 1 - (1 - floor) * min(step / over, 1)
            now = held(got, stage, step)
            expected = [max(1, math.floor(n * share + 0.5)) for n in images]
            assert [sum(i < 576 for i in now), sum(i >= 576 for i in now)] == expected, (stage, step)
    assert_told(got, 11, "held")


def test_without_pruning_nothing_leaves(load, picture):
    # broken if stock memory, which knows of no images, were taken for one that holds none
    with load(ST3Config(preset="off")) as llava:
        got = traced(llava, [picture], max_tokens=3)
    assert got["mode"] == "off" and got["left"] == [[-1] * 576] and got["kept"] == []


def test_evicted_tokens_left_before_the_answer(load, picture):
    # broken if only a pruned prefill told what it kept
    with load(ST3Config(anneal="none"), n_ubatch=100) as llava:
        got = traced(llava, [picture], max_tokens=3)
    assert got["mode"] == "evict-only" and got["kept"] == [[] for _ in got["schedule"]["cuts"]]
    assert_told(got, 0, "per_layer")
    assert {left for stage in got["left"] for left in stage} == {-1, 0}


@pytest.mark.parametrize("stop", [None, " is", "o"])
def test_the_pieces_are_the_answer(load, picture, stop):
    # broken if what a stop string holds back were lost, or told twice
    with load(ST3Config()) as llava:
        got = traced(llava, [picture], max_tokens=9, stop=stop)
    assert "".join(got["pieces"]) == got["answer"] and len(got["pieces"]) == got["n_generated"]
