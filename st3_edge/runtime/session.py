"""What one `Llava` has loaded, and its conversation. All of it runs in the Llava's worker thread."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import Override
from ..errors import ContextError, St3Error, StateError
from ..native import libraries, log, machine, st3
from ..native.worker import Worker
from ..prompts.images import RGB
from ..prompts.templates import Prompt
from ..report import Milliseconds, Report
from . import state, tracing
from .conversation import Conversation, Embeddings, Image, Record, n_tokens
from .encodings import Encodings
from .generation import Answer, Decoder, Generation
from .prefill import Prefill
from .sampling import Sampling
from .text_model import TextModel
from .text_stream import TextStream
from .vision import Tile, Tokenized, Vision

_MAX_ENCODINGS = 2**30  # bytes
_SHORT_TOKEN = 16  # bytes: the longest one is looked for where a text is longer than so much for each
_CONTROL_OR_UNKNOWN = 1 << 3 | 1 << 0  # llama_token_attr


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
        image_cache_dir: str | os.PathLike[str] | None,
        belongs_to: Mapping[str, str],
        on_stage: Callable[[str], None],
        verbose: bool,
        **options: Any,
    ) -> None:
        started = time.perf_counter()
        log.route(log.Log(verbose))
        self._worker = worker
        bindings = libraries.load()
        self.lib = bindings.lib
        worker.resources.callback(libraries.trim)
        self.belongs_to = {**belongs_to, "llama.cpp": f"{libraries.upstream()['version']}, st3 {state.NATIVE_VERSION}"}
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
        self.vision = Vision(
            mmproj,
            llama.model,
            n_threads=n_threads or machine.usable_cpus(),
            use_gpu=n_gpu_layers != 0,
            stop=worker.stop,
        )
        worker.resources.callback(self.vision.close)
        self.conversation = Conversation(lambda p0: st3.remove(llama.ctx, p0))
        encodings = None
        if image_cache_dir is not None:
            schedule = json.loads(self.belongs_to["schedule"])  # the file's keys, too
            of = {
                **{name: self.belongs_to[name] for name in ("vision half", "llama.cpp")},
                "encoder": state.fingerprint(os.fspath(libraries.path_of("mtmd"))),
                "schedule": {key: schedule.get(f"st3.{key}") for key in ("preset", "vision_type")},
                "device": [machine.processor(), n_gpu_layers != 0],
            }
            encodings = Encodings(image_cache_dir, json.dumps(of), self.vision.n_embd, _MAX_ENCODINGS)
        self.embeddings = Embeddings(image_cache_bytes, encodings)
        self._prefill = Prefill(llama, self.conversation, on_stage)
        self._decoder = Decoder(llama, self.conversation)
        worker.resources.callback(self._decoder.close)
        self._n_ctx, self._calls = n_ctx, 0
        self._load_ms = (time.perf_counter() - started) * 1000

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

    def pieces(self, parts: Sequence[str | RGB], bos: bool) -> list[st3.Piece]:
        """The same as pieces of a prompt, with the pictures encoded."""
        tokenized = self.tokenize(parts, bos)
        return tokenized.pieces(self._prefill.look(tokenized, tokenized.units, self.embeddings)[0])

    def tiles(self, picture: RGB) -> list[Tile]:
        """What the vision encoder sees of a picture. Raises ImageError."""
        return self.tokenize([picture], bos=False).tiles()

    def prepare(self, prompt: Prompt, sampling: Sampling, text: TextStream, limit: int | None) -> Answer:
        """What of a call can fail before any work: its prompt's tokens, and its sampler."""
        tokenized = self.tokenize(prompt.parts, prompt.bos)
        answer = Answer(n_tokens(tokenized.units))
        n_ctx = self._n_ctx  # llama.cpp rounds it up
        room = n_ctx - answer.n_prompt
        if room < 1:
            raise ContextError(
                f"the prompt has {answer.n_prompt} tokens and n_ctx is {n_ctx}: "
                f"set n_ctx to {answer.n_prompt + 1} or more, or ask with less text or fewer pictures"
            )
        sampler = sampling.chain(self.llama.vocab, self.llama.n_vocab)
        self._worker.keep(answer, Generation(tokenized, sampler, text, min(limit or room, room)))
        return answer

    def begin(self, answer: Answer, *, revisit: str, trace: bool) -> Report:
        """Brings the KV cache to the end of the prompt, from where it is; ends the answer of the call before."""
        self._calls += 1
        generation: Generation = self._worker.kept(answer)
        generation.call = self._calls
        ms = Milliseconds(load=self._load_ms, encode=0.0, prefill=0.0, decode=0.0)
        answer.report = report = self._prefill.run(generation.tokenized, self.embeddings, ms, revisit=revisit)
        if trace:
            report.trace = tracing.begin(self.llama, self.conversation, generation.tokenized.units, report.schedule)
        return report

    def step(self, answer: Answer) -> tuple[str, bool]:
        """The next piece of the answer, which may be "", and whether it is the last; the report grows with it."""
        generation: Generation = self._worker.kept(answer)
        assert answer.report is not None
        if generation.call != self._calls:
            raise St3Error("another call on this Llava began before this answer had ended")
        return generation.step(self._decoder, answer.report)

    def reset(self) -> None:
        """Forgets the conversation, and ends the answer of the call before."""
        self._calls += 1
        self.conversation.cut(0)

    def save(self, path: str | os.PathLike[str], messages: Any) -> None:
        """Writes the conversation to a file. Raises StateError."""
        conversation = self.conversation
        conversation.cut(len(conversation.units))
        known = {u: v for u in conversation.units if isinstance(u, Image) and (v := self.embeddings.get(u))}
        native = st3.get_state(self.llama.ctx)
        saved = state.Saved(self.belongs_to, conversation.record, native, known, messages)
        state.write(path, saved, self._worker.check)

    def replace(self, saved: state.Saved, name: str) -> None:
        """Goes on with a conversation that was saved in the file `name`; where that raises StateError, with its own."""
        before = self.conversation.record, st3.get_state(self.llama.ctx)
        try:
            log.forget()
            if not self._load(saved.record, saved.native):
                raise StateError(f"state file {name!r} cannot be used{log.why()}")
        except BaseException:
            self._load(*before)
            raise
        self._calls += 1
        for image, visual in saved.embeddings.items():
            self.embeddings.put(image, visual)

    def _load(self, record: Record, native: bytes) -> bool:
        context = self.llama.ctx

        def load() -> bool:
            return st3.set_state(context, native) and st3.n_positions(context) == record.n_positions

        return self.conversation.replace(record, load)
