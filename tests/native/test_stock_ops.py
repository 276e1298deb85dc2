"""Scores by stock ops, as on a backend that has no kernel for the op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PARITY = Path(__file__).with_name("test_pruned_prefill.py")


def test_stock_ops_choose_the_same_tokens() -> None:
    """Breaks if the fallback graph reads other rows, heads, cells or streams than the op, or reduces them otherwise.

    F16 and Q8_0 caches alike.
    """
    chosen = range(24)
    ids = [f"{PARITY}::test_kept_tokens_and_logits[{n}]" for n in chosen]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids],
        env={**os.environ, "ST3_STOCK_OPS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{len(chosen)} passed" in run.stdout
