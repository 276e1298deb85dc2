"""The schedule arithmetic of DESIGN.md, "The method"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PRESETS = ("off", "st3", "pvtp", "fastv", "pyramiddrop", "vtw", "random", "downsample")


def round_half_up(x: float) -> int:
    """The rounding rule of every count."""
    return math.floor(x + 0.5)


@dataclass(frozen=True)
class Term:
    """One way to score: queries `last` or `text`, reduction `mean` or `max`, summed over layers or not."""

    queries: str
    reduce: str
    summed: bool

    @staticmethod
    def parse(text: str) -> tuple[Term, ...]:
        """Terms of an expression such as `last-mean-sum+text-max`. Raises ValueError."""
        out = []
        for part in text.split("+"):
            words = part.split("-")
            known = len(words) in (2, 3) and words[0] in ("last", "text") and words[1] in ("mean", "max")
            if not known or words[2:] not in ([], ["sum"]):
                raise ValueError(f"unknown score {part!r}")
            out.append(Term(words[0], words[1], len(words) == 3))
        return tuple(out)


@dataclass(frozen=True)
class Schedule:
    """A resolved schedule. `weight` is w of `w * score + bias`; `random` says that the bias is a hash."""

    n_layer: int
    cuts: tuple[int, ...]
    keep: float
    min_keep: int
    terms: tuple[Term, ...]
    coverage: float = 0.0
    weight: int = 1
    random: bool = False

    def counts(self, n: int) -> list[int]:
        """How many of an image's n tokens are left after each cut."""
        out, m = [], n
        for _ in self.cuts:
            m = min(m, max(self.min_keep, round_half_up(m * self.keep)))
            out.append(m)
        return out

    def per_layer(self, sizes: list[int]) -> list[int]:
        """Visual tokens that each layer holds after prefill, over images of these sizes."""
        after = [self.counts(n) for n in sizes]
        out = []
        for layer in range(self.n_layer):
            passed = sum(cut < layer for cut in self.cuts)
            out.append(sum(c[passed - 1] if passed else n for c, n in zip(after, sizes, strict=True)))
        return out

    def budget(self, sizes: list[int]) -> float:
        """Mean over layers of kept / given, for the real counts."""
        return sum(self.per_layer(sizes)) / (self.n_layer * sum(sizes))

    def bias(self, nx: int, ny: int, kept: int) -> np.ndarray:
        """Coverage as a bias at a cut that leaves `kept` tokens of an nx x ny image."""
        out = np.zeros(nx * ny)
        out[list(spread_order(nx, ny)[: round_half_up(self.coverage * kept)])] = 1.0
        return out


def cut_layers(n_layer: int, start: int, stride: int) -> tuple[int, ...]:
    """Layers (from 0) after which tokens are dropped: a layer always follows."""
    return tuple(range(start - 1, n_layer - 1, stride))


def real_budget(n_layer: int, cuts: tuple[int, ...], keep: float) -> float:
    """Mean share of tokens over layers, without rounding."""
    return sum(keep ** sum(c < layer for c in cuts) for layer in range(n_layer)) / n_layer


def solve_keep(n_layer: int, cuts: tuple[int, ...], budget: float) -> float:
    """The share that a cut keeps so that the mean over layers is the budget. Raises ValueError."""
    if budget >= 1:
        return 1.0
    if not cuts or budget < real_budget(n_layer, cuts, 0.0):
        raise ValueError(f"no schedule with cuts after {cuts} of {n_layer} layers has the budget {budget}")
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if real_budget(n_layer, cuts, middle) < budget:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def resolve(
    n_layer: int,
    preset: str = "st3",
    budget: float | None = None,
    start: int | None = None,
    stride: int | None = None,
    keep: float | None = None,
    min_keep: int | None = None,
    score: str | None = None,
    coverage: float | None = None,
) -> Schedule:
    """A preset with any of its keys given otherwise. Raises ValueError where native code must refuse."""
    if preset not in PRESETS or preset == "off":
        raise ValueError(f"no schedule for preset {preset!r}")
    if budget is not None and keep is not None:
        raise ValueError("budget and keep exclude each other")
    eighth, quarter = max(1, n_layer // 8), max(1, n_layer // 4)
    d_start, d_stride, d_keep, d_min, d_score, d_coverage = {
        "fastv": (3, n_layer, 0.5, 1, "last-mean", 0.0),
        "pyramiddrop": (quarter, quarter, 0.5, 1, "last-mean", 0.0),
        "vtw": (max(1, n_layer // 2), n_layer, 0.0, 0, "last-mean", 0.0),
        "downsample": (eighth, eighth, None, 1, "last-mean", 1.0),
    }.get(preset, (eighth, eighth, None, 1, "last-mean", 0.0))
    start = d_start if start is None else start
    stride = d_stride if stride is None else stride
    coverage = d_coverage if coverage is None else coverage
    if not 1 <= start < n_layer or stride < 1 or not 0 <= coverage <= 1:
        raise ValueError(f"start {start}, stride {stride} or coverage {coverage} out of range")
    cuts = cut_layers(n_layer, start, stride)
    if keep is None and budget is None and d_keep is not None:
        keep = d_keep
    if keep is None:
        budget = 0.30 if budget is None else budget
        if not 0 < budget <= 1:
            raise ValueError(f"budget {budget} out of range")
        keep = solve_keep(n_layer, cuts, budget)
    elif not 0 <= keep <= 1:
        raise ValueError(f"keep {keep} out of range")
    return Schedule(
        n_layer,
        cuts,
        keep,
        d_min if min_keep is None else min_keep,
        Term.parse(d_score if score is None else score),
        coverage,
        0 if preset == "random" else 1,
        preset == "random",
    )


@lru_cache(maxsize=64)
def spread_order(nx: int, ny: int) -> tuple[int, ...]:
    """Farthest-point order of a patch grid, from the patch nearest its middle on; ties to the lower index."""
    y, x = np.divmod(np.arange(nx * ny), nx)
    order = [int(np.argmin((2 * x - (nx - 1)) ** 2 + (2 * y - (ny - 1)) ** 2))]
    far = np.full(nx * ny, np.iinfo(np.int64).max)
    for _ in range(nx * ny - 1):
        last = order[-1]
        far = np.minimum(far, (x - x[last]) ** 2 + (y - y[last]) ** 2)
        order.append(int(np.argmax(far)))
    return tuple(order)


def best(rank: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest ranks in ascending order; ties go to the lower index."""
    return np.sort(np.argsort(-rank, kind="stable")[:n])
