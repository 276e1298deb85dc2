"""What a call's arguments mean, in OpenAI's shape."""

import numpy as np
import pytest

from st3_edge import ConfigError
from st3_edge.prompts import openai


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"n": 2}, "n other than 1"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto", "tools": [{}]}, "tools"),
        ({"logprobs": 0}, "logprobs"),
        ({"mirostat_mode": 2, "mirostat_tau": 5.0}, "mirostat_mode"),
        ({"n": np.array([1])}, "n other than 1"),
        ({"functions": [{}]}, "functions"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning_effort": "high"}, "reasoning_effort other than 'none'"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"n": True}, "n other than 1"),
    ],
)
def test_what_is_not_supported_is_named(others, named):
    # broken if an argument were ignored: the answer would not be what was asked for
    with pytest.raises(ConfigError, match=f"does not support {named}"):
        openai.check_others(others)


@pytest.mark.parametrize("name", ["max_token", "temprature", "extra"])
def test_a_name_that_is_none_is_pythons_own_error(name):
    # broken if a mistyped keyword ended in another exception than any function's, or passed for its None
    for value in (3, None):
        with pytest.raises(TypeError, match=rf"ask\(\) got an unexpected keyword argument '{name}'"):
            openai.check_others({name: value}, "ask")


def test_what_asks_for_nothing_is_accepted():
    # broken if OpenAI's own client could not be used as it is
    openai.check_others(dict.fromkeys(("n", "tools", "tool_choice", "logprobs", "top_logprobs", "audio")))
    openai.check_others({"n": 1, "tools": [], "tool_choice": "none", "functions": [], "logprobs": False})
    openai.check_others({"n": 1.0, "tools": (), "tool_choice": "auto", "functions": (), "function_call": "auto"})
    openai.check_others({"n": np.int64(1), "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.3, "tfs_z": 1})
    openai.check_others({"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"})
    openai.check_others({"parallel_tool_calls": False, "prompt_cache_key": "x", "modalities": ["text"]})


@pytest.mark.parametrize(
    ("max_tokens", "max_completion_tokens", "limit"),
    [
        (None, None, None),
        (5, None, 5),
        (None, 5, 5),
        (5, 5, 5),
        (0, None, None),
        (-1, None, None),
        (np.int64(5), None, 5),
    ],
)
def test_the_limit_has_two_names(max_tokens, max_completion_tokens, limit):
    # broken if one of them were ignored
    assert type(openai.limit_of(max_tokens, max_completion_tokens)) is type(limit)
    assert openai.limit_of(max_tokens, max_completion_tokens) == limit


@pytest.mark.parametrize("given", [("5", None), (2.5, None), (True, None), (None, "5"), (5, 6), ([], None)])
def test_limits_that_are_none_are_refused(given):
    # broken by a TypeError from deep inside, or by 2.5 tokens
    with pytest.raises(ConfigError):
        openai.limit_of(*given)


@pytest.mark.parametrize("stop", [5, [1], {"a": 1}, object()])
def test_stops_that_are_none_are_refused(stop):
    # broken by a TypeError about iterating
    with pytest.raises(ConfigError, match="stop"):
        openai.stops_of(stop)


@pytest.mark.parametrize(
    ("stream", "options"), [(False, {"include_usage": True}), (True, {"usage": True}), (True, [("include_usage", 1)])]
)
def test_stream_options_that_do_nothing_are_refused(stream, options):
    # broken if a client waited for a chunk that never comes
    with pytest.raises(ConfigError, match="stream_options"):
        openai.includes_usage(stream, options)


@pytest.mark.parametrize(
    ("stream", "options", "asks"),
    [
        (True, {"include_usage": True}, True),
        (True, {"include_usage": False}, False),
        (False, {"include_usage": False}, False),
        (False, None, False),
    ],
)
def test_stream_options_that_ask_for_nothing_are_accepted(stream, options, asks):
    # broken if a client that sends its default were refused
    assert openai.includes_usage(stream, options) is asks
