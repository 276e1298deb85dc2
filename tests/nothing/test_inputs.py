"""Random inputs, a short time of each kind; scripts/fuzz_inputs.py takes longer."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
from inputs import check_images, check_messages

SEED = 20241220


@pytest.mark.parametrize("check", [check_messages, check_images], ids=["messages", "images"])
def test_each_is_read_in_full_or_refused_in_one_line(check):
    # broken if a part of one were dropped without a word, or one crashed, hung or ended in an exception of another's
    tried = check.run(random.Random(SEED), 6)
    print("seed", SEED, tried)
    assert tried["read"] > 20
    assert tried["refused"] > 20
