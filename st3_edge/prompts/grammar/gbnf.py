"""GBNF: its literals and classes, and a check of a whole grammar.

llama.cpp's reader recurses for each parenthesis, multiplies what a repetition repeats, and prints a bad grammar to
standard error. So a grammar is read here first, without recursion: what this accepts, llama.cpp reads in little time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import ConfigError

MAX_BYTES = 2**18
MAX_DEPTH = 64  # parentheses within one another
MAX_REPEATS = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD; a larger maximum it takes for none at all
MAX_ELEMENTS = 2**18  # characters and references, repetitions written out

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_OR_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_CHAR = r"(?:\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[tnr\\\"\[\]-])|[^\\%s])"
_STRING = re.compile(f'"(?:{_CHAR % chr(34)})*"')
_CLASS = re.compile(r"\[\^?(?:" + _CHAR % r"\]" + r")*\]")
_ONE = re.compile(_CHAR % "")
_TOKEN = re.compile(r"!?<(?:\[[0-9]{1,9}\]|[^>\[][^>]*)>")
_REPEAT = re.compile(r"[*+?]|\{[ \t]*([0-9]+)[ \t]*(?:(,)[ \t]*([0-9]*)[ \t]*)?\}")


def literal(text: str) -> str:
    """A GBNF string of exactly `text`."""
    return '"' + "".join(_escaped(ord(c), '"\\') for c in text) + '"'


def char_class(ranges: Iterable[tuple[int, int]]) -> str:
    """A GBNF class of the code points in `ranges`, both ends included."""
    out = []
    for low, high in ranges:
        out.append(_escaped(low, "[]\\-^"))
        if high > low:
            out.append(("-" if high > low + 1 else "") + _escaped(high, "[]\\-^"))
    return "[" + "".join(out) + "]"


def _escaped(code: int, special: str) -> str:
    if 0x20 <= code < 0x7F and chr(code) not in special:
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


@dataclass
class _Sequence:
    """What stands in one pair of parentheses, or in a rule: how many elements, and of the last item."""

    elements: int = 0
    symbols: int = 0  # that llama.cpp's reader makes names for
    last: int = 0  # elements of the last item
    last_symbols: int = 1  # and how many symbols it stands for
    repeatable: bool = False


def check(text: str, root: str = "root") -> None:
    """Raises ConfigError where `text` is no GBNF grammar with a rule `root`, or one that is too large."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"the grammar is larger than {MAX_BYTES >> 10} KiB")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError("the grammar is not text: it holds a NUL or half a surrogate pair")
    defined: set[str] = set()
    used: set[str] = set()
    total = 0
    at = _skip(text, 0, lines=True)
    while at < len(text):
        name = _NAME.match(text, at)
        sign = _skip(text, name.end(), lines=False) if name else at
        if not name or not text.startswith("::=", sign):
            raise _bad(text, at, "a rule begins with its name and ::=")
        defined.add(name.group())
        at, elements = _rule(text, _skip(text, sign + 3, lines=True), defined, used)
        total += elements
        if total > MAX_ELEMENTS:
            raise ConfigError(f"the grammar is too large: more than {MAX_ELEMENTS:,} elements, repetitions written out")
    for missing in sorted({root, *used} - defined):
        raise ConfigError(f"the grammar has no rule {missing!r}")


def _rule(text: str, at: int, defined: set[str], used: set[str]) -> tuple[int, int]:
    """Reads the right side of a rule. Returns where the next begins, and the elements of this one."""
    open_: list[_Sequence] = [_Sequence()]
    while True:
        sequence, nested = open_[-1], len(open_) > 1
        c = text[at : at + 1]
        if c == "(":
            if len(open_) > MAX_DEPTH:
                raise ConfigError(f"the grammar has more than {MAX_DEPTH} parentheses within one another")
            open_.append(_Sequence())
            at = _skip(text, at + 1, lines=True)
        elif c == ")" and nested:
            inner = open_.pop()
            at = _skip(text, at + 1, lines=len(open_) > 1)
            open_[-1].symbols += inner.symbols + 1
            open_[-1].elements += inner.elements + 1
            _add(open_[-1], 1, inner.symbols + 1)  # a reference to a rule of its own
        elif c == "|":
            sequence.repeatable = False
            sequence.elements += 1
            at = _skip(text, at + 1, lines=True)
        elif repeat := _REPEAT.match(text, at):
            _repeat(text, at, sequence, repeat)
            at = _skip(text, repeat.end(), lines=nested)
        elif item := next((m for p in (_STRING, _CLASS, _TOKEN, _NAME) if (m := p.match(text, at))), None):
            if item.re is _NAME:
                sequence.symbols += item.group() not in defined | used
                used.add(item.group())
            # An empty string or class is nothing that could be repeated.
            size = len(_characters(text, at, item.group())) if c in '"[' else 1
            _add(sequence, size)
            sequence.repeatable = size > 0
            at = _skip(text, item.end(), lines=nested)
        elif c == ".":
            _add(sequence, 1)
            at = _skip(text, at + 1, lines=nested)
        elif nested:
            raise _bad(text, at, "a parenthesis is open")
        elif c in ("", "\r", "\n"):
            return _skip(text, at, lines=True), sequence.elements
        else:
            raise _bad(text, at, "an item cannot begin so")
        if open_[-1].elements > MAX_ELEMENTS:
            raise ConfigError(f"the grammar is too large: more than {MAX_ELEMENTS:,} elements, repetitions written out")


def _characters(text: str, at: int, item: str) -> list[str]:
    """The characters of a string or class, as they are written. Raises ConfigError for what no answer can hold:
    llama.cpp takes it, finds that no token fits, and ends the process."""
    written = _ONE.findall(item[1:-1])
    codes = [_code(one) for one in written]
    if any(0xD800 <= code <= 0xDFFF or code > 0x10FFFF for code in codes):
        raise _bad(text, at, "an escape is half a surrogate pair, or no character")
    i = int(item.startswith("[^")) if item[0] == "[" else len(codes)
    while i < len(codes):
        is_range = written[i + 1 : i + 2] == ["-"] and i + 2 < len(codes)
        if is_range and codes[i] > codes[i + 2]:
            raise _bad(text, at, "a range ends before it begins")
        i += 3 if is_range else 1
    return written


def _code(written: str) -> int:
    if len(written) > 2:
        return int(written[2:], 16)
    return ord({"\\t": "\t", "\\r": "\r", "\\n": "\n"}.get(written, written[-1]))


def _add(sequence: _Sequence, size: int, symbols: int = 1) -> None:
    sequence.elements += size
    sequence.last, sequence.last_symbols, sequence.repeatable = size, symbols, True


def _repeat(text: str, at: int, sequence: _Sequence, found: re.Match[str]) -> None:
    if not sequence.repeatable:
        raise _bad(text, at, "nothing stands before a repetition")
    low, comma, high = found.groups()
    if not low:
        low, high = {"*": ("0", ""), "+": ("1", ""), "?": ("0", "1")}[found.group()]
    elif not comma:
        high = low
    least, most = int(low[:9]), int(high[:9]) if high else None
    if most is not None and most < least:
        raise _bad(text, at, "the second number of a repetition is smaller than the first")
    times = most or least or 1
    sequence.last_symbols *= times
    if sequence.last_symbols > MAX_REPEATS:
        raise ConfigError(f"the grammar repeats more than {MAX_REPEATS} times, in line {_line(text, at)}")
    made = 1 if most is None else most - least
    sequence.symbols += made
    sequence.elements += sequence.last * times + 3 * made
    sequence.last = sequence.last * max(least, 1) + 1


def _skip(text: str, at: int, *, lines: bool) -> int:
    found = (_SPACE_OR_LINES if lines else _SPACE).match(text, at)
    assert found
    return found.end()


def _bad(text: str, at: int, why: str) -> ConfigError:
    near = text[at : at + 20].split("\n")[0]
    return ConfigError(f"the grammar is not valid GBNF: {why}, in line {_line(text, at)} at {near!r}")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
