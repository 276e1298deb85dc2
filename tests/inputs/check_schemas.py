"""Random JSON schemas: each is refused by name, or whatever its grammar lets through is valid by it, and native code
reads the grammar and samples by it."""

from __future__ import annotations

import functools
import json
import math
import random
import time
import warnings
from collections import Counter
from typing import Any

import jsonschema

from st3_edge import ConfigError, demo
from st3_edge.native import libraries
from st3_edge.prompts.grammar.schema import to_gbnf
from st3_edge.runtime.sampling import Sampling

from . import isolated, schemas
from .words import Words

_SLOWEST = 10.0  # seconds
_BATCH = 50


def one(rng: random.Random, tried: Counter[str]) -> str | None:
    """Tries one schema; returns its grammar, where there is one. Raises AssertionError, with the schema in it."""
    schema = schemas.schema(rng)
    tried["inputs"] += 1
    started = time.process_time()
    try:
        grammar = to_gbnf(schema)
    except ConfigError as e:
        tried["refused"] += 1
        assert "\n" not in str(e), (schema, str(e))
        return None
    finally:
        took = time.process_time() - started
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


@functools.cache
def _vocabulary() -> Any:
    lib = libraries.load().lib
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(demo.model_paths()[0]).encode(), params)
    return lib.llama_model_get_vocab(model)


def _sample(grammar: str) -> int:
    """Samples by a grammar from noise, some tokens long."""
    lib, vocab = libraries.load().lib, _vocabulary()
    n = lib.llama_vocab_n_tokens(vocab)
    rng = random.Random(grammar)
    chain = Sampling(grammar=grammar, temperature=1.0, seed=1).chain(vocab, n)
    for i in range(12):
        data = (lib.llama_token_data * n)(*(lib.llama_token_data(t, rng.gauss(0, 3), 0.0) for t in range(n)))
        array = lib.llama_token_data_array(data=data, size=n, selected=-1, sorted=False)
        lib.llama_sampler_apply(chain.sampler, array)
        token = array.data[array.selected].id
        if lib.llama_vocab_is_eog(vocab, token):
            return i
        lib.llama_sampler_accept(chain.sampler, token)
    return 12


def run(rng: random.Random, seconds: float, most: float = math.inf, *, native: bool) -> Counter[str]:
    """Tries schemas for so long, and `most` of them; returns how many of what. `native`: also by llama.cpp, with the
    built libraries."""
    tried: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    grammars: list[str] = []
    if native:
        _vocabulary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while isolated.until(end) and tried["inputs"] < most:
            grammar = one(rng, tried)
            if native and grammar:
                grammars.append(grammar)
            if len(grammars) == _BATCH:
                tried["sampled"] += sum(isolated.each(_sample, grammars, 60))
                grammars.clear()
    return tried
