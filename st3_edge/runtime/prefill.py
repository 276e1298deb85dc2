"""From where a conversation is to the end of a prompt: pictures are encoded, and what is new is prefilled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import St3Error
from ..native import log, st3
from ..report import Milliseconds, Report
from .conversation import Conversation, Embeddings, Image, Unit, n_tokens, reusable
from .text_model import TextModel
from .vision import Tokenized


class Prefill:
    """Of one model and its conversation. on_stage: called with "encode" and "prefill" as they begin."""

    def __init__(self, llama: TextModel, conversation: Conversation, on_stage: Callable[[str], None]) -> None:
        self._llama, self._conversation, self._on_stage = llama, conversation, on_stage

    def look(
        self, tokenized: Tokenized, units: Iterable[Unit], embeddings: Embeddings
    ) -> tuple[dict[Image, st3.Visual], float]:
        """The embeddings of the images among `units`, and the milliseconds that encoding those took that were not among
        `embeddings`; 0.0: there were none."""
        images = dict.fromkeys(unit for unit in units if isinstance(unit, Image))
        known = {image: embeddings.get(image) for image in images}
        if any(visual is None for visual in known.values()):
            self._on_stage("encode")
        started, took = time.perf_counter(), 0.0
        result = {}
        for image, visual in known.items():
            if visual is None:
                visual = tokenized.encode(image)
                embeddings.put(image, visual)
                took = ms_since(started)
            result[image] = visual
        return result, took

    def run(self, tokenized: Tokenized, embeddings: Embeddings, ms: Milliseconds, *, revisit: str) -> Report:
        """Prefills what of a prompt is not in the KV cache. `ms` counts it. Raises St3Error."""
        conversation, context, prompt = self._conversation, self._llama.ctx, tokenized.units
        reused = reusable(conversation.units, prompt, conversation.record.spans, revisit=revisit)
        visual, ms.encode = self.look(tokenized, prompt[reused:], embeddings)
        if conversation.cut(reused) != reused:
            reused = 0
            visual, more = self.look(tokenized, prompt, embeddings)
            ms.encode = more or ms.encode
        p0, n_reused = conversation.n_positions, conversation.n_tokens

        self._on_stage("prefill")
        started = time.perf_counter()
        log.forget()
        with conversation.adding(prompt[reused:], lambda: bool(st3.report(context)["mode"] != "off")):
            code = st3.prefill(context, p0, tokenized.pieces(visual, reused, p0))
            if code:
                reason = st3.last_error()
                raise St3Error(f"prefill failed ({code})" + (f": {reason}" if reason else log.why()))
        ms.prefill = ms_since(started)
        native = report_of(context, conversation)
        if not native["flops"]["prefill_full"]:  # stock memory again
            flops = st3.prefill_flops(self._llama.model, n_tokens(prompt[reused:]), n_reused)
            native["flops"] = {"prefill": flops, "prefill_full": flops}
        return Report.from_native(native, ms, n_reused)


def ms_since(started: float) -> float:
    """Milliseconds since a time of `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000


def report_of(context: Any, conversation: Conversation) -> dict[str, Any]:
    """What `st3_report` says of a conversation."""
    native = st3.report(context)
    if native["mode"] == "off":  # stock memory, which knows of no images: it holds all of them, in every layer
        native["given"] = conversation.n_visual
        native["per_layer"] = [native["given"]] * len(native["per_layer"])
        native["held"] = native["per_layer"]
    native.setdefault("held", native["per_layer"])
    return native
