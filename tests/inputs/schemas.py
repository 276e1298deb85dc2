"""JSON schemas drawn at random: of all keywords that JSON Schema has, some with nonsense for a value."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("a", "b", "id", "näme", 'q"t', "a b", "back\\slash", "")
PATTERNS = (
    "^[a-z]+$", "^a|b$", r"^\d{3}-\d{4}$", "x", r"^[^\"]{2,}$", "^(a|b)*abb$", "^(a+)+$", r"^\\$", "^]$", r"(?=x)",
    "^é*$", "^(a?){30}$", r"^\w+@\w+\.(com|org)$", "(", "a{2,1}", r"\bword", "^.{3,5}$", "^$", "^(?<year>[12]\\d{3})$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "uri", "hostname", "regex", "int64", "made-up")
OTHERS = (
    "multipleOf", "not", "if", "then", "else", "contains", "minContains", "maxContains", "patternProperties",
    "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "contentEncoding", "contentMediaType", "$anchor", "$dynamicRef", "$id", "nullable", "typ",
)  # fmt: skip
ANNOTATIONS = ("title", "description", "$comment", "default", "deprecated", "readOnly")


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return number(rng)
    if kind in (2, 3, 4):
        return rng.choice(("", "x", "abc", 'say "hi"\n', "back\\slash", "é", "\U0001f600", "\x00\x1f", "a" * 60))
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def number(rng: random.Random) -> Any:
    return rng.choice(
        (
            rng.randint(-20, 20),
            rng.randint(-(10**6), 10**6),
            round(rng.uniform(-5, 5), rng.randrange(1, 4)),
            0,
            1.0,
            1e30,
        )
    )


def nonsense(rng: random.Random) -> Any:
    return rng.choice((None, -1, 1.5, "x", [], {}, True, [None], {"a": 1}, 10**9, [[]], ["string", 3]))


def schema(rng: random.Random, depth: int = 0) -> Any:
    """One schema; not all are valid ones."""
    if rng.random() < 0.03:
        return rng.choice((True, False))
    out: dict[str, Any] = {}
    for name in rng.sample(ANNOTATIONS, rng.choice((0, 0, 1, 2))):
        out[name] = "text" if name < "d" or name in ("title", "description") else True
    shape = rng.random()
    if shape < 0.1:
        out["enum"] = [value(rng) for _ in range(rng.randint(1, 4))]
    elif shape < 0.16:
        out["const"] = value(rng)
    elif shape < 0.3 and depth < 4:
        out[rng.choice(("anyOf", "anyOf", "oneOf", "allOf"))] = [
            schema(rng, depth + 1) for _ in range(rng.randint(1, 3))
        ]
    elif shape < 0.38:
        out["$ref"] = rng.choice(("#", "#/$defs/one", "#/$defs/two", "#/$defs/one", "#/nowhere", "http://x"))
    if rng.random() < (0.25 if len(out) else 0.9):
        _typed(rng, out, depth)
    if rng.random() < 0.04:
        out[rng.choice(OTHERS)] = rng.choice((nonsense(rng), 2, {"type": "string"}, ["a"]))
    if rng.random() < 0.03 and out:
        out[rng.choice(list(out))] = nonsense(rng)
    if depth == 0:
        out["$defs"] = {"one": schema(rng, 2), "two": schema(rng, 2)}
    return out


def _typed(rng: random.Random, out: dict[str, Any], depth: int) -> None:
    kinds = ["null", "boolean", "integer", "number", "string", "string", "integer"]
    kinds += ["array", "object", "object"] if depth < 4 else []
    kind = rng.choice(kinds)
    if rng.random() < 0.93:
        out["type"] = kind if rng.random() < 0.85 else [kind, rng.choice(("null", "string", "number"))]
    maybe = rng.random
    if kind in ("integer", "number"):
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if maybe() < 0.3:
                out[key] = number(rng)
    elif kind == "string":
        for key, most in (("minLength", 4), ("maxLength", 8)):
            if maybe() < 0.25:
                out[key] = rng.choice((rng.randrange(most), rng.randrange(most), 2000, 100_000, 10**9))
        if maybe() < 0.25:
            out["pattern"] = rng.choice(PATTERNS)
        if maybe() < 0.15:
            out["format"] = rng.choice(FORMATS)
    elif kind == "array":
        if maybe() < 0.8:
            out["items"] = schema(rng, depth + 1)
        if maybe() < 0.25:
            out["prefixItems"] = [schema(rng, depth + 1) for _ in range(rng.randrange(3))]
        for key, most in (("minItems", 3), ("maxItems", 5)):
            if maybe() < 0.25:
                out[key] = rng.choice((rng.randrange(most), rng.randrange(most), 2000, 100_000))
        if maybe() < 0.1:
            out["uniqueItems"] = rng.choice((True, False))
    elif kind == "object":
        names = rng.sample(NAMES, rng.randrange(4))
        if maybe() < 0.9:
            out["properties"] = {name: schema(rng, depth + 1) for name in names}
        if maybe() < 0.6:
            out["required"] = rng.sample([*names, rng.choice(NAMES)], rng.randint(0, len(names)))
        if maybe() < 0.4:
            out["additionalProperties"] = rng.choice((True, False, False, schema(rng, depth + 1)))
