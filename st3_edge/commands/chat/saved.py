"""The messages of a saved conversation, whoever saved them, as a chat holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...errors import ImageError, PromptError, StateError, one_line
from ...prompts.messages import parts_of, read_messages


class Conversation(NamedTuple):
    """messages: questions and answers in turn; question: the parts of a last one that has no answer, else []."""

    system: str
    messages: list[dict[str, Any]]
    question: list[dict[str, Any]]


def conversation(messages: Any) -> Conversation:
    """What `load_state` returned, in a chat's form. Raises StateError where a chat cannot go on with it: no messages,
    none of `read_messages`, a picture that is no longer there, or others than questions and answers in turn."""
    if not isinstance(messages, list):
        raise StateError("the file holds no messages to go on with: save_state(path, messages) keeps them")
    try:
        read_messages([*messages, {"role": "user", "content": "?"}])
    except (ImageError, PromptError) as e:
        raise StateError(f"the messages of the file are no conversation: {one_line(e)}") from e
    system = ""
    if messages and messages[0]["role"] in ("system", "developer"):
        system, messages = _text(messages[0]), messages[1:]
    if [message["role"] for message in messages] != [("user", "assistant")[i % 2] for i in range(len(messages))]:
        raise StateError("the messages of the file are not questions and answers in turn")
    said = [{"role": m["role"], "content": parts_of(m) if m["role"] == "user" else _text(m)} for m in messages]
    question = said.pop()["content"] if len(said) % 2 else []
    return Conversation(system, said, question)


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in parts_of(message))
