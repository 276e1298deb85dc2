"""Random inputs, some of each kind; scripts/fuzz_inputs.py takes longer."""

import math
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
from inputs import check_images, check_messages

SEED = 20241220


@pytest.mark.parametrize(("check", "n"), [(check_messages, 50_000), (check_images, 1000)], ids=["messages", "images"])
def test_each_is_read_in_full_or_refused_in_one_line(check, n):
    # broken if a part of one were dropped without a word, or one crashed, hung or ended in an exception of another's
    print("seed", SEED)
    tried = check.run(random.Random(SEED), math.inf, n)
    print(tried)
    assert tried["read"] > 20
    assert tried["refused"] > 20
