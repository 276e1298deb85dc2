"""Many conversations about one picture, laid side by side in one sequence behind it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from smol import EOS, next_turn, turn
from talk import Question, describe_question, description, questions

TEXT = 224  # text rows behind a picture


@dataclass
class Pack:
    """Text rows that see the picture and their own conversation only, int64 [TEXT] each.

    labels are the next token where it belongs to an answer, else -100; block is the conversation, -1 for
    none; offset is the position behind the picture. kinds and spans (rows [first, last)) are those of
    every answer.
    """

    ids: np.ndarray
    labels: np.ndarray
    block: np.ndarray
    offset: np.ndarray
    kinds: list[str]
    spans: list[tuple[int, int]]


def blocks(conversations: list[list[Question]], tokenizer, length: int = TEXT) -> Pack:
    """Lay conversations side by side; those that no longer fit are left out."""
    out = Pack(*(np.full(length, fill) for fill in (0, -100, -1, 0)), [], [])
    at = 0
    for number, turns in enumerate(conversations):
        ids: list[int] = []
        labels: list[int] = []
        spans = []
        for k, q in enumerate(turns):
            asked = tokenizer.encode("\n" + turn(q.text) if k == 0 else next_turn(q.text)).ids
            said = [*tokenizer.encode(q.answer).ids, EOS]
            ids += asked + said
            labels += [-100] * (len(asked) - 1) + said + [-100]
            spans.append((len(ids) - len(said) - 1, len(ids) - 1))
        n = len(ids)
        if at + n > length:
            continue
        out.ids[at : at + n], out.labels[at : at + n] = ids, labels
        out.block[at : at + n], out.offset[at : at + n] = number, np.arange(n)
        out.kinds += [q.kind for q in turns]
        out.spans += [(at + p, at + q) for p, q in spans]
        at += n
    return out


def pack(s, rng: random.Random, names: list[str], tokenizer) -> Pack:
    """Questions, one in five followed by a second; in half of the packs a description before them."""
    conversations = []
    if rng.random() < 0.5:
        conversations.append([Question("describe", describe_question(rng), description(s))])
    asked = questions(s, rng, names, 10)
    while asked:
        n = 2 if rng.random() < 0.2 else 1
        conversations.append(asked[:n])
        asked = asked[n:]
    return blocks(conversations, tokenizer)
