"""OpenAI's shape of a call: what its arguments mean here, and how an answer is wrapped."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import check_whole, plain
from ..errors import ConfigError
from ..report import Report

Response = dict[str, Any]

# What else OpenAI's client, or llama-cpp-python's caller, may send, and the values, beside None, that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # of the tools that there are not
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "mirostat_mode": (0,),
    "tfs_z": (1.0,),
    "logits_processor": (),
}
# For whoever runs a server, a hint to it, or of a sampler that is off: no answer depends on them.
_IDLE = frozenset(
    {
        "metadata",
        "mirostat_eta",
        "mirostat_tau",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def check_others(others: Mapping[str, Any], function: str = "create_chat_completion") -> None:
    """Raises ConfigError for an argument of OpenAI's that asks for something that is not done here, and TypeError, as
    Python does, for one that is nobody's."""
    for name, value in others.items():
        if name in _IDLE:
            continue
        if name not in _NEUTRAL:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if value is not None and not any(_same(plain(value), neutral) for neutral in _NEUTRAL[name]):
            only = "".join(f" other than {v!r}" for v in _NEUTRAL[name])
            raise ConfigError(f"{function} does not support {name}{only}")


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values are equal, where True is no 1, and a tuple is as good as a list."""
    if isinstance(neutral, list):
        return isinstance(value, (list, tuple)) and list(value) == neutral
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    return isinstance(value, (int, float, str)) and value == neutral


def limit_of(max_tokens: Any, max_completion_tokens: Any) -> int | None:
    """How long an answer may be; None: as long as there is room. Raises ConfigError."""
    given = {"max_tokens": plain(max_tokens), "max_completion_tokens": plain(max_completion_tokens)}
    for name, value in given.items():
        check_whole(name, value, -(2**31), 2**31 - 1, optional=True)
    limits = {value for value in given.values() if value is not None}
    if len(limits) > 1:
        raise ConfigError("max_tokens and max_completion_tokens are the same: give one of them")
    limit = max(limits, default=0)
    return limit if limit > 0 else None


def stops_of(stop: Any) -> Sequence[str]:
    """The strings that end an answer. Raises ConfigError."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) for s in stops):
        raise ConfigError("stop is a string or a list of strings")
    return stops


def includes_usage(stream: Any, options: Any) -> bool:
    """Whether a stream ends with a chunk that counts its tokens. Raises ConfigError."""
    if options is None:
        return False
    asks = isinstance(options, Mapping) and bool(options.get("include_usage"))
    if not isinstance(options, Mapping) or options.keys() - {"include_usage"} or (asks and not stream):
        raise ConfigError('stream_options is {"include_usage": True}, and goes with stream=True')
    return asks


def _head(kind: str, model: str) -> Response:
    """What all of an answer's chunks, or its one object, begin with."""
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def completion(model: str, n_prompt: int, report: Report) -> Response:
    """A whole answer."""
    message = {"role": "assistant", "content": report.answer}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": report.finish_reason}
    return {
        **_head("chat.completion", model),
        "choices": [choice],
        "usage": _usage(n_prompt, report),
        "st3": report.to_dict(),
    }


def chunks(model: str, n_prompt: int, pieces: Iterator[tuple[Report, str]], usage: bool) -> Iterator[Response]:
    """An answer piece by piece; with `usage` one more chunk, which counts its tokens."""
    of_all = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> Response:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**of_all, "choices": [choice], **({"usage": None} if usage else {})}

    yield chunk({"role": "assistant"})
    for report, piece in pieces:  # noqa: B007  the last one's report is read below
        if piece:
            yield chunk({"content": piece})
    yield {**chunk({}, report.finish_reason), "st3": report.to_dict()}
    if usage:
        yield {**of_all, "choices": [], "usage": _usage(n_prompt, report)}


def _usage(n_prompt: int, report: Report) -> dict[str, int]:
    n = report.n_generated
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
