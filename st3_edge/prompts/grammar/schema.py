"""JSON schemas to GBNF: whatever the grammar lets through is valid by the schema.

Each keyword is enforced, or says nothing about what is valid (annotations), or is refused by name. What the grammar
may leave out, though the schema allows it: properties in another order than the schema's, properties that the schema
does not name (unless additionalProperties says more), items beyond prefixItems, white space, numbers with an exponent
where there are bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from ...errors import ConfigError, one_line
from . import gbnf, keywords, numbers, pattern
from .keywords import Schema

MAX_BYTES = 2**18
MAX_RULES = 10_000
MAX_DEPTH = 64
_MAX_STEPS = 50_000  # schemas looked at, and properties in them

_SPACE = '" "?'
_CHAR = r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))'
# What a string, and so the name of a property, may hold unescaped.
_PLAIN: pattern.Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
_SHORT_ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}


class _Impossible(Exception):
    """Nothing is valid by a schema."""


def to_gbnf(schema: Any) -> str:
    """Raises ConfigError for what is no JSON schema, or cannot become a grammar."""
    try:
        if len(json.dumps(schema, allow_nan=False)) > MAX_BYTES:
            raise ConfigError(f"the JSON schema is larger than {MAX_BYTES >> 10} KiB")
        writer = _Writer(schema)
        root = writer.node(schema, "#", 0)
        text = f"root ::= {root}\n" + "".join(f"{name} ::= {body}\n" for name, body in writer.rules.items())
    except _Impossible as e:
        raise ConfigError(f"nothing is valid by the JSON schema: {one_line(e)}") from e
    except (TypeError, ValueError) as e:
        raise ConfigError(f"the JSON schema is not JSON: {one_line(e)}") from e
    except RecursionError as e:
        raise ConfigError("the JSON schema is too deep") from e
    gbnf.check(text)
    return text


class _Writer:
    """`rules`: the body of each rule by its name."""

    def __init__(self, root: Any) -> None:
        self.rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # by body
        self._root = root
        self._refs: dict[str, str] = {}
        self._open: dict[str, bool] = {}  # references whose rule is being written: whether it was used meanwhile
        self._n = self._steps = 0

    # --- rules ---

    def _name(self) -> str:
        self._n += 1
        if self._n > MAX_RULES:
            raise ConfigError(f"the JSON schema is too large: it needs more than {MAX_RULES:,} rules")
        return f"r{self._n}"

    def _rule(self, body: str) -> str:
        """The name of a rule with that body."""
        if body not in self._names:
            self._reserved(self._name(), body)
        return self._names[body]

    def _reserved(self, name: str, body: str) -> None:
        """Writes the rule of a name that was given before its body was known."""
        self.rules[name] = body
        self._names.setdefault(body, name)

    def _any(self) -> str:
        string, number = self._rule(f'"\\"" {self._rule(_CHAR)}* "\\""'), self._rule(numbers.NUMBER)
        if "any" not in self._refs:
            self._refs["any"] = value = self._name()
            space = self._rule(_SPACE)
            pair = f'{string} ":" {space} {value}'
            several = (f'{space} ({one} ("," {space} {one})*)?' for one in (pair, value))
            containers = '"{{" {} "}}" | "[" {} "]"'.format(*several)
            self._reserved(value, f'{containers} | {string} | {number} | "true" | "false" | "null"')
        return self._refs["any"]

    # --- schemas ---

    def node(self, schema: Any, at: str, depth: int, through: frozenset[str] = frozenset()) -> str:
        """The name of the rule for a schema, which is at the JSON pointer `at`. `through`: the references that led
        here with nothing written on the way. Raises _Impossible."""
        if depth > MAX_DEPTH:
            raise ConfigError(f"the JSON schema is too deep, at {at}")
        if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and not keywords.says(schema) - {"$ref"}:
            keywords.check(schema, at)
            return self._reference(schema["$ref"], at, depth, through)
        schema = self._flat(schema, at, depth, ())
        if not schema:
            return self._any()
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._union(schema, keyword, at, depth, through)
        if "const" in schema or "enum" in schema:
            return self._constants(schema, at)
        types = self._types(schema, at)
        bodies, reasons = [], []
        for kind in types:
            try:
                bodies.append(getattr(self, f"_{kind}")(schema, at, depth))
            except _Impossible as e:
                reasons.append(e)
        if not bodies:
            raise reasons[0]
        return self._rule(" | ".join(bodies))

    def _flat(self, schema: Any, at: str, depth: int, seen: tuple[str, ...]) -> dict[str, Any]:
        """The schema with what $ref and allOf say in it, less annotations."""
        if schema is True:
            return {}
        if schema is False:
            raise _Impossible(f"false, at {at}")
        keywords.check(schema, at)
        self._steps += 1 + len(schema.get("properties", ()))
        if self._steps > _MAX_STEPS:
            raise ConfigError(f"the JSON schema is too large, at {at}")
        if depth > MAX_DEPTH:
            raise ConfigError(f"the JSON schema is too deep, at {at}")
        out = {key: schema[key] for key in schema if key in keywords.says(schema) and key not in ("$ref", "allOf")}
        others = [(part, f"{at}/allOf/{i}", seen) for i, part in enumerate(schema.get("allOf", ()))]
        if "$ref" in schema:
            ref = schema["$ref"]
            if ref in seen or len(seen) > MAX_DEPTH:
                raise _circular(at)
            others.append((self._resolve(ref, at), str(ref), (*seen, ref)))
        for other, where, seen_there in others:
            out = keywords.merged(out, self._flat(other, where, depth + 1, seen_there), at)
        return out

    def _reference(self, ref: str, at: str, depth: int, through: frozenset[str]) -> str:
        target = self._resolve(ref, at)
        if ref in through:
            raise _circular(at)
        if ref in self._open:
            self._open[ref] = True
        if ref not in self._refs:
            self._refs[ref] = name = self._name()
            self._open[ref] = False
            try:
                self._reserved(name, self.node(target, ref, depth + 1, through | {ref}))
            except _Impossible as e:
                del self._refs[ref]
                if self._open[ref]:
                    raise ConfigError(f"nothing is valid by the JSON schema at {ref!r}: {e}") from e
                raise
            finally:
                del self._open[ref]
        return self._refs[ref]

    def _resolve(self, ref: str, at: str) -> Any:
        if not (ref == "#" or ref.startswith("#/")):
            raise ConfigError(f"the JSON schema's $ref {ref!r} is not one into the schema itself (#/...), at {at}")
        target = self._root
        for part in ref.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, TypeError, ValueError, IndexError) as e:
                raise ConfigError(f"the JSON schema has nothing at {ref!r}, to which it refers at {at}") from e
        return target

    def _union(self, schema: dict[str, Any], keyword: str, at: str, depth: int, through: frozenset[str]) -> str:
        rest = {key: value for key, value in schema.items() if key != keyword}
        bodies, reasons, flats = [], [], []
        for i, part in enumerate(schema[keyword]):
            where = f"{at}/{keyword}/{i}"
            try:
                if keyword == "oneOf":
                    flats.append(keywords.merged(rest, self._flat(part, where, depth + 1, ()), where))
                # What is a reference alone stays one: it may be to what we are in.
                bodies.append(self.node({**rest, "allOf": [part]} if rest else part, where, depth + 1, through))
            except _Impossible as e:
                reasons.append(e)
        if any(not self._disjoint(a, b) for i, a in enumerate(flats) for b in flats[:i]):
            raise ConfigError(f"oneOf cannot be enforced where two of its schemas may fit (anyOf can), at {at}")
        if not bodies:
            raise reasons[0]
        return self._rule(" | ".join(dict.fromkeys(bodies)))

    def _disjoint(self, a: Any, b: Any, depth: int = 0) -> bool:
        """Whether it is plain that nothing is valid by both."""
        try:
            a, b = (self._flat(s, "oneOf", depth, ()) for s in (a, b))
        except _Impossible:
            return True
        if any(key in s for s in (a, b) for key in ("anyOf", "oneOf")) or depth > 8:
            return False
        values = [[*s.get("enum", ()), *([s["const"]] if "const" in s else ())] for s in (a, b)]
        if all(values):
            texts = [{keywords.key_of(v) for v in of} for of in values]
            return not texts[0] & texts[1]
        # Without a type, what is said of one type allows all others.
        typed = [s if "type" in s else {"type": list(keywords.OF_TYPE)} for s in (a, b)]
        kinds = [set(map(keywords.type_of, of)) or set(self._types(s, "")) for of, s in zip(values, typed, strict=True)]
        for of in kinds:
            if "number" in of:
                of.add("integer")
        common = kinds[0] & kinds[1]
        if common != {"object"} or any(values):
            return not common
        # Objects both: one property that both need must tell them apart.
        shared = set(a.get("required", [])) & set(b.get("required", []))
        return any(
            name in a.get("properties", {}) and name in b.get("properties", {})
            and self._disjoint(a["properties"][name], b["properties"][name], depth + 1)
            for name in shared
        )  # fmt: skip

    def _constants(self, schema: dict[str, Any], at: str) -> str:
        if more := sorted(schema.keys() - {"const", "enum", "type"}):
            raise ConfigError(f"{more[0]!r} cannot be enforced beside const or enum in a JSON schema, at {at}")
        values = schema.get("enum", [schema.get("const")])
        if "enum" in schema and "const" in schema:
            values = [v for v in values if keywords.key_of(v) == keywords.key_of(schema["const"])]
        types = self._types(schema, at)
        fit = [v for v in values if keywords.type_of(v) in keywords.with_integer(types)]
        if not fit:
            raise _Impossible(f"no value of its type is left, at {at}")
        texts = dict.fromkeys(json.dumps(v, ensure_ascii=False) for v in fit)
        if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
            raise ConfigError(f"a value is not valid Unicode in the JSON schema, at {at}")
        return self._rule(" | ".join(gbnf.literal(text) for text in texts))

    def _types(self, schema: dict[str, Any], at: str) -> list[str]:
        """The types that something can have; without the keyword, those of which the schema says more."""
        said = schema.keys() - keywords.JOINING
        if "type" not in schema:
            fit = [kind for kind, of in keywords.OF_TYPE.items() if of & said and kind != "integer"]
            types = fit or [kind for kind in keywords.OF_TYPE if kind != "integer"]
        else:
            types = [schema["type"]] if isinstance(schema["type"], str) else list(dict.fromkeys(schema["type"]))
            for kind in types:
                if kind not in keywords.OF_TYPE:
                    raise ConfigError(f"{kind!r} is no type of a JSON schema, at {at}")
            if "number" in types:
                types = [kind for kind in types if kind != "integer"]
        idle = said - frozenset().union(*(keywords.OF_TYPE[kind] for kind in types))
        if idle:
            raise ConfigError(
                f"{min(idle)!r} says nothing about the type {' or '.join(types)} in a JSON schema, at {at}"
            )
        if not types:
            raise _Impossible(f"no type is left, at {at}")
        return types

    # --- one type ---

    def _null(self, *_: Any) -> str:
        return '"null"'

    def _boolean(self, *_: Any) -> str:
        return '"true" | "false"'

    def _integer(self, schema: dict[str, Any], at: str, _: int) -> str:
        return self._between(schema, at, whole=True)

    def _number(self, schema: dict[str, Any], at: str, _: int) -> str:
        return self._between(schema, at, whole=False)

    def _between(self, schema: dict[str, Any], at: str, *, whole: bool) -> str:
        def bound(inclusive: str, exclusive: str, choose: Callable[..., numbers.Bound]) -> numbers.Bound | None:
            found = [
                numbers.Bound(Decimal(json.dumps(schema[key])), is_open)
                for key, is_open in ((inclusive, False), (exclusive, True))
                if key in schema
            ]
            return choose(found, key=lambda b: (b.value, b.open if choose is max else not b.open)) if found else None

        low, high = bound("minimum", "exclusiveMinimum", max), bound("maximum", "exclusiveMaximum", min)
        if not low and not high:
            return self._rule(numbers.INTEGER if whole else numbers.NUMBER)
        try:
            body = numbers.between(low, high, whole=whole)
        except ValueError as e:
            raise ConfigError(f"a bound of a JSON schema cannot be enforced: {e}, at {at}") from e
        if not body:
            raise _Impossible(f"no number is between its bounds, at {at}")
        return self._rule(body)

    def _string(self, schema: dict[str, Any], at: str, _: int) -> str:
        least, most = _counts(schema, "minLength", "maxLength", at)
        terms = []
        if "pattern" in schema:
            terms.append(("pattern", schema["pattern"]))
        if "format" in schema:
            if schema["format"] not in keywords.FORMATS:
                known = ", ".join(keywords.FORMATS)
                raise ConfigError(f"the format {schema['format'][:80]!r} cannot be enforced ({known} can), at {at}")
            terms.append(("format", keywords.FORMATS[schema["format"]]))
        if not terms:
            return f'"\\"" {self._rule(_CHAR)}{_times(least, most)} "\\""'
        try:
            parsed = [pattern.parse(text) for _, text in terms]
            of_length = [pattern.length(least, most)] if least or most is not None else []
            return f'"\\"" {self._automaton(pattern.automaton(pattern.both([*parsed, *of_length])))}'
        except pattern.Unsupported as e:
            said = " with ".join(f"{key} {str(schema[key])[:80]!r}" for key, _ in terms)
            raise ConfigError(f"{said} cannot be enforced: {one_line(e)}, at {at}") from e

    def _automaton(self, automaton: pattern.Automaton, end: str = '"\\""') -> str:
        """The rule of an automaton's texts as JSON writes them, with `end` behind."""
        names = [self._name() for _ in automaton.moves]
        for i, ways in enumerate(automaton.moves):
            alternatives = [f"{written} {names[target]}" for ranges, target in ways for written in _written(ranges)]
            if i in automaton.ends:
                alternatives.append(end)
            self._reserved(names[i], " | ".join(alternatives))
        return names[0]

    def _array(self, schema: dict[str, Any], at: str, depth: int) -> str:
        if schema.get("uniqueItems"):
            raise ConfigError(f"uniqueItems cannot be enforced in a JSON schema, at {at}")
        least, most = _counts(schema, "minItems", "maxItems", at)
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        more = "items" in schema
        if isinstance(items, list):  # as it was called before prefixItems
            first, items, more = items, schema.get("additionalItems", True), "additionalItems" in schema
        elif "additionalItems" in schema:
            raise ConfigError(f"additionalItems goes with a list of items in a JSON schema, at {at}")
        heads = [self.node(item, f"{at}/prefixItems/{i}", depth + 1) for i, item in enumerate(first[:most])]
        rest_least = max(0, least - len(heads))
        rest_most = None if most is None else most - len(heads)
        if first and not more and not rest_least:
            rest_most = 0
        try:
            item = self.node(items, f"{at}/items", depth + 1) if rest_most != 0 else ""
        except _Impossible:
            if rest_least:
                raise
            rest_most = 0
        space = self._rule(_SPACE)
        comma = f'"," {space} '
        head = comma.join(f"{name} " for name in heads)
        if rest_most == 0:
            return f'"[" {space} {head}"]"'
        if head:
            return f'"[" {space} {head}({comma}{item}){_times(rest_least, rest_most)} "]"'
        more_items = _times(max(0, rest_least - 1), None if rest_most is None else rest_most - 1)
        tail = self._rule(f"{item} ({comma}{item}){more_items}")
        return f'"[" {space} {tail}{"" if rest_least else "?"} "]"'

    def _object(self, schema: dict[str, Any], at: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        names = dict.fromkeys([*properties, *required])
        extra = schema.get("additionalProperties", not names)
        space = self._rule(_SPACE)
        pairs: list[tuple[str, bool]] = []
        for name in names:
            needed = name in required
            if name not in properties and schema.get("additionalProperties") is False:
                raise _Impossible(f"{name!r} is required and not allowed, at {at}")
            try:
                of = properties[name] if name in properties else schema.get("additionalProperties", True)
                value = self.node(of, f"{at}/properties/{name}", depth + 1)
            except _Impossible:
                if needed:
                    raise
                continue  # it may be left out, so it is
            key = json.dumps(name, ensure_ascii=False)
            if any("\ud800" <= c <= "\udfff" for c in name):
                raise ConfigError(f"the name of a property is not valid Unicode in the JSON schema, at {at}")
            pairs.append((self._rule(f'{gbnf.literal(key)} ":" {space} {value}'), needed))
        if extra is not False:
            with suppress(_Impossible):
                value = self.node(extra, f"{at}/additionalProperties", depth + 1)
                others = self._automaton(pattern.other_than(names, _PLAIN))
                pair = self._rule(f'"\\"" {others} ":" {space} {value}')
                pairs.append((self._rule(f'{pair} ("," {space} {pair})*'), False))
        return f'"{{" {space} {self._pairs(pairs)} "}}"'

    def _pairs(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """Pairs in order, some of which may be left out, with commas between: two rules for each, one where a pair
        was written before it and one where none was."""
        comma = f'"," {self._rule(_SPACE)}'
        first, later = '""', '""'
        for pair, needed in reversed(pairs):
            if needed:
                first, later = f"{pair} {later}", f"{comma} {pair} {later}"
            else:
                first, later = f"{pair} {later} | {first}", f"{comma} {pair} {later} | {later}"
            first, later = self._rule(first), self._rule(later)
        return first


def _circular(at: str) -> ConfigError:
    return ConfigError(f"the JSON schema refers to itself without an end, at {at}")


def _counts(schema: Schema, least: str, most: str, at: str) -> tuple[int, int | None]:
    found = [int(schema[key]) if key in schema else None for key in (least, most)]
    for key, value in zip((least, most), found, strict=True):
        if value is not None and value > gbnf.MAX_REPEATS:
            raise ConfigError(f"{key} above {gbnf.MAX_REPEATS} cannot be enforced in a JSON schema, at {at}")
    low, high = found[0] or 0, found[1]
    if high is not None and high < low:
        raise _Impossible(f"{least} is larger than {most}, at {at}")
    return low, high


def _times(least: int, most: int | None) -> str:
    if most is None:
        return "*" if least == 0 else f"{{{least},}}"
    return f"{{{least},{most}}}"


def _written(ranges: pattern.Ranges) -> Iterable[str]:
    """Characters as they stand in a JSON string."""
    plain = tuple((max(a, c), min(b, d)) for a, b in ranges for c, d in _PLAIN if max(a, c) <= min(b, d))
    if plain:
        yield gbnf.char_class(plain)
    for code in (*range(0x20), 0x22, 0x5C):
        if any(low <= code <= high for low, high in ranges):
            if code in _SHORT_ESCAPES:
                yield gbnf.literal("\\" + _SHORT_ESCAPES[code])
            elif not plain:
                yield gbnf.literal(f"\\u{code:04x}")
