"""The schedule arithmetic of docs/method.md.

Readings, where the method leaves room:
- `anneal_tokens`, `anneal_floor` and `anneal_interval` have one default each; presets differ in `anneal` alone.
- `anneal_score` falls back to the score that cuts use, so to `random` for the preset `random`; given explicitly it
  wins over the preset. Its terms are written as those of `score`.
- `exponential` with the floor 0 is refused; a floor of 0 is fine for the other curves.
- A first cut after the last layer is refused, but where `keep` or `budget` is 1: then there is one stage, and
  annealing alone.
- A random order belongs to an image by its number among the images of its sequence, and is the same at every cut and
  at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_SCORE = "text-mean"
RANKS = ("score", "distance")
CURVES = ("none", "linear", "cosine", "exponential")
PRESETS = ("off", "st3", "pvtp", "paper", "fastv", "pyramiddrop", "vtw", "random", "downsample")


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
    """A resolved schedule. `random` says that the bias is a permutation, and that there is no score.

    The `anneal_*` fields are of the steps after prefill: its own terms, and its own `random`.
    """

    n_layer: int
    cuts: tuple[int, ...]
    keep: float
    min_keep: int
    min_share: float
    terms: tuple[Term, ...]
    coverage: float = 0.0
    merge: bool = False
    distance: bool = False
    random: bool = False
    seed: int = 0
    anneal: str = "none"
    anneal_tokens: int = 64
    anneal_floor: float = 0.5
    anneal_interval: int = 1
    anneal_terms: tuple[Term, ...] = ()
    anneal_random: bool = False

    @property
    def record_terms(self) -> tuple[Term, ...]:
        """The terms that are recorded for the steps after prefill."""
        return () if self.anneal == "none" or self.anneal_random else self.anneal_terms

    def least(self, n: int) -> int:
        """What an image of n tokens keeps in any case, if it has it."""
        return max(self.min_keep, round_half_up(n * self.min_share))

    def counts(self, n: int) -> list[int]:
        """How many of an image's n tokens are left after each cut."""
        out, m = [], n
        for _ in self.cuts:
            m = min(m, max(self.least(n), round_half_up(m * self.keep)))
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

    def bias(self, nx: int, ny: int, kept: int, number: int = 0, random: bool | None = None) -> np.ndarray:
        """Bias where `kept` tokens of the nx x ny image of that number stay: coverage, and the order if random.

        `random` says whether the score is a random order; None: as at the cuts.
        """
        by_chance = self.random if random is None else random
        out = random_order(self.seed, number, nx * ny) if by_chance else np.zeros(nx * ny)
        out[list(spread_order(nx, ny)[: round_half_up(self.coverage * kept)])] += 1.0
        return out

    def share(self, t: int) -> float:
        """a(t): the share of its tokens that a stage keeps after t generated tokens."""
        x, floor = min(t / self.anneal_tokens, 1.0), self.anneal_floor
        if self.anneal == "linear":
            return 1 - (1 - floor) * x
        if self.anneal == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2
        if self.anneal == "exponential":
            return floor**x
        return 1.0

    def target(self, n: int, n0: int, t: int) -> int:
        """How many of the n0 tokens of an image of n that a stage held after prefill it may hold at t."""
        return min(n0, max(self.least(n), round_half_up(n0 * self.share(t))))

    def target_before(self, n: int, n0: int, t: int) -> int | None:
        """The target at the start of the decode of generated token t (1, 2, ...); None where nothing is due."""
        if self.anneal == "none" or (t - 1) % self.anneal_interval:
            return None
        return self.target(n, n0, t + self.anneal_interval - 1)


def cut_layers(n_layer: int, start: int, stride: int) -> tuple[int, ...]:
    """Layers (from 0) after which tokens are dropped: a layer always follows."""
    return tuple(range(start - 1, n_layer - 1, stride))


def mean_share(n_layer: int, cuts: tuple[int, ...], keep: float, least: float = 0.0) -> float:
    """Mean share of tokens over layers, without rounding, where no cut goes below the share `least`."""
    return sum(max(keep**k, min(least, 1.0)) for k in (sum(c < i for c in cuts) for i in range(n_layer))) / n_layer


def solve_keep(n_layer: int, cuts: tuple[int, ...], budget: float, least: float = 0.0) -> float:
    """The share that a cut keeps so that the mean over layers is the budget. Raises ValueError."""
    if budget >= 1:
        return 1.0
    if not cuts or budget < mean_share(n_layer, cuts, 0.0, least):
        raise ValueError(f"no schedule with cuts after {cuts} of {n_layer} layers has the budget {budget}")
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if mean_share(n_layer, cuts, middle, least) < budget:
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
    min_share: float | None = None,
    score: str | None = None,
    coverage: float | None = None,
    merge: bool | None = None,
    rank: str | None = None,
    seed: int = 0,
    anneal: str | None = None,
    anneal_tokens: int = 64,
    anneal_floor: float = 0.5,
    anneal_interval: int = 1,
    anneal_score: str | None = None,
) -> Schedule:
    """A preset with any of its keys given otherwise. Raises ValueError where native code must refuse."""
    if preset not in PRESETS or preset == "off":
        raise ValueError(f"no schedule for preset {preset!r}")
    if budget is not None and keep is not None:
        raise ValueError("budget and keep exclude each other")
    quarter = max(1, n_layer // 4)
    d_start, d_stride, d_keep, d_min, sure, d_score, d_coverage = {
        "paper": (3, 1, None, 1, False, "last-mean", 0.0),
        "fastv": (3, n_layer, 0.5, 1, False, "last-mean", 0.0),
        "pyramiddrop": (quarter, quarter, 0.5, 1, False, "last-mean", 0.0),
        "vtw": (max(1, n_layer // 2), n_layer, 0.0, 0, False, "last-mean", 0.0),
        "downsample": (1, n_layer, None, 1, True, DEFAULT_SCORE, 1.0),
    }.get(preset, (1, n_layer, None, 1, True, DEFAULT_SCORE, 0.0))
    if keep is None and budget is None:
        keep, budget = d_keep, 0.50 if d_keep is None else None
    if budget is not None:
        if not 0 < budget <= 1:
            raise ValueError(f"budget {budget} out of range")
        d_start = min(d_start, max(1, int(n_layer * budget / 2)))
    start = d_start if start is None else start
    stride = d_stride if stride is None else stride
    coverage = d_coverage if coverage is None else coverage
    if not 1 <= start <= n_layer or stride < 1 or not 0 <= coverage <= 1:
        raise ValueError(f"start {start}, stride {stride} or coverage {coverage} out of range")
    cuts = cut_layers(n_layer, start, stride)
    if not cuts and 1.0 not in (keep, budget):
        raise ValueError(f"no layer follows a cut after layer {start - 1}")
    if min_share is None:
        after, min_share = n_layer - start, 0.0
        if sure and budget is not None and len(cuts) > 1:
            mean = max(0.0, budget * n_layer - start) / after
            min_share = max(mean / 2, min(0.03, 0.75 * mean))
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share {min_share} out of range")
    if budget is not None:
        keep = solve_keep(n_layer, cuts, budget, min_share)
    assert keep is not None
    if not 0 <= keep <= 1:
        raise ValueError(f"keep {keep} out of range")
    anneal = ("linear" if preset in ("st3", "paper") else "none") if anneal is None else anneal
    rank = ("distance" if preset in ("st3", "pvtp") else "score") if rank is None else rank
    if rank not in RANKS:
        raise ValueError(f"unknown rank {rank!r}")
    if anneal not in CURVES:
        raise ValueError(f"unknown curve {anneal!r}")
    if anneal_tokens < 1 or anneal_interval < 1 or not 0 <= anneal_floor <= 1:
        raise ValueError(f"{anneal_tokens} tokens, interval {anneal_interval} or floor {anneal_floor} out of range")
    if anneal == "exponential" and anneal_floor == 0:
        raise ValueError("an exponential curve never reaches 0")
    terms = Term.parse(d_score if score is None else score)
    if anneal_score is None:
        anneal_terms, anneal_random = terms, preset == "random"
    else:
        anneal_random = anneal_score == "random"
        anneal_terms = () if anneal_random else Term.parse(anneal_score)
    return Schedule(
        n_layer,
        cuts,
        keep,
        d_min if min_keep is None else min_keep,
        min_share,
        terms,
        coverage,
        preset in ("st3", "pvtp") if merge is None else merge,
        rank == "distance",
        preset == "random",
        seed,
        anneal,
        anneal_tokens,
        anneal_floor,
        anneal_interval,
        anneal_terms,
        anneal_random,
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


@lru_cache(maxsize=64)
def _random_order(seed: int, number: int, n: int) -> tuple[float, ...]:
    draw = np.random.MT19937()
    draw._legacy_seeding((seed + 0x9E3779B9 * (number + 1)) % 2**32)
    order = list(range(n))
    for i in range(n, 1, -1):
        j = int(draw.random_raw()) % i
        order[i - 1], order[j] = order[j], order[i - 1]
    rank = np.empty(n)
    rank[order] = np.arange(n) / n
    return tuple(rank)


def random_order(seed: int, number: int, n: int) -> np.ndarray:
    """Ranks in [0, 1) of an image's n tokens: Fisher and Yates's shuffle from the end, drawn by a Mersenne Twister."""
    return np.array(_random_order(seed, number, n))


def best(rank: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest ranks in ascending order; ties go to the lower index."""
    return np.sort(np.argsort(-rank, kind="stable")[:n])
