"""Messages in the OpenAI shape to turns: checked, and their pictures loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from .images import RGB, as_source, load, load_base64

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant")  # developer: OpenAI's newer name for system

# What a message may hold; what else a client's library writes into it, and nothing is lost by leaving out while it is
# empty; and what each type of part may hold. Whatever else is there is refused by name.
_MESSAGE = frozenset({"role", "content", "images"})
_EMPTY_IN_MESSAGE = frozenset(
    {"annotations", "audio", "function_call", "name", "reasoning_content", "refusal", "thinking", "tool_calls"}
)
_PARTS = {
    "text": frozenset({"text"}),
    "image_url": frozenset({"image_url"}),
    "image": frozenset({"image", "url", "path"}),
}
_IMAGE_URL = frozenset({"url", "detail"})
_DETAILS = ("auto", "low", "high")  # a hint to OpenAI's models: LLaVA sees a picture in one way


@dataclass(frozen=True)
class Turn:
    """One message: its text parts (str) and pictures (RGB), in order."""

    role: str
    parts: tuple[str | RGB, ...]


def read_messages(messages: Sequence[Message]) -> list[Turn]:
    """Checks messages in the OpenAI shape and loads their pictures.

    A message has a role of ROLES and content: a string, or a list of parts {"type": "text", "text": str},
    {"type": "image_url", "image_url": source or {"url": source}} or {"type": "image", "image": source} (or url, or
    path), where a source is what `load` takes; an assistant's None is an empty text. It may also have
    Ollama's images: a list of sources, or of base64 alone, which are shown before the content. Raises PromptError for
    another shape, a key that is not known, or where the last message, a user's, holds nothing; ImageError for a picture
    that cannot be used.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise PromptError("messages must be a list with at least one message")
    turns = [_read_message(message) for message in messages]
    if any(turn.role == "system" for turn in turns[1:]):
        raise PromptError("a system message can only be the first")
    if turns[-1].role != "user":
        raise PromptError("the last message must be a user's")
    if not any(isinstance(p, RGB) or p.strip() for p in turns[-1].parts):
        raise PromptError("the question is empty")
    return turns


def _read_message(message: Message) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise PromptError(f"a message is an object with a role of {', '.join(ROLES)} and content")
    role, content = message["role"], message.get("content")
    for key, value in message.items():
        if key in _MESSAGE or (key in _EMPTY_IN_MESSAGE and not value):
            continue
        if key in ("tool_calls", "function_call"):
            raise PromptError(f"a message with {key} cannot become a prompt: tools are not supported")
        raise PromptError(f"a message with {key!r} cannot become a prompt: it has role, content and images")
    if role == "developer":
        role = "system"
    images = message.get("images") or []
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray)):
        raise PromptError("the images of a message are a list")
    if content is None and (role == "assistant" or images):
        content = ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise PromptError("the content of a message is a string or a list of parts")
    shown = [load_base64(image) if isinstance(image, str) else load(image) for image in images]
    parts = (*shown, *(_read_part(part) for part in content))
    if role != "user" and any(isinstance(p, RGB) for p in parts):
        raise PromptError(f"a message of the role {role} cannot hold a picture")
    return Turn(role, parts)


def parts_of(message: Message) -> list[dict[str, Any]]:
    """The content of a message that `read_messages` takes, in one form: parts {"type": "text", "text": str} and
    {"type": "image", "image": source}, whose sources `load` takes, in order."""
    content = message.get("content") or []
    pairs = [("text", content)] if isinstance(content, str) else [_value(part) for part in content]
    shown = [as_source(image) if isinstance(image, str) else image for image in message.get("images") or []]
    form = [("image", image) for image in shown] + pairs
    return [{"type": kind, kind: value} for kind, value in form]


def _read_part(part: Any) -> str | RGB:
    kind, value = _value(part)
    return _read_text(value) if kind == "text" else load(value)


def _value(part: Any) -> tuple[str, Any]:
    """A part's text, or its picture's source, behind "text" or "image"."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    keys = _PARTS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    given = [key for key in part if key != "type"] if keys else []
    if len(given) != 1 or given[0] not in keys:
        other = next((key for key in given if key not in keys), None)
        said = "" if other is None else f", and does not hold {other!r}"
        raise PromptError(
            f"a part of a message is of the type text, image_url or image, with a field of that name{said}"
        )
    value = part[given[0]]
    if kind == "image_url" and isinstance(value, Mapping):
        for key in value:
            if key not in _IMAGE_URL:
                raise PromptError(f"an image_url holds url and detail, not {key!r}")
        if value.get("detail") not in (None, *_DETAILS):
            raise PromptError(f"the detail of an image_url is one of {', '.join(_DETAILS)}")
        value = value.get("url")
    return ("text" if kind == "text" else "image"), value


def _read_text(text: Any) -> str:
    if not isinstance(text, str):
        raise PromptError("the text of a message is a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise PromptError("the text of a message is not valid Unicode") from e
    return str(text)
