"""What the demo says of times."""

from st3_edge.commands import demo


def test_pairs_that_agree_give_medians_a_ratio_and_its_range():
    # broken if the ratio were that of medians, which can be of different moments, or its spread were left out
    line = demo._prefill([10.0, 20.0, 11.0], [20.0, 42.0, 22.0])
    assert line.split() == ["11.0", "ms", "22.0", "ms", "2.00", "x", "as", "fast", "(2.00", "to", "2.10)"]


def test_pairs_that_disagree_give_no_ratio():
    # broken if noise were printed as a gain: a busy machine made 23 out of 1.5
    line = demo._prefill([10.0, 10.0, 11.0], [15.0, 235.4, 16.0])
    assert "x as fast" not in line and "1.5 to 23.5" in line and "other programs" in line
