"""Regular expressions to deterministic automata, by derivatives (Brzozowski 1964).

A grammar that mirrors the expression would be ambiguous where that is, and llama.cpp follows every reading of it at
once: for a few nested repetitions it never returns. An automaton has one way on for each character.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as sre  # type: ignore[attr-defined]
else:
    import sre_parse as sre

MAX_PATTERN = 1000  # characters
MAX_STATES = 2000
_MAX_DERIVATIVES = 50_000

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, ascending

# What JSON text can hold: no half of a surrogate pair.
EVERYTHING: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))

# As ECMA 262 has them, which JSON Schema names.
_CLASSES: dict[str, Ranges] = {
    "DIGIT": ((0x30, 0x39),),
    "WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "SPACE": (
        (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
        (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
    ),
}  # fmt: skip
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))

# Terms: ("set", Ranges), ("cat", terms), ("alt", terms), ("and", terms), ("rep", term, least, most or None).
Term = tuple[Any, ...]
NOTHING: Term = ("alt", frozenset())
EMPTY: Term = ("cat", ())
ANY: Term = ("rep", ("set", EVERYTHING), 0, None)


class Unsupported(Exception):
    """What a pattern holds and no automaton is made of."""


@dataclass(frozen=True)
class Automaton:
    """State 0 is where it begins. moves: for each state, code points and the state that they lead to, without
    overlaps; ends: the states where the text may end. From every state some end can be reached."""

    moves: list[list[tuple[Ranges, int]]]
    ends: frozenset[int]


def parse(pattern: str) -> Term:
    """The texts in which a JSON Schema pattern is found. Raises Unsupported."""
    if len(pattern) > MAX_PATTERN:
        raise Unsupported(f"it has {len(pattern)} characters, and {MAX_PATTERN} are accepted")
    python = _ITEM.sub(lambda found: _in_python(found[0]), pattern)
    try:
        tree: Any = sre.parse(python)
    except (re.error, OverflowError, RecursionError) as e:
        raise Unsupported(str(e) or "it has too many parentheses") from e
    if tree.state.flags & ~(re.UNICODE):
        raise Unsupported("it sets a flag")
    try:
        return _anchored(list(tree))
    except RecursionError as e:
        raise Unsupported("it has too many parentheses") from e


# What Python's reader takes for something else than ECMA 262 does: escapes, whole classes, and beginnings of groups.
_ITEM = re.compile(r"\\.|\[(?:\\.|[^\\\]])*\]|\(\?(?:P|#|<(?![=!]))|\{,", re.DOTALL)
_PYTHONS_ESCAPES = ("\\a", "\\A", "\\N", "\\U", "\\Z")


def _in_python(item: str) -> str:
    """An item of a pattern in Python's writing. Raises Unsupported for what is Python's alone."""
    if item in ("{,", "(?P", "(?#", "[]", "[^]", *_PYTHONS_ESCAPES):
        raise Unsupported(f"it has {item}, which JSON Schema's patterns (ECMA 262) have not, or read otherwise")
    if item == "(?<":
        return "(?P<"
    if item[0] != "[":
        return item
    if "--" in item:
        raise Unsupported("it has -- in a class: write \\- for a hyphen")
    # With a backslash Python does not warn of what may mean sets within sets one day.
    ones = re.findall(r"\\.|.", item[1:], re.DOTALL)
    return "[" + "".join(f"\\{one}" if one in "[&~|" else _in_python(one) if len(one) > 1 else one for one in ones)


def length(least: int, most: int | None) -> Term:
    """The texts of so many characters."""
    return _rep(("set", EVERYTHING), least, most)


def both(terms: Iterable[Term]) -> Term:
    """The texts that all terms have."""
    return _all(frozenset(terms))


def automaton(term: Term) -> Automaton:
    """Raises Unsupported for a term that no text fits, or whose automaton is too large."""
    states: dict[Term, int] = {term: 0}
    moves: list[list[tuple[Ranges, int]]] = []
    budget = _MAX_DERIVATIVES
    for state in (todo := [term]):
        by_target: dict[int, list[tuple[int, int]]] = {}
        for low, high in _atoms(state):
            budget -= 1
            after = _after(state, low)
            if after == NOTHING:
                continue
            if after not in states:
                states[after] = len(states)
                todo.append(after)
            by_target.setdefault(states[after], []).append((low, high))
        if len(states) > MAX_STATES or budget < 0:
            raise Unsupported("its automaton is too large")
        moves.append([(_joined(ranges), target) for target, ranges in by_target.items()])
    ends = frozenset(i for i, state in enumerate(todo) if _is_nullable(state))
    return _without_dead_ends(moves, ends)


def other_than(texts: Iterable[str], characters: Ranges) -> Automaton:
    """The texts of `characters` that are none of `texts`."""
    tree: list[dict[int, int]] = [{}]
    listed = set()
    for text in texts:
        at = 0
        for code in map(ord, text):
            if code not in tree[at]:
                tree[at][code] = len(tree)
                tree.append({})
            at = tree[at][code]
        listed.add(at)
    other = len(tree)
    moves = [
        [
            *((((code, code),), target) for code, target in ways.items()),
            (_without(characters, ((c, c) for c in ways)), other),
        ]
        for ways in (*tree, {})
    ]
    return Automaton(moves, frozenset(range(len(moves))) - listed)


def _without_dead_ends(moves: list[list[tuple[Ranges, int]]], ends: frozenset[int]) -> Automaton:
    before: list[list[int]] = [[] for _ in moves]
    for i, ways in enumerate(moves):
        for _, target in ways:
            before[target].append(i)
    alive, todo = set(ends), list(ends)
    while todo:
        new = set(before[todo.pop()]) - alive
        alive |= new
        todo += new
    if 0 not in alive:
        raise Unsupported("no text fits it")
    number = {state: i for i, state in enumerate(sorted(alive))}
    kept = [[(ranges, number[t]) for ranges, t in moves[state] if t in alive] for state in number]
    return Automaton(kept, frozenset(number[state] for state in ends))


# --- terms ---


def _cat(terms: Iterable[Term]) -> Term:
    out: list[Term] = []
    for term in terms:
        if term == NOTHING:
            return NOTHING
        out += term[1] if term[0] == "cat" else [term]
    return out[0] if len(out) == 1 else ("cat", tuple(out))


def _alt(terms: Iterable[Term]) -> Term:
    out: set[Term] = set()
    for term in terms:
        out |= term[1] if term[0] == "alt" else {term}
    if ANY in out:
        return ANY
    return next(iter(out)) if len(out) == 1 else ("alt", frozenset(out))


def _all(terms: frozenset[Term]) -> Term:
    if NOTHING in terms:
        return NOTHING
    out = terms - {ANY} or {ANY}
    return next(iter(out)) if len(out) == 1 else ("and", frozenset(out))


def _rep(term: Term, least: int, most: int | None) -> Term:
    if most == 0 or term == EMPTY:
        return EMPTY
    if term == NOTHING:
        return EMPTY if least == 0 else NOTHING
    if _is_nullable(term):
        least = 0
    if term[0] == "rep" and most is None and term[2] == 0 and term[3] is None:
        return term
    return term if (least, most) == (1, 1) else ("rep", term, least, most)


@lru_cache(maxsize=2**14)
def _is_nullable(term: Term) -> bool:
    kind = term[0]
    if kind == "set":
        return False
    if kind == "rep":
        return bool(term[2] == 0)
    return any(map(_is_nullable, term[1])) if kind == "alt" else all(map(_is_nullable, term[1]))


def _after(term: Term, code: int) -> Term:
    """What may follow where `term` has begun with a character."""
    kind = term[0]
    if kind == "set":
        return EMPTY if any(low <= code <= high for low, high in term[1]) else NOTHING
    if kind == "alt":
        return _alt(_after(t, code) for t in term[1])
    if kind == "and":
        return _all(frozenset(_after(t, code) for t in term[1]))
    if kind == "rep":
        _, inner, least, most = term
        rest = _rep(inner, max(0, least - 1), None if most is None else most - 1)
        return _cat((_after(inner, code), rest))
    ways = []
    for i, part in enumerate(term[1]):
        ways.append(_cat((_after(part, code), *term[1][i + 1 :])))
        if not _is_nullable(part):
            break
    return _alt(ways)


def _atoms(term: Term) -> list[tuple[int, int]]:
    """Ranges that hold all characters with which `term` can begin; those of one range lead to one term."""
    sets: set[Ranges] = set()
    _first_sets(term, sets)
    begins = sorted({low for s in sets for low, _ in s} | {high + 1 for s in sets for _, high in s})
    atoms = zip(begins, (b - 1 for b in begins[1:]), strict=False)
    return [(low, high) for low, high in atoms if any(a <= low <= b for s in sets for a, b in s)]


def _first_sets(term: Term, out: set[Ranges]) -> None:
    kind = term[0]
    if kind == "set":
        out.add(term[1])
    elif kind == "rep":
        _first_sets(term[1], out)
    else:
        for part in term[1]:
            _first_sets(part, out)
            if kind == "cat" and not _is_nullable(part):
                break


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def _without(ranges: Iterable[tuple[int, int]], less: Iterable[tuple[int, int]]) -> Ranges:
    left = list(ranges)
    for a, b in less:
        left = [
            part
            for low, high in left
            for part in ((low, min(high, a - 1)), (max(low, b + 1), high))
            if part[0] <= part[1]
        ]
    return tuple(left)


# --- Python's tree of a pattern to a term ---


def _anchored(tree: Sequence[Any]) -> Term:
    """A whole pattern, or an alternative of it: ^ and $ may stand at its ends, and without them more text may."""
    if len(tree) == 1:
        op, argument = tree[0]
        if str(op) == "BRANCH":
            return _alt(_anchored(list(branch)) for branch in argument[1])
        if str(op) == "SUBPATTERN" and not argument[1] and not argument[2]:
            return _anchored(list(argument[3]))
    tree = list(tree)
    begins = tree and str(tree[0][0]) == "AT" and str(tree[0][1]) == "AT_BEGINNING"
    tree = tree[1:] if begins else tree
    ends = tree and str(tree[-1][0]) == "AT" and str(tree[-1][1]) == "AT_END"
    tree = tree[:-1] if ends else tree
    return _cat((EMPTY if begins else ANY, _sequence(tree), EMPTY if ends else ANY))


def _sequence(tree: Iterable[Any]) -> Term:
    return _cat(_node(str(op), argument) for op, argument in tree)


def _node(op: str, argument: Any) -> Term:
    if op == "LITERAL":
        return ("set", _within([(argument, argument)]))
    if op == "NOT_LITERAL":
        return ("set", _without(EVERYTHING, [(argument, argument)]))
    if op == "ANY":
        return ("set", _without(EVERYTHING, _LINE_ENDS))
    if op == "IN":
        return _set(argument)
    if op == "BRANCH":
        return _alt(_sequence(branch) for branch in argument[1])
    if op == "SUBPATTERN" and not argument[1] and not argument[2]:
        return _sequence(argument[3])
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = argument
        if least > MAX_STATES or (most != sre.MAXREPEAT and most > MAX_STATES):
            raise Unsupported(f"it repeats more than {MAX_STATES} times")
        return _rep(_sequence(inner), int(least), None if most == sre.MAXREPEAT else int(most))
    names = {
        "AT": "^, $ or \\b elsewhere than at the ends",
        "ASSERT": "a lookahead or lookbehind",
        "ASSERT_NOT": "a lookahead or lookbehind",
        "GROUPREF": "a reference to a group",
        "GROUPREF_EXISTS": "a condition",
    }
    raise Unsupported(f"it has {names.get(op, 'what is not supported')}")


def _within(ranges: list[tuple[int, int]]) -> Ranges:
    inside = _without(ranges, [(0xD800, 0xDFFF)])
    if not inside:
        raise Unsupported("it has half a surrogate pair")
    return inside


def _set(items: Iterable[Any]) -> Term:
    ranges: list[tuple[int, int]] = []
    negated = False
    for op, argument in items:
        name = str(op)
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            ranges.append((argument, argument))
        elif name == "RANGE":
            ranges.append(argument)
        elif name == "CATEGORY":
            kind = str(argument).removeprefix("CATEGORY_")
            of_kind = _CLASSES[kind.removeprefix("NOT_")]
            ranges += _without(EVERYTHING, of_kind) if kind.startswith("NOT_") else of_kind
        else:
            raise Unsupported("it has a class that is not supported")
    joined = _joined(ranges)
    left = _without(EVERYTHING, joined) if negated else _without(joined, [(0xD800, 0xDFFF)])
    return ("set", left) if left else NOTHING
