"""A model and the prompts that its schedules are measured on: what the full model answers, and how far from it a pruned
one is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import divergence
from ...config import ST3Config
from ...errors import PromptError, St3Error
from ...llava import Llava
from ...native import st3
from ...runtime.text_model import TextModel
from .evaluate import Measured, Overrides, Work

_OFF = ST3Config(preset="off")


@dataclass(frozen=True)
class Prompt:
    """A picture file, the digest of its pixels (`RGB.digest`), and what is asked about it."""

    picture: Path
    digest: str
    question: str


class Subject:
    """Two model files, prompts, and the folder that keeps what is known of them.

    n_tokens: of an answer, at most; n_ctx, n_ubatch, n_threads, n_gpu_layers: as for `Llava`; stage: called with what
    is being done, and the share of it that is done; what it raises ends that. Nothing is loaded before it is needed.
    """

    def __init__(
        self,
        model: str,
        mmproj: str,
        prompts: Sequence[Prompt],
        work: Work,
        *,
        n_tokens: int,
        n_ctx: int,
        n_ubatch: int | None = None,
        n_threads: int | None,
        n_gpu_layers: int = 0,
        stage: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        self._model, self._mmproj, self._prompts, self._work = model, mmproj, prompts, work
        self._n_tokens = n_tokens
        self._runs: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "n_gpu_layers": n_gpu_layers,
        }
        self._stage = stage

    def answer(self) -> None:
        """Lets the full model answer those prompts whose answers the work folder does not hold."""
        missing = [i for i in range(len(self._prompts)) if self._work.answer(i) is None]
        if not missing:
            return
        pieces = self._pieces
        with self._context(_OFF.overrides()) as context:
            for n, i in enumerate(missing):
                self._stage("answers without pruning", n / len(missing))
                self._work.put_answer(i, *divergence.greedy_answer(context, pieces[i], self._n_tokens))

    @contextmanager
    def opened(self, overrides: Overrides) -> Iterator[Callable[[int], Measured]]:
        """The function that measures a prompt, by index, under the schedule of `st3.*` keys. It raises St3Error where
        the prompt's prefill is not pruned."""
        pieces = self._pieces
        with self._context(overrides) as context:
            yield lambda i: self._measure(context, pieces[i], i)

    @contextmanager
    def _context(self, overrides: Overrides) -> Iterator[Any]:
        # The schedule is read when a model loads: so each loads it anew, which is short beside reading the prompts.
        llama = TextModel(self._model, overrides, **self._runs)
        try:
            yield llama.ctx
        finally:
            llama.close()

    @functools.cached_property
    def _pieces(self) -> list[list[st3.Piece]]:
        """Each prompt as the decoder takes it: every picture is encoded once, as its prompts stand together."""
        self._stage("loading the model", 0.0)
        out = []
        with Llava(self._model, self._mmproj, _OFF, **self._runs) as llava:
            for i, prompt in enumerate(self._prompts):
                self._stage("looking at the pictures", i / len(self._prompts))
                content = [{"type": "image", "image": prompt.picture}, {"type": "text", "text": prompt.question}]
                out.append(llava.pieces([{"role": "user", "content": content}]))
                need = _n_positions(out[-1]) + self._n_tokens
                if need > llava.n_ctx:
                    raise PromptError(
                        f"{prompt.question!r} about {prompt.picture.name!r} and its answer take {need} tokens, and "
                        f"n_ctx is {llava.n_ctx}: set n_ctx to {need} or more"
                    )
        return out

    def _measure(self, context: Any, pieces: Sequence[st3.Piece], i: int) -> Measured:
        known = self._work.answer(i)
        assert known is not None, "answer() comes first"
        tokens, full = known
        pruned = divergence.teacher_forced_logits(context, pieces, tokens)
        native = st3.report(context)
        if native["mode"] != "pruned-prefill":
            raise St3Error(f"there is nothing to tune, as the prefill is not pruned: {native['reason']}")
        kl = divergence.kl_divergence(full, pruned)
        if not np.isfinite(kl).all():
            raise St3Error("the model's logits are not finite")
        same, flops = divergence.same_top(full, pruned), native["flops"]
        return Measured(float(kl.mean()), len(kl), int(same.sum()), flops["prefill"], flops["prefill_full"])


def _n_positions(pieces: Sequence[st3.Piece]) -> int:
    return sum(len(p.tokens) if isinstance(p, st3.Text) else len(p.embd) for p in pieces)
