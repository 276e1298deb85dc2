"""Saved states that must not be taken: of another schedule, or with one impossible field under a right checksum."""

from __future__ import annotations

import numpy as np
import pytest
import saved
from cases import SEED
from native_runtime import Context, Image, Model

from st3_edge.commands.bench.shapes import Shape

pytestmark = pytest.mark.no_device

SHAPE = Shape(3, 32, 1, 1, 32, n_vocab=272)
N = 9  # visual tokens
KEYS: dict[str, str | int | float] = {
    "st3.preset": "st3",
    "st3.keep": 0.5,
    "st3.start": 1,
    "st3.stride": 1,
    "st3.score": "text-mean",
    "st3.anneal": "linear",
    "st3.anneal_tokens": 8,
    "st3.anneal_score": "text-mean",
}


def state(ctx: Context) -> bytes:
    """Of a conversation with a picture that may be asked about again, and one generated token."""
    embd = np.random.default_rng([SEED, 70]).standard_normal((N, SHAPE.n_embd)).astype(np.float32)
    assert ctx.decode([1, 5], 0, "none") == 0
    assert ctx.picture(Image(embd, 3, 3), 2) == 0
    assert ctx.decode([6, 7, 8], 2 + N) == 0
    assert ctx.decode([9], 5 + N) == 0
    return ctx.save(0)


@pytest.fixture(scope="module")
def raw(rt, random_gguf) -> bytes:
    with Model(rt, random_gguf(SHAPE), KEYS) as model, Context(model, n_ctx=64) as ctx:
        return state(ctx)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "random"),
        ("keep", 0.55),
        ("start", 2),
        ("stride", 2),
        ("min_keep", 2),
        ("min_share", 0.1),
        ("coverage", 0.25),
        ("seed", 1),
        ("score", "text-max"),
        ("rank", "score"),
        ("merge", False),
        ("anneal", "cosine"),
        ("anneal_tokens", 9),
        ("anneal_floor", 0.4),
        ("anneal_interval", 2),
        ("anneal_score", "text-max"),
        ("anneal_score", "random"),
    ],
)
def test_a_state_of_another_schedule_is_refused(rt, random_gguf, raw, key: str, value: str | int | float) -> None:
    """Breaks if a key is left out of what tells schedules apart, so that a conversation goes on by another one."""
    with Model(rt, random_gguf(SHAPE), {**KEYS, f"st3.{key}": value}) as model, Context(model, n_ctx=64) as ctx:
        own = state(ctx)
        assert ctx.restore(raw, 0) == 0
        assert ctx.save(0) == own
        assert ctx.restore(own, 0) == len(own)


@pytest.mark.parametrize("more", [{}, {"st3.vision_type": "file"}], ids=str)
def test_a_state_of_the_same_schedule_is_taken(rt, random_gguf, raw, more: dict) -> None:
    """Breaks if all states are refused, or one for a key that is no part of a conversation."""
    with Model(rt, random_gguf(SHAPE), {**KEYS, **more}) as model, Context(model, n_ctx=64) as ctx:
        assert ctx.restore(raw, 0) == len(raw)
        assert ctx.save(0) == raw


BAD: list[tuple[str, list[tuple[float, ...]]]] = [
    ("shape layers", [(2,), (4,)]),
    ("shape stages", [(2,)]),
    ("shape K", [(0,), (8,)]),
    ("shape V", [(0,), (8,)]),
    ("shape cuts", [(1,)]),
    ("shape widths", [(64,)]),
    ("shape schedule", [(0,)]),
    ("sequence", [(-1,), (1,)]),
    ("images", [(0,), (2,), (2**32 - 1,)]),
    ("image 0 sequence", [(-1,), (1,)]),
    ("image 0 n", [(0,), (8,), (2**32 - 1,)]),
    ("image 0 nx", [(0,), (9,), (2**31,)]),
    ("image 0 ny", [(0,), (9,)]),
    ("image 0 flags", [(0,), (2,), (5,)]),
    ("image 0 records", [(0,)]),
    ("image 0 places", [(-2,), (2**30 + 1,), (2, -1), (2, 0, -1), (2, 2**30 + 1)]),
    ("image 0 counts", [(0,), (2,), (2**32 - 1,)]),
    ("image 0 n0", [(N + 1,), (9, 5, N + 1)]),
    ("image 0 stages of scores", [(1,), (4,)]),
    ("image 0 scores", [(np.nan,), (np.inf,)]),
    ("image 0 stages of weights", [(1,), (4,)]),
    ("image 0 weights", [(-1.0,), (N + 1.0,), (np.nan,), (np.inf,)]),
    ("prompts", [(0,), (2,)]),
    ("prompt 0 sequence", [(-1,), (1,)]),
    ("prompt 0 waits", [(2,)]),
    ("prompt 0 rows", [(0,), (13,), (2**32 - 1,)]),
    ("prompt 0 places", [(-1,), (1,), (2**30 + 1,)]),
    ("prompt 0 tokens", [(272,), (-1,), (-2,)]),
    ("prompt 0 floats", [(0,), (32,), (2**64 - 1,)]),
    ("prompt 0 images", [(0,), (2,)]),
    ("prompt 0 image 0", [(1,), (3,), (2, 0), (2, 8), (2, 9, 9), (2, 9, 3, 3, 2)]),
    ("stage 0 cells", [(0,), (1,), (2**32 - 1,)]),
    ("stage 0 cell 0 position", [(-1,), (2**30 + 1,)]),
    ("stage 1 cell 2 shift", [(1,), (-1,)]),
    ("stage 2 cell 0 owners", [(0,), (2,), (2**32 - 1,)]),
    ("stage 2 cell 0 sequences", [(-1,), (1,)]),
]


def test_one_impossible_field_under_a_right_checksum(rt, random_gguf, raw) -> None:
    """Breaks if any of the checks of a field is left out, or a state that is refused changes the conversation."""
    head, bytes_ = saved.take_apart(raw)
    body = saved.Body(bytes_)
    assert len(body.images) == 1 and len(body.images[0]["scores"]) == len(body.images[0]["weights"]) == 3
    with Model(rt, random_gguf(SHAPE), KEYS) as model, Context(model, n_ctx=64) as ctx:
        assert ctx.restore(saved.put_together(head, bytes_), 0) == len(raw)
        taken = []
        for name, bad in BAD:
            for values in bad:
                new = body.changed(name, *values)
                assert new != bytes_, f"{name} is {values}"
                if ctx.restore(saved.put_together(head, new), 0):
                    taken.append((name, values))
        assert not taken
        assert ctx.restore(saved.put_together(head, bytes_ + bytes(4)), 0) == 0, "something after its end"
        assert ctx.save(0) == raw
