"""JSON Schema's keywords: which there are, what their values must be, and what two schemas say together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError

Schema = Mapping[str, Any]

ANNOTATIONS = {
    "$comment", "$defs", "$schema", "default", "definitions", "deprecated", "description", "discriminator", "example",
    "examples", "readOnly", "title", "writeOnly",
}  # fmt: skip
JOINING = {"$ref", "allOf", "anyOf", "oneOf", "const", "enum", "type"}
# What says something about one type alone.
OF_TYPE: dict[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_KNOWN = ANNOTATIONS | JOINING | frozenset().union(*OF_TYPE.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


# What the value of a keyword must be.
_SHAPES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("a string", lambda v: isinstance(v, str), ("$ref", "pattern", "format")),
    ("a number", _is_number, ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("a whole number, 0 or more", _is_count, ("minLength", "maxLength", "minItems", "maxItems")),
    ("true or false", lambda v: isinstance(v, bool), ("uniqueItems",)),
    ("a type or a list of types", lambda v: _is_names([v]) or (_is_names(v) and bool(v)), ("type",)),
    ("a list of names", _is_names, ("required",)),
    ("an object", lambda v: isinstance(v, Mapping) and _is_names(list(v)), ("properties",)),
    ("a list", lambda v: isinstance(v, (list, tuple)), ("prefixItems",)),
    (
        "a list with something in it",
        lambda v: isinstance(v, (list, tuple)) and bool(v),
        ("allOf", "anyOf", "oneOf", "enum"),
    ),
)

_LEAP_YEAR = r"([12]\d(0[48]|[2468][048]|[13579][26])|(1[26]|2[048])00)"
_DATE = (
    r"([12]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "ipv4": rf"^{_OCTET}(\.{_OCTET}){{3}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,5}}$",
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL}){{1,4}}$",
    "uri": rf"^https?://{_LABEL}(\.{_LABEL}){{0,4}}(:[1-9]\d{{0,3}})?(/[A-Za-z0-9._~-]*)*$",
}


def says(schema: Schema) -> set[str]:
    return {key for key in schema if key not in ANNOTATIONS and key != "$id"}


def check(schema: Any, at: str) -> None:
    if not isinstance(schema, Mapping):
        raise ConfigError(f"a JSON schema is an object or a truth value, not {type(schema).__name__}, at {at}")
    for key in schema:
        if key not in _KNOWN and not (key == "$id" and at == "#"):
            raise ConfigError(f"the JSON schema keyword {str(key)[:80]!r} cannot be enforced, at {at}")
    for what, fits, keys in _SHAPES:
        for key in keys:
            if key in schema and not fits(schema[key]):
                raise ConfigError(f"{key} is {what} in a JSON schema, at {at}")


def merged(a: dict[str, Any], b: dict[str, Any], at: str) -> dict[str, Any]:
    """What is valid by both."""
    for one, other in ((a, b), (b, a)):
        closed = one.get("additionalProperties", True) is not True
        if closed and set(other.get("properties", {})) - set(one.get("properties", {})):
            raise ConfigError(f"additionalProperties cannot be enforced in a part of allOf, at {at}")
    out = {**a, **b}
    for key in a.keys() & b.keys():
        ours, theirs = a[key], b[key]
        if key_of(ours) == key_of(theirs):
            continue
        if key == "properties":
            out[key] = {
                name: {"allOf": [ours[name], theirs[name]]}
                if name in ours and name in theirs
                else {**ours, **theirs}[name]
                for name in {**ours, **theirs}
            }
        elif key == "required":
            out[key] = [*ours, *theirs]
        elif key == "type":
            lists = [[t] if isinstance(t, str) else t for t in (ours, theirs)]
            out[key] = [t for t in with_integer(lists[0]) if t in with_integer(lists[1])]
        elif key == "enum":
            texts = {key_of(v) for v in theirs}
            out[key] = [v for v in ours if key_of(v) in texts]
        elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
            out[key] = max(ours, theirs)
        elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
            out[key] = min(ours, theirs)
        else:
            raise ConfigError(f"{key!r} cannot be enforced where a JSON schema gives it twice, at {at}")
    return out


def with_integer(types: Sequence[str]) -> list[str]:
    return [*types, "integer"] if "number" in types and "integer" not in types else list(types)


def key_of(value: Any) -> str:
    """Equal for values that are equal in JSON."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float) and not value.is_integer():
        return "number"
    kinds = {type(None): "null", int: "integer", float: "integer", str: "string", list: "array", tuple: "array"}
    return kinds.get(type(value), "object")
