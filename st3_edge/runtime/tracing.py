"""What a report's trace holds: which visual tokens were kept, what stands for the others, and when they left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..native import libraries, st3
from ..report import Report, Schedule, Trace
from .conversation import Conversation, Image, Unit
from .text_model import TextModel

_TOP_LOGITS = 10


def begin(llama: TextModel, conversation: Conversation, prompt: Sequence[Unit], schedule: Schedule) -> Trace:
    """The trace of a prompt that was just prefilled."""
    context, cuts = llama.ctx, range(len(schedule.cuts))
    images = [unit.n for unit in conversation.units if isinstance(unit, Image)]
    kept = [st3.kept(context, i) for i in cuts]
    owners = [st3.owners(context, i) for i in cuts] if schedule.merge and any(kept) else []
    return Trace(
        prompt_tokens=[-1 if isinstance(unit, Image) else unit for unit in prompt],
        first_logits_top=_top_logits(llama),
        kept=kept,
        owners=owners,
        weights=[[n[k] for k in ids] for n, ids in zip(map(Counter, owners), kept, strict=False)],
        pieces=[],
        images=images,
        left=[[-1] * sum(images) for _ in range(len(cuts) + 1)],
    )


def note_left(report: Report, context: Any) -> None:
    """Notes in a report's trace which visual tokens left their stage since it was last called."""
    assert report.trace
    for layer, of_stage in zip((0, *(cut + 1 for cut in report.schedule.cuts)), report.trace.left, strict=True):
        held = st3.visual(context, layer)
        if held is not None:
            for i in np.setdiff1d(np.arange(len(of_stage)), held):
                if of_stage[i] < 0:
                    of_stage[i] = report.n_generated


def _top_logits(llama: TextModel) -> list[list[float]]:
    row = libraries.load().lib.llama_get_logits_ith(llama.ctx, -1)
    logits = np.ctypeslib.as_array(row, (llama.n_vocab,))
    top = np.argsort(-logits, kind="stable")[:_TOP_LOGITS]
    return [[int(i), float(logits[i])] for i in top]
