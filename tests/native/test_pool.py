"""The CPU backend's threads: they wait asleep, wake every time, and end with their context (vendor/fixes/0002)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Model

SHAPE = cases.SHAPES["mha-32"]
CPUS = os.cpu_count() or 1
STEPS = 40
PATIENCE_S = 240  # seconds suffice; a thread that is not woken waits for ever


@pytest.fixture(scope="module")
def model(rt, random_gguf) -> Iterator[Model]:
    with Model(rt, random_gguf(SHAPE)) as m:
        yield m


def logits(ctx: Context) -> np.ndarray:
    """Of a prompt and a number of decode steps, float32 [1 + STEPS][n_vocab]. Attention splits its work by threads from
    512 positions on, so fewer are bit-identical for any number of threads."""
    words = [int(t) for t in np.random.default_rng(SEED).integers(3, SHAPE.n_vocab, 100 + STEPS)]
    ctx.clear()
    assert ctx.decode(words[:100], 0) == 0
    rows = [ctx.logits()]
    for at in range(100, 100 + STEPS):
        assert ctx.decode(words[at : at + 1], at) == 0
        rows.append(ctx.logits())
    return np.stack(rows)


def in_time(call: Callable[[], object]) -> None:
    done = threading.Thread(target=call, daemon=True)
    done.start()
    done.join(PATIENCE_S)
    assert not done.is_alive(), "a thread was not woken"


@pytest.mark.parametrize("threads", [2, 4 * CPUS])
def test_threads_without_a_cpu_each_compute_the_same(model: Model, threads: int) -> None:
    """Breaks if a barrier let a thread pass too early (other bits), or forgot one that sleeps (no end)."""
    with Context(model, n_ctx=256) as one, Context(model, n_ctx=256, threads=threads) as many:
        want = logits(one)
        found: list[np.ndarray] = []
        in_time(lambda: found.append(logits(many)))
        assert np.array_equal(found[0], want)


def test_two_contexts_compute_at_the_same_time(model: Model) -> None:
    """Breaks if contexts shared a pool, which serves one graph at a time."""
    with Context(model, n_ctx=256, threads=2) as a, Context(model, n_ctx=256, threads=2) as b:
        want = logits(a)
        found: list[np.ndarray] = []
        both = [threading.Thread(target=lambda c=c: found.append(logits(c)), daemon=True) for c in (a, b)]

        def run() -> None:
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()

        in_time(run)
        assert all(np.array_equal(rows, want) for rows in found) and len(found) == 2


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_threads_stay_between_graphs_and_end_with_the_context(model: Model) -> None:
    """Breaks if every graph made threads anew, or a closed context left any."""

    def threads() -> set[str]:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    before = threads()
    with Context(model, n_ctx=256, threads=3) as ctx:
        logits(ctx)
        during = threads() - before
        logits(ctx)
        assert threads() - before == during and (cases.ON_DEVICE or len(during) == 2)  # the device has threads, too
    assert not threads() & during


@pytest.mark.skipif(not hasattr(os, "fork") or cases.ON_DEVICE, reason="no fork, or a device that does not survive it")
def test_a_forked_child_computes_on(model: Model) -> None:
    """Breaks if the child waited for its parent's threads, which it does not have."""
    with Context(model, n_ctx=256, threads=2) as ctx:
        want = logits(ctx)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE_S)
            same = np.array_equal(logits(ctx), want)
            ctx.close()
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(logits(ctx), want)
