"""Random messages and arguments: whatever a message holds is in the prompt, or an error names what is not read."""

from __future__ import annotations

import base64
import io
import math
import random
import time
from collections import Counter
from typing import Any

from PIL import Image

from st3_edge import ConfigError, ImageError, PromptError
from st3_edge.prompts import openai
from st3_edge.prompts.images import RGB
from st3_edge.prompts.messages import read_messages

from . import isolated

_KEYS = ("role", "content", "images", "name", "tool_calls", "refusal", "annotations", "imges", "tool_call_id", "audio")
_ARGUMENTS = (
    "n", "tools", "tool_choice", "logprobs", "top_logprobs", "user", "store", "metadata", "seeed", "max_token", "audio",
    "parallel_tool_calls", "service_tier", "reasoning_effort", "functions", "mirostat_mode", "tfs_z", "x",
)  # fmt: skip


class _Made:
    """Messages, and the leaves that they hold: texts and pictures, each another one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.texts, self.colors = rng, [], []
        self.messages = [self._message() for _ in range(rng.choice((0, 1, 1, 2, 3, 4)))]
        if rng.random() < 0.02:
            self.messages = rng.choice((None, "hello", 3, {"role": "user"}, [None]))

    def _text(self) -> str:
        text = f"text{len(self.texts)}." + self.rng.choice(("", "é", "<image>", "\n", " {{ x }}"))
        self.texts.append(text)
        return text

    def _picture(self) -> Any:
        color = (len(self.colors), 7, 9)
        self.colors.append(color)
        image = Image.new("RGB", (4, 4), color)
        out = io.BytesIO()
        image.save(out, "PNG")
        data = out.getvalue()
        text = base64.b64encode(data).decode()
        return self.rng.choice((image, data, f"data:image/png;base64,{text}", f"data:;base64,{text}"))

    def _odd(self) -> Any:
        return self.rng.choice(
            (None, 3, "", [], {}, True, "\ud800", b"x", [None], {"a": {"b": 1}}, 1.5, ["x"], {"url": 3})
        )

    def _part(self) -> Any:
        kind = self.rng.choice(("text", "text", "image_url", "image", "audio", "input_text"))
        part: dict[str, Any] = {"type": kind}
        if kind == "image_url":
            part[kind] = self._picture()
            if self.rng.random() < 0.6:
                part[kind] = {"url": part[kind]}
            if isinstance(part[kind], dict) and self.rng.random() < 0.3:
                part[kind][self.rng.choice(("detail", "detail", "size"))] = self.rng.choice(
                    ("low", "auto", "huge", None)
                )
        elif kind == "image":
            part[self.rng.choice(("image", "image", "url", "source"))] = self._picture()
        else:
            part[self.rng.choice(("text", "text", "text", kind))] = self._text()
        if self.rng.random() < 0.05:
            part[self.rng.choice(("cache_control", "detail", "text", "type"))] = self._odd()
        return self._odd() if self.rng.random() < 0.02 else part

    def _message(self) -> Any:
        rng = self.rng
        role = rng.choice(("user", "user", "user", "assistant", "system", "developer", "tool"))
        message: dict[str, Any] = {"role": role}
        if rng.random() < 0.95:
            message["content"] = self._text() if rng.random() < 0.5 else [self._part() for _ in range(rng.randrange(4))]
        if rng.random() < 0.15:
            message["images"] = [self._picture() for _ in range(rng.randrange(3))]
        if rng.random() < 0.1:
            message[rng.choice(_KEYS)] = self._odd()
        return message


def _check(messages: Any, texts: list[str], colors: list[tuple[int, int, int]]) -> str:
    try:
        turns = read_messages(messages)
    except (PromptError, ImageError) as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 500
        return "refused"
    read = [part for turn in turns for part in turn.parts]
    # What an odd value took the place of is in no message any more.
    held = repr(messages)
    assert [p for p in read if isinstance(p, str) and p.startswith("text")] == [
        t for t in texts if repr(t)[1:-1] in held
    ]
    seen = {tuple(p.data[:3]) for p in read if isinstance(p, RGB)}
    n_pictures = sum(isinstance(p, RGB) for p in read)
    assert n_pictures == len(seen) <= len(colors)
    _keys(messages)
    return "read"


def _keys(messages: list[dict[str, Any]]) -> None:
    """All keys of messages that were read are such as a person may expect to be."""
    for message in messages:
        full = {key for key, value in message.items() if value}
        assert full <= {"role", "content", "images"}, message
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for part in parts:
            (key,) = part.keys() - {"type"}
            assert (part["type"], key) in {
                ("text", "text"), ("image_url", "image_url"), ("image", "image"), ("image", "url"), ("image", "path"),
            }, part  # fmt: skip
            if isinstance(part[key], dict):
                assert part[key].keys() <= {"url", "detail"}, part
        shown = len(message.get("images") or ()) + sum(part["type"] != "text" for part in parts)
        assert shown == 0 or message["role"] == "user", message


def _argument(rng: random.Random) -> None:
    name = rng.choice(_ARGUMENTS)
    value = rng.choice((None, 1, 0, True, False, [], "none", "auto", {}, {"a": "b"}, 5.0, "x"))
    known = {*openai._NEUTRAL, *openai._IDLE}
    try:
        openai.check_others({name: value})
    except TypeError as e:
        assert name not in known, (name, value)
        assert repr(name) in str(e)
    except ConfigError as e:
        assert name in str(e)
        assert value is not None, name
    else:
        assert name in known, name


def run(rng: random.Random, seconds: float, most: float = math.inf) -> Counter[str]:
    """Tries messages for so long, and `most` of them; returns how many of what."""
    tried: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    while isolated.until(end) and tried["inputs"] < most:
        made = _Made(rng)
        tried["inputs"] += 1
        started = time.process_time()
        try:
            tried[_check(made.messages, made.texts, made.colors)] += 1
        except Exception as e:
            raise AssertionError(f"{made.messages!r:.3000}") from e
        assert time.process_time() - started < 10, made.messages
        _argument(rng)
        tried["arguments"] += 1
    return tried
