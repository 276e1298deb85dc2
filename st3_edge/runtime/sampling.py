"""How the next token is chosen: llama.cpp's own samplers, in the order that llama-cpp-python chains them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import check_whole, is_number, plain
from ..errors import ConfigError, St3Error
from ..native import libraries, log, st3
from ..prompts.grammar import gbnf, schema

_RANDOM_SEED = 2**32 - 1  # LLAMA_DEFAULT_SEED: a new one each time
_PENALTY_WINDOW = 64
# Of biases, penalties and the like: within it float32 holds whatever they make of a logit, one after the other.
_MOST = 1e9
_COLDEST = 1e-20  # a temperature below: what logits are divided by it float32 would not hold


class Chain:
    """llama.cpp's samplers, one after the other; `sampler` is their llama_sampler. Freed with the object."""

    def __init__(self) -> None:
        self._lib = lib = libraries.load().lib
        self.sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())

    def __del__(self) -> None:
        self._lib.llama_sampler_free(self.sampler)

    def add(self, name: str, *arguments: Any) -> bool:
        """Puts llama_sampler_init_`name` of the arguments behind the others; False where it makes none."""
        sampler = getattr(self._lib, f"llama_sampler_init_{name}")(*arguments)
        if sampler:  # a null one would crash later
            self._lib.llama_sampler_chain_add(self.sampler, sampler)
        return bool(sampler)

    def sample(self, context: Any) -> int:
        """A token by the logits that the last decode left, which counts as said from then on. Raises St3Error where
        none may follow."""
        token = st3.sample(self.sampler, context)
        if token is None:
            raise St3Error("no token of this model may follow by the grammar and the bans of this answer")
        return token


@dataclass(frozen=True)
class Sampling:
    """Sampling options, with the meaning that llama-cpp-python gives them. temperature 0 takes the likeliest token.

    seed: None, or a negative number, for another one each time. grammar: GBNF text or a
    llama_cpp.LlamaGrammar. logit_bias: token id -> added to its logit, -1e9 to 1e9; -inf bans the token, as -1e9 does.
    Raises ConfigError for values out of range.
    """

    temperature: float = 0.2
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    grammar: Any = None
    logit_bias: Mapping[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        for name in ("temperature", "top_p", "min_p", "typical_p"):
            self._number(name, 0.0)
        self._number("repeat_penalty", 1 / _MOST)
        for name in ("frequency_penalty", "presence_penalty"):
            self._number(name, -_MOST)
        check_whole("top_k", self.top_k, -(2**31), 2**31 - 1)
        check_seed(self.seed)

    def _number(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if not is_number(value) or not low <= value <= _MOST:
            raise ConfigError(f"{name} must be a number from {low:g} to {_MOST:g}, not {value!r}")

    def chain(self, vocab: Any, n_vocab: int) -> Chain:
        """The samplers. vocab: the llama_vocab that the grammar's tokens are of."""
        chain = Chain()
        if self.logit_bias:
            lib, biases = libraries.load().lib, _biases(self.logit_bias, n_vocab)
            array = (lib.llama_logit_bias * len(biases))(*(lib.llama_logit_bias(*item) for item in biases.items()))
            chain.add("logit_bias", n_vocab, len(biases), array)
        chain.add(
            "penalties",
            n_vocab,
            _PENALTY_WINDOW,
            self.repeat_penalty,
            self.frequency_penalty,
            self.presence_penalty,
        )
        if self.grammar is not None:
            self._add_grammar(chain, vocab)
        if self.temperature < _COLDEST:
            chain.add("greedy")
        else:
            chain.add("top_k", self.top_k)
            chain.add("typical", self.typical_p, 1)
            chain.add("top_p", self.top_p, 1)
            chain.add("min_p", self.min_p, 1)
            chain.add("temp", self.temperature)
            # Whatever seed is asked for, it is never the one that stands for a new one each time.
            chain.add("dist", _RANDOM_SEED if self.seed is None or self.seed < 0 else self.seed % _RANDOM_SEED)
        return chain

    def _add_grammar(self, chain: Chain, vocab: Any) -> None:
        text, root = getattr(self.grammar, "_grammar", self.grammar), getattr(self.grammar, "_root", "root")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a grammar is GBNF text or a llama_cpp.LlamaGrammar, and not empty")
        gbnf.check(text, root)
        log.forget()
        if not chain.add("grammar", vocab, text.encode(), root.encode()):
            raise ConfigError(f"the grammar is not valid GBNF{log.why()}")


def _biases(given: Mapping[Any, float], n_vocab: int) -> dict[int, float]:
    try:
        # JSON's keys are text.
        biases = {int(t) if isinstance(t, str) else operator.index(t): float(bias) for t, bias in given.items()}
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise ConfigError("logit_bias maps token ids to numbers") from e
    for token in biases:
        check_whole("a token id of logit_bias", token, 0, n_vocab - 1)
    # Infinite ones would become NaN on their way through the samplers.
    biases = {token: -_MOST if bias == -math.inf else bias for token, bias in biases.items()}
    if not all(abs(bias) <= _MOST for bias in biases.values()):
        raise ConfigError(f"logit_bias must be from {-_MOST:g} to {_MOST:g}, or -inf")
    return biases


def check_seed(seed: Any) -> None:
    """Raises ConfigError where `seed` is neither None nor a whole number of 64 bits."""
    check_whole("seed", seed, -(2**63), 2**63 - 1, optional=True)


# The kinds of an OpenAI response_format, and what else each may hold.
_FORMATS: dict[str, frozenset[str]] = {
    "text": frozenset(),
    "json_object": frozenset({"schema"}),
    "json_schema": frozenset({"json_schema"}),
}
_OF_SCHEMA = frozenset({"name", "description", "strict", "schema"})


def response_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """The grammar (GBNF) of an OpenAI response_format: {"type": "text"}, {"type": "json_object"} with or without
    "schema", or {"type": "json_schema", "json_schema": {"schema": ...}}, beside which name, description and strict may
    stand: a schema is always followed. Raises ConfigError for another, or a schema that cannot become a grammar."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ConfigError(
            'response_format is {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"schema": ...}}'
        )
    _check_keys(response_format, _FORMATS[kind] | {"type"}, "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return schema.to_gbnf(response_format.get("schema", {"type": "object"}))
    of_schema = response_format.get("json_schema")
    if not isinstance(of_schema, Mapping) or "schema" not in of_schema:
        raise ConfigError('response_format lacks "json_schema": {"schema": ...}')
    _check_keys(of_schema, _OF_SCHEMA, "response_format's json_schema")
    return schema.to_gbnf(of_schema["schema"])


def _check_keys(given: Mapping[Any, Any], known: frozenset[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{what} does not support {key!r}")
