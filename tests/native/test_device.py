"""What a device is asked to do, shown on one that counts: a GPU to ggml, which computes by the CPU backend.

It shows waits, copies and where ops run, and, with CUDA's or Metal's kernels on emulated lanes for ATTN_SPAN, that the
runtime asks them for what they can do. Where there is a HIP compiler, the same is shown of ggml-cuda's own host code.
It does not show speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import cases
import numpy as np
import pytest
from emulator import build
from native_runtime import lib_dir
from oracle import llama as oracle

from st3_edge.config import KV_TYPES

pytestmark = pytest.mark.no_device

HERE = Path(__file__).resolve().parent
SHAPE = cases.SHAPES["mha-64"]  # CUDA has no flash attention for smaller heads
STEPS = 24
PRUNED = {"st3.preset": "pvtp", "st3.budget": 0.5, "st3.start": 2, "st3.stride": 2}
ANNEALED = {**PRUNED, "st3.preset": "st3", "st3.anneal_tokens": 16, "st3.anneal_interval": 4}
CASES: dict[str, tuple[dict, str]] = {  # keys, type of the KV cache
    "pruned": (PRUNED, "F16"),
    "annealed": (ANNEALED, "F16"),
    "quantized": (ANNEALED, "Q8_0"),
    "sums": ({**ANNEALED, "st3.score": "last-mean-sum+text-max"}, "F16"),
}
ALL = 99
NO_KERNEL, NO_COPY = "ATTN_SPAN", "CONT"
HIP = "hip"


@pytest.fixture(scope="module")
def run(
    upstream: Path, tmp_path_factory: pytest.TempPathFactory, random_gguf: Callable[..., Path]
) -> Callable[..., dict]:
    """Runs device_probe, once for each set of arguments: keys, KV type, layers there, refused ops, whose kernels."""
    done: dict[tuple, dict] = {}

    @cache
    def device(kernels: str | None) -> Path:
        out = tmp_path_factory.mktemp("device")
        if kernels != HIP:
            return build.device(upstream, out, lib_dir(), kernels)
        if not build.hip_compiler():
            pytest.skip("no hipcc, no $HIPCXX")
        return build.hip_device(upstream, out, lib_dir())

    def probe(keys: dict, kv: str, layers: int = ALL, refused: str = "", kernels: str | None = None) -> dict:
        key = json.dumps(keys), kv, layers, refused, kernels
        if key not in done:
            what = [lib_dir(), random_gguf(SHAPE), key[0], kv, str(STEPS)]
            where = [device(kernels), refused, str(layers)] if layers else []
            made = subprocess.run(
                [sys.executable, HERE / "device_probe.py", *what, *where],
                env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "scripts")},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert made.returncode == 0, made.stderr[-3000:]
            done[key] = json.loads(made.stdout)
        return done[key]

    return probe


def removals(run: dict) -> list[bool]:
    """Whether visual tokens left in each step: then a layer did not gain the step's token, or lost more."""
    rows = [run["prefill"], *run["steps"]]
    return [any(b < a + 1 for a, b in zip(x["held"], y["held"], strict=True)) for x, y in pairwise(rows)]


@pytest.mark.parametrize("refused", ["", NO_KERNEL, NO_COPY])
@pytest.mark.parametrize("layers", [ALL, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_device_chooses_as_the_cpu(run, name: str, layers: int, refused: str) -> None:
    """Breaks if a copy between host and device goes to the wrong place, or comes too late."""
    on_cpu, on_device = run(*CASES[name], layers=0), run(*CASES[name], layers, refused)
    assert on_device["mode"] == on_cpu["mode"] == "pruned-prefill"
    assert on_device["kept"] == on_cpu["kept"]
    assert on_device["positions"] == on_cpu["positions"]
    for what in ("logits", "unread"):  # cells lie in another order
        assert oracle.nmse(np.array(on_device[what]), np.array(on_cpu[what])) < 1e-6


def test_who_has_a_kernel_is_told(run) -> None:
    """Breaks if the user is told of a kernel that is not there, or not told of one that is."""
    every = list(KV_TYPES)
    for refused, kernels, there in ("", None, every), (NO_KERNEL, None, []), ("", "cuda", every), ("", "metal", every):
        assert run(*CASES["pruned"], refused=refused, kernels=kernels)["devices"] == {"Counting0": there, "CPU": every}


@pytest.mark.parametrize("kernels", [*build.BACKENDS, HIP])
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_asked_for_what_they_can_do(run, name: str, kernels: str) -> None:
    """Breaks if tensors are not laid out as kernels read them, scratch memory is too small, or an op is not CUDA's."""
    on_cpu, there = run(*CASES[name], layers=0), run(*CASES[name], kernels=kernels)
    assert there["kept"] == on_cpu["kept"]
    assert there["positions"] == on_cpu["positions"]
    assert oracle.nmse(np.array(there["logits"]), np.array(on_cpu["logits"])) < 1e-6
    assert all(row["graphs"] == 1 for row in (there["prefill"], *there["steps"]))


@pytest.mark.parametrize(("refused", "kernels"), [("", None), (NO_KERNEL, None), ("", HIP)])
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_no_more_often_than_stock(run, name: str, refused: str, kernels: str | None) -> None:
    """Breaks if the host has to wait for ST3's sake, or the graph is split, but for one wait where tokens leave.

    The first step is left out: its graph is not the prompt's, and is allocated.
    """
    keys, kv = CASES[name]
    stock, ours = run({}, kv, kernels=kernels), run(keys, kv, refused=refused, kernels=kernels)
    assert {step["graphs"] for step in stock["steps"] + ours["steps"]} == {1}
    waits = {step["waits"] for step in stock["steps"]}
    assert len(waits) == 1
    more = [step["waits"] - max(waits) for step in ours["steps"]]
    leave = removals(ours)
    assert any(leave[1:]) == (keys["st3.preset"] == "st3")
    assert not all(leave)
    assert all(n <= gone for n, gone in zip(more[1:], leave[1:], strict=True)), (more, leave)


@pytest.mark.parametrize("name", CASES)
def test_decoding_replays_a_captured_graph(run, name: str) -> None:
    """Breaks if something of a step keeps ggml-cuda from replaying the last one's graph, where tokens leave too."""
    keys, kv = CASES[name]
    stock, ours = run({}, kv, kernels=HIP), run(keys, kv, kernels=HIP)
    phases = 2 if keys["st3.preset"] == "st3" else 1  # once all tokens left that will, scores are not recorded any more
    for told, captures in ((stock, 1), (ours, phases)):
        replayed = [step for step in told["steps"] if step["replays"] == 1 and step["kernels"] == step["captures"] == 0]
        assert sum(step["captures"] for step in told["steps"]) == captures
        assert len(replayed) == STEPS - 2 * captures


@pytest.mark.parametrize("refused", ["", NO_KERNEL, NO_COPY])
@pytest.mark.parametrize("name", CASES)
def test_little_leaves_the_device(run, name: str, refused: str) -> None:
    """Breaks if keys, or the attention of every head, come to the host: logits, scores, and indices do, and once, when
    tokens leave for the first time, values of a layer of each stage."""
    ours = run(*CASES[name], refused=refused)
    logits, visual, stages, kinds = 4 * SHAPE.n_vocab, 100 + 81, 4, 3
    once = 0 if name == "pruned" else stages * visual * 2 * SHAPE.n_head_kv * SHAPE.head
    for row, values in zip((ours["prefill"], *ours["steps"]), [0, once, *[0] * (STEPS - 1)], strict=True):
        assert row["graphs"] == 1
        assert logits <= row["bytes_out"] <= logits + 4 * stages * kinds * (visual + 64) + values, row


@pytest.mark.parametrize("name", CASES)
def test_the_size_of_a_state_is_asked_of_nobody(run, name: str) -> None:
    """Breaks if keys come to the host to be counted, or more often than once to be saved."""
    ours = run(*CASES[name])
    assert ours["size"]["bytes_out"] == 0
    assert ours["size"]["waits"] <= 1  # for what was computed
    assert ours["size"]["bytes"] == ours["save"]["bytes"]
    assert 0.5 * ours["save"]["bytes"] < ours["save"]["bytes_out"] < ours["save"]["bytes"]
