"""JSON numbers within bounds, as GBNF."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

DIGITS = 15  # before the point, and after it: what a float64 tells apart

INTEGER = f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS - 1}}})'
NUMBER = f'{INTEGER} ("." [0-9]{{1,{DIGITS}}})? ([eE] [-+]? [0-9]{{1,2}})?'


class Bound(NamedTuple):
    """One end of an interval; `open`: the end itself is not in it."""

    value: Decimal
    open: bool


def between(low: Bound | None, high: Bound | None, *, whole: bool) -> str:
    """The numbers from `low` to `high`, as GBNF; "" where there is none. `whole`: integers alone, without a point.

    Numbers have no exponent and DIGITS digits before and after the point at most. Raises ValueError for a bound that
    needs more.
    """
    # Numbers that are written here do not reach these.
    low = None if low and low.value <= -(10**DIGITS) else low
    high = None if high and high.value >= 10**DIGITS else high
    for bound in (low, high):
        if bound and (abs(bound.value) >= 10**DIGITS or int(bound.value.as_tuple().exponent) < -DIGITS):
            raise ValueError(f"{bound.value:.6g} has too many digits")
    alternatives: list[str] = []
    if high is None or high.value >= 0:
        least = low if low and low.value >= 0 else Bound(Decimal(0), False)
        alternatives += _magnitudes(least, high, whole)
    if low is None or low.value < 0:
        least = Bound(-high.value, high.open) if high and high.value < 0 else Bound(Decimal(0), True)
        most = Bound(-low.value, low.open) if low else None
        alternatives += [f'"-" {m}' for m in _magnitudes(least, most, whole)]
    return " | ".join(alternatives)


def _magnitudes(low: Bound, high: Bound | None, whole: bool) -> Iterator[str]:
    """The numbers without a sign from `low` to `high`: an alternative for each number of digits before the point."""
    if high is None:
        high = Bound(Decimal(10**DIGITS), True)
    for n in range(1, DIGITS + 1):
        first, last = Decimal(10 ** (n - 1) if n > 1 else 0), Decimal(10**n)
        least = max(low, Bound(first, False))
        most = min(high, Bound(last, True), key=lambda b: (b.value, not b.open))
        if least.value > most.value or (least.value == most.value and (least.open or most.open)):
            continue
        text = _digits(_padded(least.value, n), _padded(most.value, n), n, 0, least, most, whole)
        if text is not None:
            yield f"({text})" if text else '""'


def _padded(value: Decimal, n: int) -> str:
    """The digits of `value`, n before the point (10**n: nines and a carry, see `_digits`) and DIGITS after it."""
    return f"{int(value * 10**DIGITS):0{n + DIGITS}d}"


def _digits(low: str | None, high: str | None, n: int, at: int, least: Bound, most: Bound, whole: bool) -> str | None:
    """What may follow when `at` digits are written. `low`, `high`: the bounds' digits, while all digits so far are
    theirs; else None. "" : nothing; None: there is no way on from here."""
    if high is not None and len(high) > n + DIGITS:  # 10**n, which is not reached
        high = None
    if low is not None and not least.open and not int(low[at:] or 0):  # whatever follows is not below it
        low = None
    ends = at >= n and _may_end(low, high, at, least, most)
    if at == n + DIGITS or (whole and at == n):
        return "" if ends else None
    if at >= n and low is None and high is None:
        return f'("." [0-9]{{1,{DIGITS}}})?' if at == n else f"[0-9]{{0,{n + DIGITS - at}}}"
    if at >= n and low is None and high is not None and not int(high[at:]):  # nothing but zeros may follow
        zeros = f'"0"{{{int(at == n)},{n + DIGITS - at}}}'
        return None if most.open else f'("." {zeros})?' if at == n else zeros
    if low is None and high is None:
        digits = " ".join(["[0-9]"] * (n - at))
        rest_text = _digits(None, None, n, n, least, most, whole)
        return f"{digits} {rest_text}".strip()
    first = int(low[at]) if low is not None else 0
    last = int(high[at]) if high is not None else 9
    ways: dict[str, list[int]] = {}
    for digit in range(first, last + 1):
        follows = _digits(
            low if low is not None and digit == first else None,
            high if high is not None and digit == last else None,
            n,
            at + 1,
            least,
            most,
            whole,
        )
        if follows is not None:
            ways.setdefault(follows, []).append(digit)
    texts = [f"{_one_of(digits)} {follows}".strip() for follows, digits in ways.items()]
    if not texts:
        return "" if ends else None
    text = texts[0] if len(texts) == 1 else f"({' | '.join(texts)})"
    if at == n:
        text = f'"." {text}'
    return f"({text})?" if ends else text


def _may_end(low: str | None, high: str | None, at: int, least: Bound, most: Bound) -> bool:
    """Whether the digits so far, with zeros behind, are within the bounds."""
    if low is not None and (int(low[at:] or 0) or least.open):
        return False
    return not (high is not None and most.open and not int(high[at:] or 0))


def _one_of(digits: list[int]) -> str:
    """A class of digits."""
    if digits[-1] - digits[0] == len(digits) - 1 > 0:
        return f"[{digits[0]}-{digits[-1]}]"
    return f"[{''.join(map(str, digits))}]"
