"""Random JSON schemas: each is refused by name, or whatever its grammar lets through is valid by it."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections import Counter

import jsonschema

from st3_edge import ConfigError
from st3_edge.grammar.schema import to_gbnf

from . import schemas
from .words import Words

_SLOWEST = 10.0  # seconds


def one(rng: random.Random, tried: Counter[str]) -> str | None:
    """Tries one schema; returns its grammar, where there is one. Raises AssertionError, with the schema in it."""
    schema = schemas.schema(rng)
    tried["schemas"] += 1
    started = time.perf_counter()
    try:
        grammar = to_gbnf(schema)
    except ConfigError as e:
        tried["refused"] += 1
        assert "\n" not in str(e), (schema, str(e))
        return None
    finally:
        took = time.perf_counter() - started
        assert took < _SLOWEST, (schema, took)
    validator = jsonschema.Draft202012Validator
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError:
        return grammar  # an annotation, or a definition that nothing refers to, is not as it must be
    valid = validator(schema, format_checker=validator.FORMAT_CHECKER)
    words = Words(grammar)
    for _ in range(5 if words.ends else 0):
        text = words.draw(rng)
        if text is None:
            continue
        tried["words"] += 1
        try:
            errors = [e.message for e in valid.iter_errors(json.loads(text))]
        except RecursionError:  # jsonschema's own, in a schema that refers to itself
            continue
        assert not errors, (json.dumps(schema), text, errors[0])
    return grammar


def run(rng: random.Random, seconds: float) -> Counter[str]:
    """Tries schemas for so long; returns how many of what."""
    tried: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.perf_counter() < end:
            one(rng, tried)
    return tried
