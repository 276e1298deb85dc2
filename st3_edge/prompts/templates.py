"""Turns of a conversation to a prompt: text and images in order, by the model's chat template.

Text of a message never becomes an image or a control token: where it holds the written form of one (`<image>`, `</s>`,
`<|im_end|>` ...), a space is put behind the form's first character. Images are told apart from text by a random mark
that is made anew for every prompt, so nothing that a user writes can be one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import PromptError, one_line
from .images import RGB
from .messages import Turn

# LLaVA-1.5's own: https://github.com/haotian-liu/LLaVA/blob/main/llava/conversation.py, conv_vicuna_v1.
VICUNA = (
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ 'USER: ' + message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Written forms of an image that no text may hold, beside the vocabulary's control tokens.
_IMAGE_FORMS = ("<image>", "<__media__>", "<__image__>")


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: text (str) and pictures (RGB), in order. bos: whether a begin-of-sequence token goes before
    all of it (the text holds none there)."""

    parts: tuple[str | RGB, ...]
    bos: bool


class ChatTemplate:
    """Renders turns by a Jinja chat template, in a sandbox.

    `source`: the template, VICUNA by default. `picture_end`: what follows a picture where the template knows none:
    LLaVA was trained with a new line there. `control`: written forms of the vocabulary's control tokens, which no
    message text may hold. `adds_bos`: whether the tokenizer begins every text with `bos`. Raises PromptError where
    the template cannot be parsed or renders nothing of a message.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        bos: str = "",
        eos: str = "",
        control: Iterable[str] = (),
        adds_bos: bool = True,
        picture_end: str = "\n",
    ) -> None:
        self._picture_end = picture_end
        self._bos, self._eos, self._adds_bos = bos, eos, adds_bos
        # Longest first: neutralising a short form inside a long one would leave the long one's rest.
        self._forms = sorted({*_IMAGE_FORMS, *control} - {""}, key=len, reverse=True)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        try:
            (source or VICUNA).encode()
            self._template = environment.from_string(source or VICUNA)
        except Exception as e:  # Jinja's own, and those of Python's compiler behind it
            raise PromptError(f"the chat template cannot be parsed: {one_line(e)}") from e
        self._needs_parts, self._image_form = self._probe()
        if self._image_form:
            self._forms.insert(0, self._image_form)

    def render(self, turns: Sequence[Turn]) -> Prompt:
        """The prompt of `turns`, ending where the assistant's answer begins; BOS is in it once at most."""
        mark = secrets.token_hex(16)
        images = [p for turn in turns for p in turn.parts if isinstance(p, RGB)]
        pieces = self._split_typed(turns, len(images)) if images and self._image_form else None
        if pieces is None:
            pieces = self._run([self._flat(turn, mark) for turn in turns]).split(mark)
        if len(pieces) != len(images) + 1:
            raise PromptError("the chat template drops or repeats pictures of these messages")

        wrote_bos = bool(self._bos) and pieces[0].startswith(self._bos)
        if wrote_bos:
            pieces[0] = pieces[0][len(self._bos) :]
        parts: list[str | RGB] = [pieces[0]]
        for image, piece in zip(images, pieces[1:], strict=True):
            parts += [image, piece]
        return Prompt(tuple(p for p in parts if p != ""), wrote_bos or self._adds_bos)

    def _split_typed(self, turns: Sequence[Turn], n_images: int) -> list[str] | None:
        """The text around the pictures, where the template writes them itself; None if it does not, this time."""
        try:
            text = self._run([self._typed(turn) for turn in turns])
        except PromptError:
            return None
        pieces = text.split(self._image_form)
        return pieces if len(pieces) == n_images + 1 else None

    def _clean(self, text: str) -> str:
        for form in self._forms:
            if form in text:
                # Its first character alone is taken up: the next form may begin with the second, as << does in <<<.
                text = re.sub(f"({re.escape(form[0])})(?={re.escape(form[1:])})", r"\1 ", text)
        return text

    def _parts(self, turn: Turn) -> list[str | RGB]:
        """The parts of a message, without forms, however a template puts the texts together."""
        parts = [p if isinstance(p, RGB) else self._clean(p) for p in turn.parts]
        together = "".join(p for p in parts if isinstance(p, str))
        if self._clean(together) != together:
            return [p if isinstance(p, RGB) else f"{p} " for p in parts]
        return parts

    def _typed(self, turn: Turn) -> dict[str, Any]:
        """The message with its pictures as parts, for a template that writes them itself."""
        if not any(isinstance(p, RGB) for p in turn.parts):
            return self._flat(turn, "")
        parts = [{"type": "image"} if isinstance(p, RGB) else {"type": "text", "text": p} for p in self._parts(turn)]
        return {"role": turn.role, "content": parts}

    def _flat(self, turn: Turn, mark: str) -> dict[str, Any]:
        """The message as one text, each picture a mark."""
        text = "".join(mark + self._picture_end if isinstance(p, RGB) else p for p in self._parts(turn))
        return {"role": turn.role, "content": [{"type": "text", "text": text}] if self._needs_parts else text}

    def _probe(self) -> tuple[bool, str]:
        """Whether content must be a list of parts, and what the template writes for an image part ("" if nothing)."""
        needle = "needle"
        text_part = {"type": "text", "text": needle}
        as_string = self._try(needle)
        as_parts = self._try([text_part])
        # A template that knows strings only prints the list itself, or fails.
        parts_work = needle in as_parts and "'type'" not in as_parts and '"type"' not in as_parts
        if not parts_work:
            if needle not in as_string:
                raise PromptError("the chat template renders nothing of a user's message")
            return False, ""
        with_image = self._try([{"type": "image"}, text_part])
        form = _inserted(as_parts, with_image).strip()
        return needle not in as_string, form

    def _try(self, content: Any) -> str:
        try:
            return self._run([{"role": "user", "content": content}])
        except PromptError:
            return ""

    def _run(self, messages: list[dict[str, Any]]) -> str:
        try:
            text = self._template.render(
                messages=messages,
                bos_token=self._bos,
                eos_token=self._eos,
                add_generation_prompt=True,
                raise_exception=_refuse,
                strftime_now=lambda form: datetime.now().strftime(form),
            )
            text.encode()  # of a template's escapes one can be half a surrogate pair
            return text
        except PromptError:
            raise
        except Exception as e:  # a template is a program from a model file: it can fail in any way
            raise PromptError(f"the chat template fails on these messages: {one_line(e)}") from e


class _Generation(jinja2.ext.Extension):
    """Lets Hugging Face's {% generation %} tag pass, which marks spans for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise PromptError(f"the chat template refuses these messages: {one_line(message)}")


def _inserted(before: str, after: str) -> str:
    """What `after` holds beyond `before`, if that is one run of text inserted; else ""."""
    n = len(after) - len(before)
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    if n <= 0 or before[start:] != after[start + n :]:
        return ""
    # "<image>" put before "<x>" can be read as "image><" put behind "<": the reading in brackets is meant.
    for i in range(start, -1, -1):
        if after[:i] + after[i + n :] != before:
            break
        run = after[i : i + n].strip()
        if run[:1] + run[-1:] in ("<>", "[]"):
            return after[i : i + n]
    return after[start : start + n]
