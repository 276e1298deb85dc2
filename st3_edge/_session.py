"""What one `Llava` has loaded, and its conversation. All of it runs in the Llava's worker thread."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _libs, _log, _machine, _native, state
from ._text import TextStream
from ._text_model import TextModel
from ._worker import Worker
from .chat import Prompt
from .config import Override
from .conversation import Conversation, Embeddings, Image, Record, Unit, n_positions, pieces_of, reusable
from .errors import ContextError, St3Error, StateError
from .images import RGB
from .report import Milliseconds, Report, Trace
from .sampling import Sampling
from .vision import Tokenized, Vision

_TOP_LOGITS = 10
_SHORT_TOKEN = 16  # bytes: the longest one is looked for where a text is longer than so much for each
_CONTROL_OR_UNKNOWN = 1 << 3 | 1 << 0  # llama_token_attr


class Answer:
    """A call, and its answer as far as it has come. report: from the prompt's prefill on; n_prompt: its tokens."""

    def __init__(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt
        self.report: Report | None = None


@dataclass
class _Generation:
    """What an Answer is made with. token: chosen, and not decoded yet; call: its number among the session's."""

    tokenized: Tokenized
    sampler: Any
    text: TextStream
    limit: int
    call: int = 0
    token: int = 0


class Session:
    """Both models, the KV cache's content on record, and the pictures seen lately.

    belongs_to    what a saved conversation is good for, the libraries apart
    on_stage      called with "encode" and "prefill" as they begin
    Other arguments as `Llava`'s and TextModel's. Raises ModelError.
    """

    def __init__(
        self,
        worker: Worker,
        model: str,
        mmproj: str,
        overrides: Mapping[str, Override],
        *,
        n_ctx: int,
        n_threads: int | None,
        n_gpu_layers: int,
        image_cache_bytes: int,
        belongs_to: Mapping[str, str],
        on_stage: Callable[[str], None],
        verbose: bool,
        **options: Any,
    ) -> None:
        started = time.perf_counter()
        _log.route(_log.Log(verbose))
        self._worker, self._on_stage = worker, on_stage
        bindings = _libs.load()
        self.lib = bindings.lib
        worker.resources.callback(_libs.trim)
        self.belongs_to = {**belongs_to, "llama.cpp": f"{bindings.llama.__version__}, st3 {state.NATIVE_VERSION}"}
        self.llama = llama = TextModel(
            model,
            overrides,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            stop=worker.stop,
            **options,
        )
        worker.resources.callback(llama.close)
        self._batch = bindings.internals.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)
        worker.resources.callback(self._batch.close)
        self.vision = Vision(
            mmproj,
            llama.model,
            n_threads=n_threads or _machine.usable_cpus(),
            use_gpu=n_gpu_layers != 0,
            stop=worker.stop,
        )
        worker.resources.callback(self.vision.close)
        self.conversation = Conversation(lambda p0: _native.remove(llama.ctx, p0))
        self.embeddings = Embeddings(image_cache_bytes)
        self._n_ctx, self._calls = n_ctx, 0
        self._load_ms = _ms_since(started)

    def control_forms(self) -> list[str]:
        """How the vocabulary writes its control tokens."""
        lib, llama = self.lib, self.llama
        ids = [i for i in range(llama.n_vocab) if lib.llama_vocab_get_attr(llama.vocab, i) & _CONTROL_OR_UNKNOWN]
        # A form of one character would be in ordinary text.
        return [text for i in ids if len(text := llama.text(i)) > 1]

    def tokenize(self, parts: Sequence[str | RGB], bos: bool) -> Tokenized:
        """Text and pictures, in order, to tokens; `bos`: the begin-of-sequence token goes before them. Raises
        ContextError for text that no context of this size holds, before it is tokenized: that takes its time."""
        n_bytes = sum(len(part.encode()) for part in parts if isinstance(part, str))
        if n_bytes > self._n_ctx * _SHORT_TOKEN and n_bytes > self._n_ctx * self._longest_token:
            raise ContextError(
                f"the prompt has {n_bytes:,} bytes of text and n_ctx is {self._n_ctx}, too few tokens for so much: "
                "set n_ctx higher, or ask with less text"
            )
        return self.vision.tokenize(parts, self.llama.bos if bos else None)

    @functools.cached_property
    def _longest_token(self) -> int:
        """Bytes."""
        return max(len(self.llama.text(i).encode()) for i in range(self.llama.n_vocab))

    def pieces(self, parts: Sequence[str | RGB], bos: bool) -> list[_native.Piece]:
        """The same as pieces of a prompt, with the pictures encoded."""
        tokenized = self.tokenize(parts, bos)
        return pieces_of(tokenized.units, self._look(tokenized, tokenized.units, Milliseconds(0.0, 0.0, 0.0, 0.0)))

    def prepare(self, prompt: Prompt, sampling: Sampling, text: TextStream, limit: int | None) -> Answer:
        """What of a call can fail before any work: its prompt's tokens, and its sampler."""
        tokenized = self.tokenize(prompt.parts, prompt.bos)
        answer = Answer(n_positions(tokenized.units))
        n_ctx = self._n_ctx  # llama.cpp rounds it up
        room = n_ctx - answer.n_prompt
        if room < 1:
            raise ContextError(
                f"the prompt has {answer.n_prompt} tokens and n_ctx is {n_ctx}: "
                f"set n_ctx to {answer.n_prompt + 1} or more, or ask with less text or fewer pictures"
            )
        sampler = sampling.chain(self.llama, self.llama.n_vocab)
        self._worker.keep(answer, _Generation(tokenized, sampler, text, min(limit or room, room)))
        return answer

    def _look(self, tokenized: Tokenized, units: Iterable[Unit], ms: Milliseconds) -> dict[Image, _native.Visual]:
        """The embeddings of the images among `units`; those that are not known are encoded, which `ms` counts."""
        images = dict.fromkeys(unit for unit in units if isinstance(unit, Image))
        known = {image: self.embeddings.get(image) for image in images}
        if any(visual is None for visual in known.values()):
            self._on_stage("encode")
        started = time.perf_counter()
        result = {}
        for image, visual in known.items():
            if visual is None:
                visual = tokenized.encode(image)
                self.embeddings.put(image, visual)
                ms.encode = _ms_since(started)
            result[image] = visual
        return result

    def begin(self, answer: Answer, *, revisit: str, trace: bool) -> Report:
        """Brings the KV cache to the end of the prompt, from where it is; ends the answer of the call before."""
        self._calls += 1
        generation: _Generation = self._worker.kept(answer)
        generation.call = self._calls
        answer.report = self._prefill(generation.tokenized, revisit, trace)
        return answer.report

    def step(self, answer: Answer) -> tuple[str, bool]:
        """The next piece of the answer, which may be "", and whether it is the last; the report grows with it."""
        generation: _Generation = self._worker.kept(answer)
        report, text = answer.report, generation.text
        assert report is not None
        if generation.call != self._calls:
            raise St3Error("another call on this Llava began before this answer had ended")
        started = time.perf_counter()
        if report.n_generated:
            self._decode(generation.token)
        generation.token = token = generation.sampler.sample(self.llama, -1)
        report.ms.decode += _ms_since(started)
        if report.trace:
            self._note_left(report.schedule.cuts, report.trace.left, report.n_generated)
        if self.lib.llama_vocab_is_eog(self.llama.vocab, token):
            report.finish_reason = "stop"
            return self._end(report, text), True
        piece = text.push(self.llama.piece(token, first=report.n_generated == 0))
        report.n_generated += 1
        report.answer += piece
        if report.trace:
            report.trace.pieces.append(piece)
        if text.stopped:
            report.finish_reason = "stop"
        if text.stopped or report.n_generated >= generation.limit:
            return piece + self._end(report, text), True
        return piece, False

    def _end(self, report: Report, text: TextStream) -> str:
        """What of the answer's text was waiting for more."""
        piece = text.finish()
        report.answer += piece
        if piece and report.trace:
            report.trace.pieces[-1] += piece
        report.end(self._native_report())
        return piece

    def reset(self) -> None:
        """Forgets the conversation, and ends the answer of the call before."""
        self._calls += 1
        self.conversation.cut(0)

    def save(self, path: str | os.PathLike[str], messages: Any) -> None:
        """Writes the conversation to a file. Raises StateError."""
        conversation = self.conversation
        conversation.cut(len(conversation.units))
        known = {u: v for u in conversation.units if isinstance(u, Image) and (v := self.embeddings.get(u))}
        native = _native.get_state(self.llama.ctx)
        saved = state.Saved(self.belongs_to, conversation.record, native, known, messages)
        state.write(path, saved, self._worker.check)

    def replace(self, saved: state.Saved, name: str) -> None:
        """Goes on with a conversation that was saved in the file `name`; where that raises StateError, with its own."""
        before = self.conversation.record, _native.get_state(self.llama.ctx)
        try:
            _log.forget()
            if not self._load(saved.record, saved.native):
                raise StateError(f"state file {name!r} cannot be used{_log.why()}")
        except BaseException:
            self._load(*before)
            raise
        self._calls += 1
        for image, visual in saved.embeddings.items():
            self.embeddings.put(image, visual)

    def _load(self, record: Record, native: bytes) -> bool:
        context = self.llama.ctx

        def load() -> bool:
            return _native.set_state(context, native) and _native.n_positions(context) == record.n_positions

        return self.conversation.replace(record, load)

    def _prefill(self, tokenized: Tokenized, revisit: str, trace: bool) -> Report:
        conversation, context, wanted = self.conversation, self.llama.ctx, tokenized.units
        ms = Milliseconds(load=self._load_ms, encode=0.0, prefill=0.0, decode=0.0)
        reused = reusable(
            conversation.units, wanted, conversation.record.spans, revisit=revisit, anneals=_native.anneals(context)
        )
        visual = self._look(tokenized, wanted[reused:], ms)
        if conversation.cut(reused) != reused:
            reused = 0
            visual = self._look(tokenized, wanted, ms)
        n_reused = conversation.n_positions

        self._on_stage("prefill")
        started = time.perf_counter()
        _log.forget()
        with conversation.adding(wanted[reused:], lambda: bool(_native.report(context)["mode"] != "off")):
            code = _native.prefill(context, n_reused, pieces_of(wanted[reused:], visual))
            if code:
                reason = _native.last_error()
                raise St3Error(f"prefill failed ({code})" + (f": {reason}" if reason else _log.why()))
        ms.prefill = _ms_since(started)
        native = self._native_report()
        if not native["flops"]["prefill_full"]:  # stock memory again
            flops = _native.prefill_flops(self.llama.model, conversation.n_positions - n_reused, n_reused)
            native["flops"] = {"prefill": flops, "prefill_full": flops}
        traced = None
        if trace:
            cuts = range(len(native["cuts"]))
            images = [unit.n for unit in conversation.units if isinstance(unit, Image)]
            kept = [_native.kept(context, i) for i in cuts]
            owners = [_native.owners(context, i) for i in cuts] if native.get("merge") and any(kept) else []
            traced = Trace(
                prompt_tokens=[-1 if isinstance(unit, Image) else unit for unit in wanted],
                first_logits_top=self._top_logits(),
                kept=kept,
                owners=owners,
                weights=[[n[k] for k in ids] for n, ids in zip(map(Counter, owners), kept, strict=False)],
                pieces=[],
                images=images,
                left=[[-1] * sum(images) for _ in range(len(cuts) + 1)],
            )
        return Report.from_native(native, ms, n_reused, traced)

    def _decode(self, token: int) -> None:
        _log.forget()
        with self.conversation.adding([token]):
            self._batch.set_batch([token], n_past=self.conversation.n_positions, logits_all=False)
            code = self.lib.llama_decode(self.llama.ctx, self._batch.batch)
            if code:
                raise St3Error(f"decoding failed ({code}){_log.why()}")

    def _note_left(self, cuts: Sequence[int], left: list[list[int]], step: int) -> None:
        """Notes in a trace which visual tokens left their stage since it was last called."""
        positions = self.conversation.visual_positions
        for layer, of_stage in zip((0, *(cut + 1 for cut in cuts)), left, strict=True):
            held = _native.positions(self.llama.ctx, layer)
            if len(held):
                gone = ~np.isin(positions, held) & (np.array(of_stage) < 0)
                for i in np.flatnonzero(gone):
                    of_stage[i] = step

    def _native_report(self) -> dict[str, Any]:
        """What `st3_report` says of the conversation."""
        native = _native.report(self.llama.ctx)
        if native["mode"] == "off":  # stock memory, which knows of no images: it holds all of them, in every layer
            native["given"] = self.conversation.n_visual
            native["per_layer"] = [native["given"]] * len(native["per_layer"])
            native["held"] = native["per_layer"]
        native.setdefault("held", native["per_layer"])
        return native

    def _top_logits(self) -> list[list[float]]:
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.llama.ctx, -1), (self.llama.n_vocab,))
        top = np.argsort(-logits, kind="stable")[:_TOP_LOGITS]
        return [[int(i), float(logits[i])] for i in top]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
