"""The sampling options: what each leaves of a fixed distribution, and that a completion hands them on."""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Iterable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from st3_edge import ConfigError, Llava
from st3_edge.native import libraries
from st3_edge.runtime.sampling import Sampling

SEED = 20241220
CAPTION = "Describe the image."
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SHARES = {4: 0.4, 1: 0.25, 5: 0.15, 0: 0.1, 3: 0.06, 2: 0.04}  # token: probability
RANGES = {  # of options drawn at random
    "top_p": (0.5, 1.0),
    "min_p": (0.0, 0.2),
    "typical_p": (0.6, 1.1),
    "repeat_penalty": (0.8, 1.6),
    "frequency_penalty": (-0.3, 0.5),
    "presence_penalty": (-0.3, 0.5),
}
LOGITS = [math.log(SHARES[token]) for token in range(6)]


def sample(logits: list[float], said: Iterable[int] = (), **options) -> tuple[dict[int, float], int]:
    """The tokens that the chain leaves with their logits, and the one it takes. `said` are the answer so far."""
    return left(Sampling(**{**NEUTRAL, **options}).chain(None, len(logits)), logits, said)


def left(chain: Any, logits: list[float], said: Iterable[int]) -> tuple[dict[int, float], int]:
    """What `sample` returns, of a chain."""
    lib = libraries.load().lib
    sampler = ctypes.cast(chain.sampler, lib.llama_sampler_p_ctypes)  # theirs are of other ctypes classes
    for token in said:
        lib.llama_sampler_accept(sampler, token)
    data = (lib.llama_token_data * len(logits))(*(lib.llama_token_data(i, x, 0.0) for i, x in enumerate(logits)))
    array = lib.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    lib.llama_sampler_apply(sampler, ctypes.byref(array))
    return {array.data[i].id: array.data[i].logit for i in range(array.size)}, array.data[array.selected].id


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 2}, {4, 1}),
        ({"top_p": 0.7}, {4, 1, 5}),
        ({"min_p": 0.2}, {4, 1, 5, 0}),
        ({"typical_p": 0.35}, {1, 5}),  # their surprise is nearest to the entropy, 1.53
        ({"top_p": 0.7, "temperature": 5.0}, {4, 1, 5}),  # temperature comes last
        ({"top_k": 3, "min_p": 0.5}, {4, 1}),
    ],
)
def test_unlikely_tokens_are_left_out(options: dict, tokens: set[int]) -> None:
    # broken if an option did nothing, did another's work, or came in another order
    assert set(sample(LOGITS, **options)[0]) == tokens


def test_the_defaults_are_llama_cpp_pythons(llama_cpp) -> None:
    # broken if a call without options sampled otherwise than the same call there
    theirs = inspect.signature(llama_cpp.Llama.create_chat_completion).parameters
    ours = inspect.signature(Llava.create_chat_completion).parameters
    for option in fields(Sampling):
        if option.name != "logit_bias":
            assert theirs[option.name].default == option.default, option.name
            assert ours[option.name].default is None, option.name  # which stands for Sampling's


def test_the_chain_is_llama_cpp_pythons(llama_cpp) -> None:
    # broken if our chain had its samplers in another order, or left more or less than theirs
    rng = np.random.default_rng(SEED)
    print("seed", SEED)
    llama = llama_cpp.Llama
    stand_in = SimpleNamespace(_n_vocab=50, last_n_tokens_size=64, _seed=SEED)
    for _ in range(200):
        logits, said = rng.normal(0, 2, 50).tolist(), rng.integers(0, 50, 90).tolist()
        options = {name: float(rng.uniform(*ends)) for name, ends in RANGES.items()} | {"top_k": int(rng.integers(50))}
        temperature = float(rng.choice([0.0, 0.3, 1.0, 2.0]))
        wanted = left(llama._init_sampler(stand_in, temp=temperature, **options), logits, said)
        assert sample(logits, said, temperature=temperature, seed=SEED, **options) == wanted, (temperature, options)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_logits(temperature: float) -> None:
    # broken if temperature did nothing
    assert sample(LOGITS, temperature=temperature)[0] == pytest.approx(
        {token: x / temperature for token, x in enumerate(LOGITS)}, rel=1e-6
    )


def test_numpys_numbers_are_numbers() -> None:
    # broken if they were refused, or were none for ctypes
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int32(7), "top_p": np.float64(0.75)}
    assert sample(LOGITS, **given) == sample(LOGITS, temperature=0.5, top_k=3, seed=7, top_p=0.75)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e308},
        {"repeat_penalty": 1e-50},
        {"repeat_penalty": 1e39},
        {"frequency_penalty": 1e39},
        {"presence_penalty": -1e308},
        {"top_p": 1e308},
    ],
    ids=lambda options: next(iter(options)),
)
def test_numbers_that_float32_does_not_hold_are_refused(options: dict) -> None:
    # broken if one became infinite on its way to the samplers, whose probabilities are none then
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)


def test_the_largest_numbers_together_stay_finite() -> None:
    # broken if what is accepted one by one became infinite or NaN in the samplers
    extremes = {"frequency_penalty": -1e9, "presence_penalty": -1e9, "logit_bias": {0: 1e9}, "seed": SEED}
    for repeat_penalty, temperature in ((1e-9, 1e-20), (1e9, 1e9), (1e-9, 1e-19), (1e9, 1e-300)):
        logits, token = sample(LOGITS, [0] * 64, repeat_penalty=repeat_penalty, temperature=temperature, **extremes)
        assert token in logits and all(map(math.isfinite, logits.values()))


def test_what_was_said_is_penalized() -> None:
    # broken if a penalty did nothing, stood in for another, or forgot how often a token was said
    logits, said = [2.0, -1.0, 1.0], [0, 0, 1]
    for options, wanted in (
        ({"repeat_penalty": 1.6}, [1.25, -1.6, 1.0]),
        ({"frequency_penalty": 0.5}, [1.0, -1.5, 1.0]),
        ({"presence_penalty": 0.25}, [1.75, -1.25, 1.0]),
    ):
        assert sample(logits, said, **options)[0] == pytest.approx(dict(enumerate(wanted)), rel=1e-6), options
    assert sample(logits, said, temperature=0)[1] == 0
    assert sample(logits, said, temperature=0, frequency_penalty=0.6)[1] == 2


def test_penalties_look_at_64_tokens() -> None:
    # broken if the window were another one
    for n, wanted in ((63, 1.0), (64, 2.0)):
        assert sample([2.0, 0.0, 1.0], [0, *[1] * n], presence_penalty=1.0)[0][0] == wanted


def test_a_bias_is_added() -> None:
    # broken if logit_bias did nothing
    assert sample([2.0, 0.0, 1.0], logit_bias={1: 2.5})[0] == {0: 2.0, 1: 2.5, 2: 1.0}


def test_the_seed_decides() -> None:
    # broken if draws ignored the seed, or the shares
    drawn = [sample(LOGITS, seed=seed)[1] for seed in range(400)]
    assert drawn == [sample(LOGITS, seed=seed)[1] for seed in range(400)]
    for token, share in SHARES.items():
        assert abs(drawn.count(token) / 400 - share) < 0.1


def test_every_seed_is_one() -> None:
    # broken if llama.cpp's mark for a new seed each time, 2**32 - 1, were passed on
    for seed in (2**32 - 1, 2**33 - 1, 2**63 - 1):
        assert len({sample(LOGITS, seed=seed)[1] for _ in range(20)}) == 1


def test_a_completion_hands_its_options_on(llava, monkeypatch) -> None:
    # broken if an option were dropped on the way, or took another's place
    options = {
        "temperature": 0.7,
        "top_p": 0.91,
        "top_k": 7,
        "min_p": 0.03,
        "typical_p": 0.97,
        "repeat_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "seed": 5,
        "logit_bias": {3: 1.5},
    }
    chain, seen = Sampling.chain, []
    monkeypatch.setattr(Sampling, "chain", lambda self, *given: seen.append(self) or chain(self, *given))
    llava.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=1, **options)
    assert seen == [Sampling(**options)]


def test_one_candidate_is_the_likeliest(llava, picture: str) -> None:
    # broken if top_k did not reach the sampler
    greedy = llava.ask(picture, CAPTION, temperature=0, max_tokens=12)
    assert llava.ask(picture, CAPTION, temperature=5.0, top_k=1, seed=1, max_tokens=12) == greedy
    assert llava.ask(picture, CAPTION, temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, max_tokens=12) != greedy
