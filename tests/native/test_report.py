"""The schedule that native code resolves and reports, against the arithmetic written again in Python."""

from __future__ import annotations

import mrope
import numpy as np
import pytest
from cases import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from native_runtime import Context, Image, Model, NativeError
from oracle import schedule

from st3_edge.commands.bench.shapes import Shape

pytestmark = pytest.mark.no_device

LAYERS = (1, 2, 3, 5, 8, 12, 16, 32)


def shape(n_layer: int) -> Shape:
    """Next to nothing, but of that depth."""
    return Shape(n_layer, 32, 1, 1, 32, n_vocab=272)


@st.composite
def keys(draw) -> dict[str, str | int | float]:
    """Any keys that are in range; the schedule may still be impossible."""
    out: dict[str, str | int | float] = {
        "st3.preset": draw(st.sampled_from([p for p in schedule.PRESETS if p != "off"]))
    }
    ranges = {
        "st3.start": st.integers(1, 9),
        "st3.stride": st.integers(1, 34),
        "st3.min_keep": st.integers(0, 20),
        "st3.min_share": st.integers(0, 64).map(lambda n: n / 64),
        "st3.coverage": st.integers(0, 16).map(lambda n: n / 16),
    }
    for key, values in ranges.items():
        if draw(st.booleans()):
            out[key] = draw(values)
    share = draw(st.sampled_from(["st3.keep", "st3.budget", None]))
    if share:
        out[share] = draw(st.integers(0 if share == "st3.keep" else 1, 64)) / 64
    return out


@seed(SEED)
@settings(
    max_examples=500,
    deadline=None,
    derandomize=False,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    n_layer=st.sampled_from(LAYERS),
    options=keys(),
    grids=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
)
def test_schedule(rt, random_gguf, n_layer: int, options: dict, grids: list[tuple[int, int]]) -> None:
    """Breaks if cuts, counts, the solved keep or the budget differ, or an impossible schedule is accepted."""
    path = random_gguf(shape(n_layer))
    given_keys = {k.removeprefix("st3."): v for k, v in options.items()}
    with Model(rt, path, options) as model:
        try:
            want = schedule.resolve(n_layer, **given_keys)
        except ValueError:
            assert model.check(), f"accepted {n_layer} layers, {options}"
            with pytest.raises(NativeError):
                Context(model, n_ctx=256)
            return
        assert model.check() is None
        with Context(model, n_ctx=256) as ctx:
            mean = schedule.mean_share(n_layer, want.cuts, want.keep, want.min_share)
            assert ctx.report()["budget"] == pytest.approx(mean, abs=1e-6)  # nothing asked yet
            pieces: list = [[1]]
            for nx, ny in grids:
                pieces.append(Image(np.ones((nx * ny, 32), np.float32), nx, ny))
            assert ctx.prefill([*pieces, [5, 6]]) == 0
            report = ctx.report()
    sizes = [nx * ny for nx, ny in grids]
    counts = [want.counts(n) for n in sizes]
    assert report["cuts"] == list(want.cuts)
    assert report["keep"] == pytest.approx(want.keep, abs=1e-6)
    assert report["min_keep"] == want.min_keep
    assert report["min_share"] == pytest.approx(want.min_share, abs=1e-6)
    if want.cuts:
        assert report["counts"] == [list(c) for c in zip(*counts, strict=True)]
    assert report["per_layer"] == want.per_layer(sizes)
    assert report["budget"] == pytest.approx(want.budget(sizes), abs=1e-6)
    assert report["given"] == sum(sizes)


def flops(s: Shape, rows: list[int], before: list[int], n_expert: int = 0, n_used: int = 0) -> int:
    """Multiplications and additions of rows[layer] rows that see each other and before[layer] cells, and of one row's
    logits: two for each element of a matrix that a row meets, and of a head's keys and values."""
    attention = s.n_embd * s.head * (2 * s.n_head + 2 * s.n_head_kv)
    ffn = s.n_embd * n_expert + 3 * s.n_embd * s.n_ff * (n_used or 1)
    out = 2 * s.n_embd * s.n_vocab
    for n, seen in zip(rows, before, strict=True):
        pairs = sum(seen + i + 1 for i in range(n))
        out += 2 * n * (attention + ffn) + 2 * pairs * s.n_head * 2 * s.head
    return out


@pytest.mark.parametrize("n_before", [0, 37])
@pytest.mark.parametrize("name", ["dense", "mixture of experts"])
def test_operations_of_a_prompt(rt, random_gguf, tmp_path, name: str, n_before: int) -> None:
    """Breaks if a matrix, an expert that is not asked, or a pair of query and key is counted otherwise."""
    family = mrope.FAMILIES["qwen3vlmoe"]
    dense = name == "dense"
    s = Shape(3, 128, 4, 2, 192, n_vocab=320) if dense else family.shape
    path = random_gguf(s) if dense else mrope.write(tmp_path / "moe.gguf", family, SEED)
    experts = {} if dense else {"n_expert": 4, "n_used": 2}
    with Model(rt, path) as model:
        for n in (1, 105):
            want = flops(s, [n] * s.n_layer, [n_before] * s.n_layer, **experts)
            assert rt.lib.st3_prefill_flops(model.ptr, n, n_before) == want


def test_costs(rt, random_gguf) -> None:
    """Breaks if KV bytes or flops are not those of the cells and rows that each layer really holds."""
    s = Shape(8, 128, 4, 2, 192, n_vocab=320)
    keys = {"st3.preset": "pvtp", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2}
    embd = np.random.default_rng(SEED).standard_normal((100, 128)).astype(np.float32)
    with Model(rt, random_gguf(s), keys) as model, Context(model, n_ctx=256) as ctx:
        assert ctx.prefill([[1, 5], Image(embd, 10, 10), [6, 7, 8]]) == 0
        report = ctx.report()
        assert [ctx.decode([5], 105 + i) for i in range(3)] == [0] * 3, "an answer is no part of a prompt"
        assert ctx.report()["flops"] == report["flops"]
        assert ctx.prefill([Image(embd[:36], 6, 6), [6, 7]], p0=108) == 0
        second = ctx.report()
    cell = 2 * 2 * s.head * s.n_head_kv  # K and V, two bytes
    rows = [n + 5 for n in report["per_layer"]]
    assert report["per_layer"] == [100, 100, 50, 50, 25, 25, 13, 13]
    assert report["kv_bytes"]["live"] == cell * sum(rows)
    assert report["kv_bytes"]["full"] == cell * 105 * s.n_layer
    assert report["kv_bytes"]["allocated"] >= report["kv_bytes"]["live"]
    assert report["flops"] == {
        "prefill": flops(s, rows, [0] * 8),
        "prefill_full": flops(s, [105] * 8, [0] * 8),
    }
    assert second["flops"] == {
        "prefill": flops(s, [38, 38, 20, 20, 11, 11, 7, 7], [n + 3 for n in rows]),
        "prefill_full": flops(s, [38] * 8, [108] * 8),
    }


def test_report_fits_its_buffer(rt, random_gguf) -> None:
    """Breaks if the report is written past `cap`, or its full length is not told."""
    import ctypes

    with Model(rt, random_gguf(shape(8)), {"st3.preset": "st3"}) as model, Context(model, n_ctx=64) as ctx:
        n = rt.lib.st3_report(ctx.ptr, 0, None, 0)
        for cap in (1, 2, 17, n, n + 1):
            raw = ctypes.create_string_buffer(b"\xff" * (n + 8), n + 8)
            assert rt.lib.st3_report(ctx.ptr, 0, raw, cap) == n
            text = raw.raw[:cap]
            assert text.index(b"\0") == min(n, cap - 1)
            assert raw.raw[cap:] == b"\xff" * (n + 8 - cap)
