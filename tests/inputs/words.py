"""Texts that a GBNF grammar lets through, drawn at random: written from llama.cpp's grammars/README.md."""

from __future__ import annotations

import random
import re
from typing import Any

_TOKENS = re.compile(
    r'\s+|(?P<string>"(?:\\.|[^"\\])*")|(?P<class>\[(?:\\.|[^\]\\])*\])|(?P<repeat>[*+?]|\{\d+(?:,\d*)?\})'
    r"|(?P<name>[a-zA-Z0-9-]+)|(?P<sign>[()|])",
    re.DOTALL,
)
_CHAR = re.compile(r"\\x(..)|\\u(....)|\\U(.{8})|\\(.)|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


def _chars(text: str) -> list[str]:
    out = []
    for x, u, large, escape, plain in _CHAR.findall(text):
        out.append(chr(int(x or u or large, 16)) if x or u or large else _NAMED.get(escape, escape) or plain)
    return out


class Words:
    """`draw` gives one text of the grammar; None where it grew too long."""

    def __init__(self, grammar: str) -> None:
        self._rules: dict[str, Any] = {}
        for line in grammar.splitlines():
            name, _, body = line.partition("::=")
            tokens = [(m.lastgroup, m.group()) for m in _TOKENS.finditer(body) if m.lastgroup]
            self._rules[name.strip()] = self._alternatives(tokens)
        self._shortest = self._depths()

    def _alternatives(self, tokens: list[Any]) -> list[list[Any]]:
        out: list[list[Any]] = [[]]
        while tokens:
            kind, text = tokens.pop(0)
            if text == ")" and kind == "sign":
                return out
            if text == "|" and kind == "sign":
                out.append([])
            elif kind == "repeat":
                low, _, high = text.strip("{}").partition(",")
                bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(text) or (
                    int(low),
                    (int(high) if high else None) if "," in text else int(low),
                )
                out[-1][-1] = ("repeat", out[-1][-1], *bounds)
            elif kind == "sign":
                out[-1].append(("group", self._alternatives(tokens)))
            elif kind == "string":
                out[-1].append(("text", "".join(_chars(text[1:-1]))))
            elif kind == "class":
                out[-1].append(self._class(text[1:-1]))
            else:
                out[-1].append(("rule", text))
        return out

    @staticmethod
    def _class(text: str) -> tuple[str, bool, list[tuple[int, int]]]:
        negated = text.startswith("^")
        chars = re.findall(r"\\x..|\\u....|\\U.{8}|\\.|.", text[negated:], re.DOTALL)
        ranges = []
        while chars:
            first = ord(_chars(chars.pop(0))[0])
            last = first
            if len(chars) > 1 and chars[0] == "-":
                chars.pop(0)
                last = ord(_chars(chars.pop(0))[0])
            ranges.append((first, last))
        return "class", negated, ranges

    def _depths(self) -> dict[str, float]:
        """How many rules within one another each rule needs at least."""
        depths = dict.fromkeys(self._rules, float("inf"))
        changed = True
        while changed:
            changed = False
            for name, alternatives in self._rules.items():
                new = 1 + min(self._depth(a, depths) for a in alternatives)
                if new < depths[name]:
                    depths[name], changed = new, True
        return depths

    def _depth(self, sequence: list[Any], depths: dict[str, float]) -> float:
        worst = 0.0
        for item in sequence:
            while item[0] == "repeat":
                item = item[1] if item[2] else ("text", "")
            if item[0] == "rule":
                worst = max(worst, depths[item[1]])
            elif item[0] == "group":
                worst = max(worst, min(self._depth(a, depths) for a in item[1]))
        return worst

    @property
    def ends(self) -> bool:
        """Whether there is any text at all."""
        return self._shortest["root"] < float("inf")

    def draw(self, rng: random.Random, limit: int = 5000) -> str | None:
        out: list[str] = []
        todo: list[Any] = [("rule", "root", 0)]
        steps = 0
        while todo:
            kind, *rest = todo.pop()
            steps += 1
            if steps > limit:
                return None
            if kind == "text":
                out.append(rest[0])
            elif kind == "class":
                out.append(self._one(rng, *rest[:2]))
            else:
                *_, depth = rest
                if kind == "repeat":
                    item, low, high = rest[:3]
                    more = 0 if depth > 12 else rng.choice((0, 0, 1, 2, 5))
                    todo += [(*item, depth)] * min(low + more, high if high is not None else low + more)
                    continue
                alternatives = rest[0] if kind == "group" else self._rules[rest[0]]
                if depth > 12:
                    least = min(self._depth(a, self._shortest) for a in alternatives)
                    alternatives = [a for a in alternatives if self._depth(a, self._shortest) == least]
                todo += [(*item, depth + 1) for item in reversed(rng.choice(alternatives))]
        return "".join(out)

    @staticmethod
    def _one(rng: random.Random, negated: bool, ranges: list[tuple[int, int]]) -> str:
        while True:
            if negated:
                code = rng.choice((rng.randint(0, 0x17F), rng.randint(0, 0x10FFFF)))
                if any(a <= code <= b for a, b in ranges) or 0xD800 <= code <= 0xDFFF:
                    continue
            else:
                low, high = rng.choice(ranges)
                code = rng.choice((low, high, rng.randint(low, high)))
            return chr(code)
