"""The span-attention op on the CPU backend against its double-precision reference in NumPy."""

from __future__ import annotations

import itertools

import gguf
import native_runtime
import numpy as np
import pytest
from cases import SEED
from ggml_graph import Backend, Cpu
from gguf import GGMLQuantizationType as Kind
from oracle.attention import attn_span
from oracle.llama import nmse

pytestmark = pytest.mark.no_device

# every type of K that flash attention takes on the CPU
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL")
HEADS = (64, 80, 96, 128, 256)
PAIRS = [(kind, d) for kind in KINDS for d in HEADS if d % gguf.GGML_QUANT_SIZES[Kind[kind]][0] == 0]
TOLERANCE = 1e-9  # NMSE, of GPUs too; queries rounded to F16 make it 1e-8


@pytest.fixture(scope="module")
def cpu(rt) -> Cpu:
    folder = native_runtime.lib_dir()
    assert folder is not None
    return Cpu(folder)


def keys(rng: np.random.Generator, shape: tuple[int, int, int], kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Random keys as packed bytes [h, n, bytes], and as the numbers that these bytes stand for."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, d = shape[0] * shape[1], shape[2]
    if kind == Kind.IQ4_NL:  # gguf cannot write this one: random codes under sane scales
        packed = rng.integers(0, 256, (rows * d // block, size), dtype=np.uint8)
        packed[:, :2] = rng.uniform(0.005, 0.02, (len(packed), 1)).astype(np.float16).view(np.uint8)
        packed = packed.reshape(rows, -1)
    else:
        packed = gguf.quants.quantize(rng.standard_normal((rows, d), np.float32), kind)
    plain = gguf.quants.dequantize(packed, kind).reshape(shape)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(*shape[:2], -1), plain


def causal(n_q: int, n_kv: int) -> np.ndarray:
    """The last n_q rows of a causal mask over n_kv cells."""
    late = np.arange(n_kv)[None, :] > np.arange(n_kv - n_q, n_kv)[:, None]
    return np.where(late, -np.inf, 0.0).astype(np.float32)


def check(backend: Backend, kind: str, d: int, heads: tuple[int, int], n_q: int, n_kv: int, reduce: str, **how) -> None:
    """Compare the op with the reference on random numbers."""
    rng = np.random.default_rng([SEED, d, *heads, n_q, n_kv])
    n_head, n_head_kv = heads
    q = 1.5 * rng.standard_normal((n_head, n_q, d), np.float32)
    packed, k = keys(rng, (n_head_kv, n_kv, d), Kind[kind])
    mask = how.get("mask")
    if mask is None:
        mask = causal(min(n_q, n_kv), n_kv)
        mask = np.concatenate([np.repeat(mask[:1], n_q - len(mask), 0), mask]) if n_q > n_kv else mask
    mask = mask.astype(how.get("mask_type", np.float16))
    ids = how.get("ids")
    if ids is None:
        ids = np.sort(rng.choice(n_kv, max(1, n_kv * 2 // 3), replace=False))
    scale = d**-0.5
    got = backend.attn_span(
        q, packed, Kind[kind], mask, ids, scale, reduce, how.get("cache_view", True), how.get("runs", 1)
    )
    want = attn_span(q, k, mask, ids, scale, reduce)
    assert np.isfinite(got).all()
    if np.any(want):
        assert nmse(got, want) <= TOLERANCE
    else:
        assert not np.any(got)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("kind", "d"), PAIRS)
def test_kinds_and_head_sizes(cpu, kind: str, d: int, reduce: str) -> None:
    """Breaks if a type of K is read wrongly (block, tail, head size), or is missing."""
    check(cpu, kind, d, (4, 2), 3, 150, reduce)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (6, 2), (32, 8), (7, 1)])
def test_grouped_heads(cpu, heads: tuple[int, int], reduce: str) -> None:
    """Breaks if query heads are paired with the wrong key head."""
    check(cpu, "F16", 64, heads, 5, 90, reduce)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("n_q", [1, 2, 3, 7, 8, 31, 64, 65, 200, 512])
def test_query_rows(cpu, n_q: int, reduce: str) -> None:
    """Breaks if rows are lost at a block's or a thread's border."""
    check(cpu, "F16", 64, (4, 2), n_q, 700, reduce)


@pytest.mark.parametrize("n_kv", [1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 1000, 3000])
def test_cells(cpu, n_kv: int) -> None:
    """Breaks if cells are lost at a block's border, or if the running maximum of the softmax is wrong."""
    for n_q, reduce in itertools.product((1, 40), ("mean", "max")):
        check(cpu, "Q8_0", 64, (4, 4), n_q, n_kv, reduce)
        check(cpu, "F16", 64, (4, 4), n_q, n_kv, reduce)


@pytest.mark.parametrize("mask_type", [np.float16, np.float32])
@pytest.mark.parametrize("cache_view", [False, True])
def test_layouts(cpu, mask_type: type, cache_view: bool) -> None:
    """Breaks if strides of q or k are ignored, or a mask is read as the wrong type."""
    for kind in ("F32", "F16", "Q8_0"):
        check(cpu, kind, 128, (4, 2), 9, 77, "mean", mask_type=mask_type, cache_view=cache_view)


def test_mask_is_added(cpu) -> None:
    """Breaks if finite mask values are dropped, hidden cells take part, or a row without cells gives NaN."""
    rng = np.random.default_rng(SEED)
    bias = rng.uniform(-3, 3, (6, 50))
    check(cpu, "F16", 64, (4, 2), 6, 50, "mean", mask=bias)
    holes = np.where(rng.random((6, 50)) < 0.5, -np.inf, 0.0)
    check(cpu, "F16", 64, (4, 2), 6, 50, "max", mask=holes)
    holes[2] = -np.inf
    check(cpu, "F16", 64, (4, 2), 6, 50, "mean", mask=holes)
    check(cpu, "Q8_0", 64, (4, 2), 6, 50, "max", mask=np.full((6, 50), -np.inf))


def test_ids_in_any_order(cpu) -> None:
    """Breaks if results do not follow the order of ids, or if a repeated id is not."""
    ids = np.array([49, 0, 7, 7, 3, 48, 1])
    check(cpu, "F16", 64, (4, 2), 4, 50, "mean", ids=ids)
    check(cpu, "F16", 64, (4, 2), 4, 50, "max", ids=ids[:1])


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_threads(cpu, threads: int) -> None:
    """Breaks if threads overlap, leave gaps, or outnumber the work."""
    cpu.set_threads(threads)
    try:
        for n_q, reduce in ((1, "mean"), (1, "max"), (37, "mean"), (37, "max")):
            check(cpu, "F16", 64, (3, 1), n_q, 300, reduce)
    finally:
        cpu.set_threads(2)


def test_large_scores(cpu) -> None:
    """Breaks if the softmax overflows where one cell towers above the rest."""
    rng = np.random.default_rng(SEED)
    q = 60 * rng.standard_normal((2, 3, 64), np.float32)
    packed, k = keys(rng, (2, 100, 64), Kind.F32)
    ids = np.arange(100)
    for reduce in ("mean", "max"):
        got = cpu.attn_span(q, packed, Kind.F32, causal(3, 100), ids, 1.0, reduce, True)
        want = attn_span(q, k, causal(3, 100), ids, 1.0, reduce)
        assert np.isfinite(got).all() and nmse(got, want) <= 1e-8  # an F32 score of 1000 is off by 1e-4
