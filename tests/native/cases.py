"""Random cases of pruned prefill, the same on every machine."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import numpy as np
import pytest
from oracle import schedule
from oracle.llama import Image, Piece

from st3_edge.commands.bench.shapes import Shape

SEED = 20241220
ON_DEVICE = bool(os.environ.get("ST3_TEST_DEVICE"))
SANITIZED = hasattr(ctypes.CDLL(None), "__asan_init")  # scripts/sanitize.sh; assert() is on there
can_abort = pytest.mark.skipif(ON_DEVICE, reason="only the CPU backend asks whether to stop within a graph")
SHAPES = {
    "mha-32": Shape(6, 128, 4, 4, 192, n_vocab=320),
    "gqa-32": Shape(8, 128, 4, 2, 192, n_vocab=320, tied=True),
    "mha-64": Shape(8, 128, 2, 2, 192, n_vocab=320),
    "mqa-64": Shape(5, 256, 4, 1, 256, n_vocab=320, rope_base=1e6),
    "gqa-128": Shape(4, 512, 4, 2, 256, n_vocab=320),
}
SCORES = (
    "last-mean",
    "last-max",
    "last-mean-sum",
    "last-max-sum",
    "text-mean",
    "text-max",
    "text-mean-sum",
    "text-max-sum",
    "last-mean-sum+text-max",
    "last-max+text-mean-sum",
    "text-max-sum+last-mean+text-mean",
)


@dataclass(frozen=True)
class Case:
    """A model, a cache type, `st3.*` keys and a prompt."""

    number: int
    model: str
    kv: str
    keys: dict[str, str | int | float]
    pieces: list[Piece]

    @property
    def schedule(self) -> schedule.Schedule:
        """The schedule as the oracle resolves it."""
        return schedule.resolve(SHAPES[self.model].n_layer, **{k.removeprefix("st3."): v for k, v in self.keys.items()})

    @property
    def length(self) -> int:
        """Prompt positions."""
        return sum(len(p.embd) if isinstance(p, Image) else len(p) for p in self.pieces)


def prompt(rng: np.random.Generator, shape: Shape, n_images: int, n_text: int) -> list[Piece]:
    """Images between text runs (some of which are missing), and n_text tokens at the end."""

    def words(n: int) -> list[int]:
        return [int(t) for t in rng.integers(3, shape.n_vocab, n)]

    pieces: list[Piece] = [[1, *words(int(rng.integers(0, 6)))]] if rng.random() < 0.8 else []
    for i in range(n_images):
        nx, ny = (int(x) for x in rng.integers(5, 11, 2))
        embd = rng.standard_normal((nx * ny, shape.n_embd)).astype(np.float32)
        pieces.append(Image(embd, 0, 0) if rng.random() < 0.1 else Image(embd, nx, ny))
        if i < n_images - 1 and rng.random() < 0.7:
            pieces.append(words(int(rng.integers(1, 5))))
    return [*pieces, words(n_text)]


def make(number: int, seed: int) -> Case:
    """Case `number`: models, caches and score expressions take turns, the rest is drawn."""
    rng = np.random.default_rng([seed, number])
    model = list(SHAPES)[number % len(SHAPES)]
    shape = SHAPES[model]
    keys: dict[str, str | int | float] = {"st3.score": SCORES[number % len(SCORES)]}
    draw = rng.random()
    if draw < 0.1:
        keys["st3.preset"] = "pyramiddrop"
    elif draw < 0.2:
        keys["st3.preset"] = "fastv"
        keys["st3.start"] = int(rng.integers(1, shape.n_layer - 1))
    elif draw < 0.25:
        keys["st3.preset"] = "vtw"
    elif draw < 0.3:
        keys["st3.preset"] = "downsample"
        keys["st3.budget"] = 0.3
    else:
        keys["st3.preset"] = "st3"
        keys["st3.start"] = start = int(rng.integers(1, max(2, shape.n_layer // 2)))
        keys["st3.stride"] = stride = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            # exact in binary, so that no language rounds a half the other way
            keys["st3.keep"] = float(rng.integers(8, 60)) / 64
        else:
            keys["st3.min_share"] = least = float(rng.choice([0.0, 0.05, 0.2]))
            cuts = schedule.cut_layers(shape.n_layer, start, stride)
            lowest = schedule.mean_share(shape.n_layer, cuts, 0.0, least)
            keys["st3.budget"] = round(float(rng.uniform(lowest + 0.02, 0.95)), 3)
        keys["st3.coverage"] = float(rng.choice([0.0, 0.0, 0.25, 0.5, 1.0]))
        keys["st3.min_keep"] = int(rng.integers(0, 6))
    if keys["st3.preset"] != "st3" or rng.random() < 0.25:
        keys["st3.merge"] = bool(rng.random() < 0.5)
    keys["st3.rank"] = str(rng.choice(["score", "distance"]))
    n_text = int(rng.integers(1, 12)) if rng.random() < 0.25 else int(rng.integers(66, 90))
    kv = "Q8_0" if number % 3 == 2 else "F16"
    return Case(number, model, kv, keys, prompt(rng, shape, 1 + number // 2 % 3, n_text))


def make_annealed(number: int, seed: int) -> Case:
    """Case `number` of annealing: models, caches, curves and numbers of images take turns, the rest is drawn.

    A third of the cases anneals without pruning. No target is near a half, where languages may round differently.
    """
    rng = np.random.default_rng([seed, 2, number])
    model = list(SHAPES)[number % len(SHAPES)]
    shape = SHAPES[model]
    keys: dict[str, str | int | float] = {
        "st3.preset": "random" if rng.random() < 0.1 else "st3",
        "st3.start": int(rng.integers(1, max(2, shape.n_layer // 2))),
        "st3.stride": int(rng.choice([1, 1, 2, 3, shape.n_layer])),
        "st3.keep": 1.0 if number % 3 == 0 else float(rng.integers(16, 60)) / 64,
        "st3.score": SCORES[number % len(SCORES)],
        "st3.coverage": float(rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, 1.0])),
        "st3.min_keep": int(rng.integers(0, 6)),
        "st3.min_share": float(rng.choice([0.0, 0.0, 0.11])),
        "st3.seed": int(rng.integers(0, 2**32)),
        "st3.anneal": ("linear", "cosine", "exponential", "linear", "cosine", "exponential", "none")[number % 7],
        "st3.anneal_tokens": int(rng.integers(1, 40)),
        "st3.anneal_floor": float(rng.uniform(0.02, 0.8)) if rng.random() < 0.85 else 1.0,
        "st3.anneal_interval": int(rng.choice([1, 1, 1, 2, 3, 5])),
    }
    if rng.random() < 0.25:
        keys["st3.merge"] = bool(rng.random() < 0.5)
    keys["st3.rank"] = str(rng.choice(["score", "score", "distance"]))
    if keys["st3.anneal"] == "linear" and rng.random() < 0.2:
        keys["st3.anneal_floor"] = 0.0
    if rng.random() < 0.5:
        keys["st3.anneal_score"] = str(rng.choice([*SCORES, "random", "random"]))
    kv = "Q8_0" if number // 2 % 3 == 2 else "F16"
    n_text = int(rng.integers(1, 12)) if rng.random() < 0.4 else int(rng.integers(66, 90))
    return Case(number, model, kv, keys, prompt(rng, shape, (1, 3)[number // 3 % 2], n_text))
