"""Pictures, patch labels and packed question sequences for training, made by worker processes."""

from __future__ import annotations

import multiprocessing as mp
import os
from dataclasses import dataclass

import drawing
import numpy as np
import questions
import scenes
import vocab
from things import Scene

TEXT = 256  # text rows a sequence has; what does not fit is left out
PACKS = 4  # different sets of questions for one picture
# how often each of questions.KINDS is asked: color, shape, glyph, count, position, presence
WEIGHTS = (1.0, 0.8, 1.6, 3.0, 1.0, 1.4)


@dataclass
class Pack:
    """One sequence of text rows: questions and a caption that see the picture and themselves only.

    ids, labels (next token where it is part of an answer, else -100), block (which question) and
    offset (position after the picture) are int16 [TEXT]; weight is float32 [TEXT]. about is int16
    [TEXT]: at the rows that begin an answer, bit i is set if it rests on thing i.
    """

    ids: np.ndarray
    labels: np.ndarray
    block: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    about: np.ndarray


@dataclass
class Sample:
    """A picture, uint8 [336, 336, 3], its scenes.patch_labels and scenes.patch_things, and packs of questions."""

    pixels: np.ndarray
    labels: np.ndarray
    things: np.ndarray
    packs: list[Pack]


Turn = tuple[str, str, float, int]  # question, answer, weight of its tokens in the loss, `about` bits


def blocks(conversations: list[list[Turn]], tokenizer) -> Pack:
    """Lay conversations about one picture side by side; those that no longer fit are left out."""
    out = Pack(*(np.zeros(TEXT, np.int16) for _ in range(4)), np.zeros(TEXT, np.float32), np.zeros(TEXT, np.int16))
    out.labels[:] = -100
    out.block[:] = -1
    at = 0
    for number, turns in enumerate(conversations):
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        about: list[int] = []
        for k, (question, answer, weight, bits) in enumerate(turns):
            q = tokenizer.encode(("\n" if k == 0 else vocab.BEFORE_IMAGE) + vocab.turn(question))
            a = [*tokenizer.encode(" " + answer), vocab.EOS]
            ids += q + a
            labels += [-100] * (len(q) - 1) + a + [-100]
            about += [0] * (len(q) - 1) + [bits] + [0] * len(a)
            weights += [0.0] * (len(q) - 1) + [weight] * len(a) + [0.0]
        n = len(ids)
        if at + n > TEXT:
            break
        rows = slice(at, at + n)
        out.ids[rows], out.labels[rows], out.weight[rows] = ids, labels, weights
        out.block[rows], out.offset[rows], out.about[rows] = number, np.arange(n), about
        at += n
    return out


def pack(picture: Scene, rng: np.random.Generator, tokenizer) -> Pack:
    """Questions, one in five followed by a second turn, and in three of four sequences a caption before them."""
    conversations: list[list[Turn]] = []
    if rng.random() < 0.75:
        conversations.append([(questions.caption_question(rng), questions.caption(picture), 1.0, 0)])
    asked: list[Turn] = [
        (q.text, q.answer, 1.0, sum(1 << picture.things.index(t) for t in q.about))
        for q in questions.ask_several(picture, rng, 20, False, WEIGHTS)
    ]
    while asked:
        n = 2 if rng.random() < 0.2 else 1
        conversations.append(asked[:n])
        asked = asked[n:]
    return blocks(conversations, tokenizer)


def _work(queue: mp.Queue, first: int, step: int, dense: float, texts: bool, tokenizer_path: str) -> None:
    os.nice(3)
    tokenizer = vocab.load(tokenizer_path)
    fonts = (None,) * 5 + drawing.extra_fonts()
    index = first
    while True:
        rng = np.random.default_rng([scenes.SPLITS["train"], 1, index])
        index += step
        picture = scenes.render(rng, dense=rng.random() < dense, fonts=fonts)
        if not picture.things:
            continue
        packs = [pack(picture, rng, tokenizer) for _ in range(PACKS)] if texts else []
        queue.put(Sample(np.asarray(picture.image), scenes.patch_labels(picture), scenes.patch_things(picture), packs))


class Stream:
    """Endless training samples, rendered by processes of lower priority. Picture numbers start at `first`."""

    def __init__(
        self, tokenizer_path: str, first: int = 0, workers: int = 1, dense: float = 0.0, texts: bool = True
    ) -> None:
        context = mp.get_context("spawn")
        self.queue = context.Queue(maxsize=96)
        self.workers = [
            context.Process(
                target=_work, args=(self.queue, first + k, workers, dense, texts, tokenizer_path), daemon=True
            )
            for k in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def take(self, n: int) -> list[Sample]:
        """The next n samples; waits for them."""
        return [self.queue.get() for _ in range(n)]

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.terminate()
