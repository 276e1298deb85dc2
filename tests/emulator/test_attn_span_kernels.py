"""The span-attention op's CUDA and Metal kernels, their own text run lane by lane on the CPU, against attn-span-ref.

What runs is attn-span.cu and attn-span.metal, with the hosts that launch them, compiled by a C++ compiler against the
stand-ins in this folder, under ASan and UBSan. That shows what they compute; it does not show that Apple's compiler
takes the text, nor how fast they are.
"""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from emulator import build
from gguf import GGMLQuantizationType as Kind
from oracle.attention import attn_span
from oracle.llama import nmse

SEED = 20241220
TOLERANCE = 1e-11  # NMSE; queries rounded to F16 make it 1e-8
HEADS = (64, 80, 96, 128, 256)
PAIRS = [(kind, d) for kind in build.KINDS for d in HEADS if d % gguf.GGML_QUANT_SIZES[Kind[kind]][0] == 0]
GROUPS = [(1, 1), (4, 4), (8, 2), (6, 2), (32, 8), (7, 1)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fibers are Linux's")


@pytest.fixture(scope="module", params=build.BACKENDS)
def runner(request: pytest.FixtureRequest, upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.runner(request.param, upstream, tmp_path_factory.mktemp(request.param))


def strided(rows: np.ndarray, layout: str) -> tuple[bytes, int, int, int]:
    """Rows [head, token, bytes] as they lie in memory: that, the strides of a token and a head, and where they begin.

    dense: heads one after the other. cache: heads of one token side by side. view: a part of a larger cache. odd: a
    cache with eight bytes between tokens.
    """
    n_head, n_token, size = rows.shape
    if layout == "dense":
        return rows.tobytes(), size, n_token * size, 0
    lie = rows.swapaxes(0, 1)
    if layout == "cache":
        return lie.tobytes(), n_head * size, size, 0
    if layout == "odd":
        lie = lie.reshape(n_token, n_head * size)
        return np.pad(lie, ((0, 0), (0, 8))).tobytes(), n_head * size + 8, size, 0
    lie = np.pad(lie, ((1, 0), (1, 0), (0, 0)), constant_values=0xFF)
    return lie.tobytes(), (n_head + 1) * size, size, (n_head + 2) * size


class Cases:
    """Cases for one run of a runner."""

    def __init__(self) -> None:
        self.input: list[bytes] = []
        self.spans: list[tuple[int, np.ndarray]] = []
        self.rng = np.random.default_rng(SEED)

    def add(
        self,
        kind: str = "F16",
        d: int = 64,
        heads: tuple[int, int] = (4, 2),
        n_q: int = 3,
        n_kv: int = 150,
        reduce: str = "mean",
        layout: str = "cache",
        mask: np.ndarray | None = None,
        mask_type: type = np.float16,
        ids: np.ndarray | None = None,
        n_sm: int = 4,
        seed: int = SEED,
        q_scale: float = 1.5,
        spoil: bool = False,
    ) -> None:
        """Random numbers of this shape. `spoil` puts no numbers into the keys of cells that nothing sees."""
        rng = self.rng
        n_head, n_head_kv = heads
        if mask is None:
            late = np.arange(n_kv)[None, :] > n_kv - n_q + np.arange(n_q)[:, None]
            mask = np.where(late & (np.arange(n_kv) > 0), -np.inf, 0.0)
        mask = np.ascontiguousarray(mask.astype(mask_type))
        if ids is None:
            ids = np.sort(rng.choice(n_kv, max(1, n_kv * 2 // 3), replace=False))
        ids = ids.astype(np.int32)
        q = q_scale * rng.standard_normal((n_head, n_q, d), np.float32)
        packed = gguf.quants.quantize(rng.standard_normal((n_head_kv * n_kv, d), np.float32), Kind[kind])
        plain = gguf.quants.dequantize(packed, Kind[kind]).reshape(n_head_kv, n_kv, d).astype(np.float32)
        packed = np.ascontiguousarray(packed).view(np.uint8).reshape(n_head_kv, n_kv, -1)
        if spoil:
            packed = packed.copy()
            packed[:, np.isneginf(mask).all(0)] = 0xFF
            plain[:, np.isneginf(mask).all(0)] = 0.0
        scale = float(np.float32(d**-0.5))

        raw_q, q_row, q_head, q_first = strided(q.view(np.uint8), layout)
        raw_k, k_cell, k_head, k_first = strided(packed, layout)
        raw_mask, mask_row, _, mask_first = strided(mask.view(np.uint8)[None], layout)
        shape = (d, n_q, n_head, n_kv, n_head_kv, len(ids), reduce == "max", mask_type is np.float16)
        strides = (q_row, q_head, q_first, k_cell, k_head, k_first, mask_row, mask_first)
        header = (seed, n_sm, Kind[kind], *shape, *strides, len(raw_q), len(raw_k), len(raw_mask), scale)
        dense = (x.astype(np.float32).tobytes() for x in (q, plain, mask))
        self.input += [struct.pack("22qd", *header), raw_q, raw_k, raw_mask, ids.tobytes(), *dense]
        with np.errstate(invalid="ignore"):
            self.spans.append((len(ids), attn_span(q, plain, mask, ids, scale, reduce)))

    def run(self, runner: Path) -> list[np.ndarray | None]:
        """Results, or None where the kernels do not take the case."""
        done = subprocess.run([runner], input=b"".join(self.input), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        results: list[np.ndarray | None] = []
        at = 0
        for n, oracle in self.spans:
            taken = np.frombuffer(done.stdout, np.int64, 1, at)[0]
            got = np.frombuffer(done.stdout, np.float32, n, at + 8)
            want = np.frombuffer(done.stdout, np.float64, n, at + 8 + 4 * n)
            at += 8 + 12 * n
            results.append(got if taken else None)
            if not taken:
                continue
            np.testing.assert_allclose(want, oracle, rtol=1e-9, atol=1e-300)
            assert np.isfinite(got).all()
            if np.any(want):
                assert nmse(got, want) <= TOLERANCE
            else:
                assert not np.any(got)
        assert at == len(done.stdout)
        return results

    def check(self, runner: Path) -> None:
        """All cases are taken and right."""
        assert all(result is not None for result in self.run(runner))


@pytest.mark.parametrize(("kind", "d"), PAIRS)
def test_kinds_and_head_sizes(runner: Path, kind: str, d: int) -> None:
    """Breaks if a type of K is read wrongly, a lane reads past a row, or an instance is missing."""
    cases = Cases()
    for (n_q, heads), reduce in itertools.product(((1, (2, 2)), (2, (2, 1)), (3, (4, 2))), ("mean", "max")):
        cases.add(kind, d, heads, n_q, 150 if n_q < 3 else 70, reduce)
    cases.check(runner)


def test_other_head_sizes(runner: Path) -> None:
    """Breaks if lanes without a part of the row add to the sum."""
    cases = Cases()
    for d in (8, 16, 40, 72, 112, 192, 248):
        cases.add("F16", d, n_q=1, n_kv=45)
        cases.add("F32", d, n_kv=45)
    cases.check(runner)


@pytest.mark.parametrize("heads", GROUPS)
def test_grouped_heads(runner: Path, heads: tuple[int, int]) -> None:
    """Breaks if query heads are paired with the wrong key head, or a tile mixes heads up."""
    cases = Cases()
    for n_q, reduce in itertools.product((1, 5), ("mean", "max")):
        cases.add("F16", 64, heads, n_q, 40, reduce)
    cases.check(runner)


@pytest.mark.parametrize("n_q", [2, 7, 8, 31, 65, 200, 512])
def test_query_rows(runner: Path, n_q: int) -> None:
    """Breaks if rows are lost at a tile's border."""
    cases = Cases()
    cases.add("F16", 64, (2, 1), n_q, 48, "mean")
    cases.add("Q8_0", 64, (2, 2), n_q, 33, "max")
    cases.check(runner)


def test_groups_of_rows(runner: Path) -> None:
    """Breaks if groups of query rows, made where their logits do not fit the scratch memory, are joined wrongly."""
    cases = Cases()
    for reduce in ("mean", "max"):
        cases.add("F16", 8, (1, 1), 1030, 9, reduce, "view")
    cases.check(runner)


@pytest.mark.parametrize("n_kv", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 255, 256, 257, 1000])
def test_cells(runner: Path, n_kv: int) -> None:
    """Breaks if cells are lost at a pass's or a split's border, or splits are merged wrongly."""
    cases = Cases()
    for (kind, d), n_sm in itertools.product((("Q8_0", 64), ("F16", 128)), (1, 100)):
        cases.add(kind, d, (2, 2), 1, n_kv, "mean", n_sm=n_sm)
        cases.add(kind, d, (2, 2), 9, min(n_kv, 257), "max", n_sm=n_sm)
    cases.check(runner)


def test_many_splits(runner: Path) -> None:
    """Breaks if more splits than lanes are merged wrongly."""
    cases = Cases()
    cases.add("Q4_0", 64, (1, 1), 1, 32768, "max", n_sm=132, ids=np.arange(0, 32768, 97))
    cases.add("Q4_0", 256, (1, 1), 1, 4000, "mean", n_sm=132)
    cases.check(runner)


@pytest.mark.parametrize("layout", ["dense", "cache", "view"])
@pytest.mark.parametrize("mask_type", [np.float16, np.float32])
def test_layouts(runner: Path, layout: str, mask_type: type) -> None:
    """Breaks if strides or offsets are ignored, or a mask is read as the wrong type."""
    cases = Cases()
    for kind in ("F32", "F16", "Q8_0", "Q5_1"):
        cases.add(kind, 128, (4, 2), 9, 50, "mean", layout, mask_type=mask_type)
    cases.check(runner)


def test_mask_is_added(runner: Path) -> None:
    """Breaks if finite mask values are dropped, hidden cells take part, or a row without cells gives NaN."""
    cases = Cases()
    holes = np.where(cases.rng.random((6, 50)) < 0.5, -np.inf, 0.0)
    cases.add(n_q=6, n_kv=50, mask=cases.rng.uniform(-3, 3, (6, 50)))
    cases.add(n_q=6, n_kv=50, mask=holes, reduce="max")
    holes[2] = -np.inf
    cases.add(n_q=6, n_kv=50, mask=holes)
    cases.add(n_q=6, n_kv=50, mask=np.full((6, 50), -np.inf), reduce="max")
    cases.add(n_q=1, n_kv=500, mask=np.where(np.arange(500) == 437, 0.0, -np.inf)[None], n_sm=100)
    cases.check(runner)


def test_hidden_cells_may_hold_anything(runner: Path) -> None:
    """Breaks if the keys of a cell that is hidden from all reach a result: memory never written may hold NaN."""
    cases = Cases()
    hidden = np.tile(np.where(np.arange(60) % 3 == 0, -np.inf, 0.0), (4, 1))
    for kind in build.KINDS:
        cases.add(kind, 64, n_q=4, n_kv=60, mask=hidden, spoil=True)
    cases.check(runner)


def test_ids_in_any_order(runner: Path) -> None:
    """Breaks if results do not follow the order of ids, or if a repeated id is not."""
    cases = Cases()
    cases.add(n_q=4, n_kv=50, ids=np.array([49, 0, 7, 7, 3, 48, 1]))
    cases.add(n_q=4, n_kv=50, ids=np.array([49]), reduce="max")
    cases.check(runner)


def test_large_scores(runner: Path) -> None:
    """Breaks if the softmax overflows where one cell towers above the rest."""
    cases = Cases()
    for reduce in ("mean", "max"):
        cases.add("F32", 64, (2, 2), 3, 100, reduce, q_scale=480)
    cases.check(runner)


def test_order_of_lanes(runner: Path) -> None:
    """Breaks if a result depends on which lane, warp or threadgroup comes first."""
    results = []
    for seed in range(4):
        cases = Cases()
        cases.add("F16", 128, (4, 2), 5, 200, seed=seed)
        cases.add("Q4_0", 64, (4, 4), 1, 200, "max", seed=seed)
        results.append(np.concatenate(cases.run(runner)))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_what_is_not_taken(runner: Path) -> None:
    """Breaks if the kernels take a call that they cannot run."""
    cases = Cases()
    cases.add("F16", 36, n_kv=8)  # no whole units
    cases.add("F16", 264, n_kv=8)  # rows longer than a warp reads
    cases.add("F16", 64, n_kv=8, layout="odd")  # rows that are not aligned
    cases.add("F16", 64, n_kv=8)
    cases.add("Q8_0", 64, n_kv=8, layout="odd")
    taken = [result is not None for result in cases.run(runner)]
    assert taken == [False, False, False, True, True]
