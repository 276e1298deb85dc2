"""The span-attention op on a real GPU against its double-precision reference in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import SEED
from test_attn_span import HEADS, PAIRS, check

# every type of K that flash attention takes on CUDA in the stock build
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("kind", "d"), [(kind, d) for kind, d in PAIRS if kind in KINDS])
def test_kinds_and_head_sizes(gpu, kind: str, d: int, reduce: str) -> None:
    """Breaks if a type of K is read wrongly."""
    for heads, n_q in itertools.product(((4, 4), (8, 2), (7, 1)), (1, 3, 40)):
        check(gpu, kind, d, heads, n_q, 700, reduce)


@pytest.mark.parametrize("n_q", [1, 2, 8, 64, 200, 512])
def test_query_rows(gpu, n_q: int) -> None:
    """Breaks if rows are lost at a tile's or a group's border."""
    for heads, reduce in itertools.product(((32, 32), (32, 8)), ("mean", "max")):
        check(gpu, "F16", 128, heads, n_q, 1000, reduce)


@pytest.mark.parametrize("n_kv", [1, 2, 31, 33, 255, 256, 257, 640, 4096, 32768])
def test_cells(gpu, n_kv: int) -> None:
    """Breaks if cells are lost at a pass's or a split's border, or splits are merged wrongly."""
    for kind, n_q, reduce in itertools.product(("Q8_0", "F16"), (1, 5), ("mean", "max")):
        check(gpu, kind, 128, (4, 1), n_q, n_kv, reduce)


def test_masks(gpu) -> None:
    """Breaks if finite mask values are dropped, hidden cells take part, or a row without cells gives NaN."""
    rng = np.random.default_rng(SEED)
    holes = np.where(rng.random((6, 500)) < 0.5, -np.inf, 0.0)
    holes[2] = -np.inf
    for mask, mask_type in itertools.product((rng.uniform(-3, 3, (6, 500)), holes), (np.float16, np.float32)):
        check(gpu, "F16", 64, (4, 2), 6, 500, "mean", mask=mask, mask_type=mask_type, cache_view=False)
    check(gpu, "Q8_0", 64, (4, 2), 6, 500, "max", mask=np.full((6, 500), -np.inf))


@pytest.mark.parametrize("n_q", [1, 30])
def test_played_back(gpu, n_q: int) -> None:
    """Breaks if the op cannot be recorded in a CUDA graph: later runs are played back."""
    check(gpu, "F16", 128, (32, 8), n_q, 640, "mean", runs=8)


@pytest.mark.parametrize("kind", KINDS)
def test_sanitized(gpu, kind: str) -> None:
    """A few small calls: what compute-sanitizer is run on."""
    for d, n_q in itertools.product(HEADS, (1, 3, 9)):
        if (kind, d) in PAIRS:
            check(gpu, kind, d, (4, 2), n_q, 77, "mean")
