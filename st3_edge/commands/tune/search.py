"""The search for a schedule: which start, stride and budget are tried, in which order, and what came out of it.

Nothing here runs a model: what a schedule costs, and how far its answers are from the full model's, is asked of a
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

# Budgets are multiples of a fiftieth: finer steps than that are lost in what a few dozen prompts can tell.
STEPS = 50
# The first shape's, measured in full: the curve that a person chooses a limit by.
_LADDER = (40, 30, 20, 10)


class Shape(NamedTuple):
    """Where the cuts are: after layer start - 1, and every `stride` layers after that."""

    start: int
    stride: int


class Candidate(NamedTuple):
    """A schedule to try; budget: mean over layers of visual tokens kept / given."""

    start: int
    stride: int
    budget: float


class Result(Protocol):
    """What is known of a candidate. kl: mean KL from the full model over the prompts that were run, nats per token;
    cost: relative to the full model's; complete: whether all prompts were run."""

    @property
    def kl(self) -> float: ...

    @property
    def cost(self) -> float: ...

    @property
    def complete(self) -> bool: ...


R = TypeVar("R", bound=Result)


def default_starts(n_layer: int) -> list[int]:
    """From the first layer to three eighths of them: with a later start even the smallest budget is large."""
    return _fractions(n_layer, (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8))


def default_strides(n_layer: int) -> list[int]:
    """From a thirty-second of the layers to one cut alone."""
    return _fractions(n_layer, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1))


def _fractions(n_layer: int, shares: Iterable[float]) -> list[int]:
    return sorted({max(1, int(n_layer * share)) for share in shares})


def shapes(starts: Iterable[int], strides: Iterable[int], n_layer: int) -> list[Shape]:
    """All of them that cut between layers, the one nearest to one cut after the first layer, which is the
    preset st3's, first. `starts` and `strides` are at least 1."""

    def distance(shape: Shape) -> tuple[float, Shape]:
        return math.log2(shape.start) + math.log2(n_layer / shape.stride), shape

    # A stride beyond the last layer is one cut, as that of all layers is.
    every = {Shape(start, min(stride, n_layer)) for start in starts for stride in strides if start < n_layer}
    return sorted(every, key=distance)


def search(
    shapes: Sequence[Shape],
    n_layer: int,
    limit: float,
    evaluate: Callable[[Candidate, float | None], Result],
    min_share: float = 0.0,
) -> None:
    """Tries candidates, to find the cheapest whose KL is at most `limit`. `best` and `frontier` pick from the results.

    `evaluate(candidate, limit)` may stop early once the candidate is certain to be over the limit; None: it must not.
    No candidate is asked for twice.

    The first shape is measured at a ladder of budgets, and then between the two that the limit lies between. What any
    shape costs depends on its budget nearly alone, so each other shape is asked once whether it does with a step less
    than the best so far, and only if it does, for how much less. KL is taken to fall as the budget grows: where it
    does not, a cheaper schedule may be missed, and nothing else goes wrong. `min_share`: of the visual tokens, stays in
    every layer.
    """
    known: dict[tuple[Shape, int], bool] = {}

    def holds(shape: Shape, step: int, stop_at: float | None = limit) -> bool:
        if (shape, step) not in known:
            result = evaluate(Candidate(*shape, round(step / STEPS, 2)), stop_at)
            known[shape, step] = result.complete and result.kl <= limit
        return known[shape, step]

    def smallest(shape: Shape, over: int, under: int) -> int:
        """The smallest step that holds, between one that does not and one that does."""
        while under - over > 1:
            middle = (over + under) // 2
            over, under = (over, middle) if holds(shape, middle) else (middle, under)
        return under

    smallest_yet = STEPS  # nothing dropped
    for shape in shapes:
        least = least_step(shape, n_layer, min_share)
        if shape == shapes[0]:
            ladder = [step for step in _LADDER if step >= least]
            under = min([step for step in ladder if holds(shape, step, None)], default=STEPS)
            over = max([step for step in ladder if step < under], default=least - 1)
            smallest_yet = smallest(shape, over, under)
        elif least < smallest_yet and holds(shape, smallest_yet - 1):
            smallest_yet = smallest(shape, least - 1, smallest_yet - 1)


def least_step(shape: Shape, n_layer: int, min_share: float = 0.0) -> int:
    """The smallest budget in steps that is above all tokens up to the first cut and `min_share` of them after it."""
    steps = STEPS * (shape.start + (n_layer - shape.start) * min_share) / n_layer
    return math.floor(steps + 1e-9) + 1  # a whole number of steps may have been computed as a little less


def best(results: Iterable[R], limit: float) -> R | None:
    """The cheapest whose KL over all prompts is at most the limit, of equals the nearest; None: there is none."""
    fit = [r for r in results if r.complete and r.kl <= limit]
    return min(fit, key=lambda r: (r.cost, r.kl), default=None)


def frontier(results: Iterable[R]) -> list[R]:
    """The complete ones that no other beats in cost without being farther away, the cheapest first."""
    out: list[R] = []
    for r in sorted((r for r in results if r.complete), key=lambda r: (r.cost, r.kl)):
        if not out or r.kl < out[-1].kl:
            out.append(r)
    return out
