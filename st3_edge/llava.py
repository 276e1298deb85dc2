"""`Llava`: a quantized LLaVA in GGUF, answering questions about pictures with pruned visual tokens."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _gguf, _libs, _log, _machine, _native, _openai, demo, sampling, state
from ._openai import Response
from ._pair import check_pair
from ._text import TextStream
from .chat import ChatTemplate, Message, read_messages
from .config import KV_TYPES, Override, ST3Config, check_whole
from .conversation import REVISIT, Conversation, Embeddings, Image, Record, Unit, n_positions, reusable
from .errors import ConfigError, ContextError, ModelError, St3Error, StateError
from .images import ImageSource, load
from .report import Milliseconds, Report, Trace
from .vision import Tokenized, Vision

Path = str | os.PathLike[str]

MAX_CTX = 2**20
# Pruned prefill needs the whole prompt in one physical batch. Its compute buffers grow with it, so the default holds
# a picture of LLaVA-1.6 (up to 2880 tokens), or six of LLaVA-1.5, and not the whole of a long context; a longer prompt
# runs unpruned between its layers.
_DEFAULT_UBATCH = 4096

_TOP_LOGITS = 10
_CONTROL_OR_UNKNOWN = 1 << 3 | 1 << 0  # llama_token_attr


class Llava:
    """A text model and its vision half (mmproj), loaded, with one conversation in its KV cache.

        with Llava.demo() as llava:
            answer = llava.ask("picture.png", "What color is the star?")
            print(llava.last_report.visual_tokens.per_layer)

    model_path, mmproj_path   two GGUF files that belong together
    config                    how visual tokens are pruned; None: ST3Config(), the model file's own schedule, and where
                              it carries none the preset "st3"; preset "off": as stock llama.cpp
    n_ctx                     tokens of prompt and answer together, at most; 0: what the model was trained on
    n_ubatch                  tokens of a prompt that can be prefilled at once and so pruned; None: min(n_ctx, 4096)
    n_threads                 CPU threads; None: by the CPUs that this process may use
    n_gpu_layers              layers to offload where a GPU backend was built; -1: all
    type_k, type_v            KV cache types, of KV_TYPES
    seed                      of sampling, where a call gives none; None: another one each call
    revisit                   what a new question sees of pictures that an earlier one asked about: "never": what the
                              first question left of them; "turn": all of them, pruned anew by this question
    image_cache_bytes         visual tokens that are kept for the next time that a picture is seen, at most
    chat_template             Jinja; None: the model file's own, and where it has none Vicuna's
    verbose                   llama.cpp's log to standard error
    on_stage                  called with "encode", "prefill" and "decode" as each of a call begins; without "encode"
                              where no picture is encoded

    Raises ModelError, ConfigError or LibraryError. Not for several threads at once: a second call waits for a step of
    the first to end, and then ends the first's answer.
    """

    def __init__(
        self,
        model_path: Path,
        mmproj_path: Path,
        config: ST3Config | None = None,
        *,
        n_ctx: int = 4096,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        type_k: str = "f16",
        type_v: str = "f16",
        seed: int | None = None,
        revisit: str = REVISIT[0],
        image_cache_bytes: int = 256 * 2**20,
        chat_template: str | None = None,
        verbose: bool = False,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        started = time.perf_counter()
        if not isinstance(config, ST3Config | None):
            raise ConfigError(f"config is an ST3Config or None, not of the type {type(config).__name__}")
        check_whole("n_ctx", n_ctx, 0, MAX_CTX)
        check_whole("n_ubatch", n_ubatch, 1, MAX_CTX, optional=True)
        check_whole("n_threads", n_threads, 1, 1024, optional=True)
        check_whole("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        check_whole("image_cache_bytes", image_cache_bytes, 0, 2**62)
        sampling.check_seed(seed)
        _check_revisit(revisit)
        for name, kv_type in (("type_k", type_k), ("type_v", type_v)):
            if kv_type not in KV_TYPES:
                raise ConfigError(f"{name} is one of {', '.join(KV_TYPES)}, not {kv_type!r}")
        model_name, mmproj_name = os.fspath(model_path), os.fspath(mmproj_path)
        header = check_pair(model_name, mmproj_name)
        bindings = _libs.load()
        _log.install()
        if verbose:
            _log.verbose()

        self.config = config = config or ST3Config()
        self.model_path, self.mmproj_path = model_name, mmproj_name
        self.last_report: Report | None = None
        self._seed = seed
        self._revisit = revisit
        self._embeddings = Embeddings(image_cache_bytes)
        self._on_stage = on_stage or (lambda _: None)
        self._lib = bindings.lib
        self._lock = threading.Lock()
        self._call = 0
        self.n_ctx = n_ctx = n_ctx or _trained_n_ctx(header)
        overrides = config.overrides(header.schedule)
        # What a saved conversation is good for. Of the files as they are loaded: later they may be others.
        self._belongs_to = {
            "model": state.fingerprint(model_name),
            "vision half": state.fingerprint(mmproj_name),
            "schedule": json.dumps({**header.schedule, **overrides}, sort_keys=True),
            "KV cache type": f"{type_k}, {type_v}",
            "llama.cpp": f"{bindings.llama.__version__}, st3 {state.NATIVE_VERSION}",
        }
        self._llama = load_text_model(
            model_name,
            overrides,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            type_k=type_k,
            type_v=type_v,
            verbose=verbose,
        )
        llama = self._llama  # not self, which would keep a dropped Llava until the collector finds the cycle
        self._conversation = Conversation(lambda p0: _native.remove(llama.ctx, p0))
        try:
            self._vision = Vision(
                mmproj_name, self._llama.model, n_threads=n_threads or _machine.usable_cpus(), use_gpu=n_gpu_layers != 0
            )
            self._vocab = self._llama._model.vocab
            self._n_vocab = self._llama.n_vocab()
            own = header.metadata.get("tokenizer.chat_template")
            self._template = ChatTemplate(
                chat_template if chat_template is not None else str(own) if own else None,
                bos=self._token_text(self._llama.token_bos()),
                eos=self._token_text(self._llama.token_eos()),
                control=self._control_forms(),
                adds_bos=bool(self._lib.llama_vocab_get_add_bos(self._vocab)),
            )
        except BaseException:
            self.close()
            raise
        self._load_ms = _ms_since(started)

    @classmethod
    def demo(cls, config: ST3Config | None = None, **options: Any) -> Llava:
        """The embedded model. `options`: as for the class."""
        return cls(*demo.model_paths(), config, **options)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        mmproj_filename: str,
        config: ST3Config | None = None,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Llava:
        """A pair of files of a Hugging Face repository, downloaded once and then taken from the cache.

        The file names may hold wildcards, if each fits one file: of the repository, and where that cannot be asked, of
        the cache. `options`: as for the class. Raises ModelError where the repository or a file is not there, or there
        is no network and they are not in the cache.
        """
        from . import _hub  # takes long to import

        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        model, mmproj = (_hub.file(repo_id, name, **where) for name in (filename, mmproj_filename))
        return cls(model, mmproj, config, **options)

    def ask(self, images: ImageSource | list[Any] | tuple[Any, ...], question: str, **options: Any) -> str:
        """The answer to one question about one picture, or a list of several. `options`: as for
        `create_chat_completion`, less stream. Raises as that does."""
        if options.get("stream"):
            raise ConfigError("ask returns whole answers: create_chat_completion has stream=True")
        sources = images if isinstance(images, (list, tuple)) else [images]
        content = [{"type": "image", "image": source} for source in sources]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        response = self.create_chat_completion([message], **options)
        answer: str = response["choices"][0]["message"]["content"]  # type: ignore[index]
        return answer

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: bool | None = False,
        stream_options: Mapping[str, bool] | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repeat_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        grammar: Any = None,
        response_format: Mapping[str, Any] | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        model: str | None = None,
        revisit: str | None = None,
        trace: bool = False,
        **others: Any,
    ) -> Response | Iterator[Response]:
        """Answers messages in the OpenAI shape (see `st3_edge.chat.read_messages`), as llama-cpp-python does.

        Returns a chat.completion object, or with stream=True an iterator of chat.completion.chunk objects. The former,
        and of the latter the one with the finish_reason, also hold "st3": the call's report as `Report.to_dict()` gives
        it; `last_report` is the object. With stream_options={"include_usage": True} one more chunk tells the tokens.
        What the KV cache holds of these messages, from the calls before, is not computed again.
        max_tokens, or by its other name max_completion_tokens: None, or below 1: as many as the context holds. Sampling
        options: see `st3_edge.sampling.Sampling`, whose defaults stand for None; penalties look at the answer's last 64
        tokens. revisit: the class's, for this call. trace=True fills the report's trace. `others`: OpenAI's other
        arguments, where they ask for nothing (None, n=1, tools=[], tool_choice="none", logprobs=False ...), or where no
        answer depends on them (user, store, metadata, service_tier, parallel_tool_calls ...).

        Raises before any work PromptError, ImageError or ConfigError, this also for arguments that are not supported,
        and TypeError for those that there are not;
        St3Error where llama.cpp fails. The conversation so far can go on after each of them, and after an answer that
        was not read to its end.
        """
        _openai.check_others(others)
        form = sampling.response_grammar(response_format)
        if form is not None and grammar is not None:
            raise ConfigError("grammar and response_format exclude each other: both are grammars")
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "typical_p": typical_p,
            "repeat_penalty": repeat_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "seed": self._seed if seed is None else seed,
            "grammar": grammar if form is None else form,
            "logit_bias": logit_bias,
        }
        chosen = sampling.Sampling(**{name: value for name, value in options.items() if value is not None})
        usage = _openai.includes_usage(stream, stream_options)
        stops = _openai.stops_of(stop)
        limit = _openai.limit_of(max_tokens, max_completion_tokens)
        if revisit is not None:
            _check_revisit(revisit)
        tokenized = self._tokenize(messages)
        n_prompt = n_positions(tokenized.units)
        room = self.n_ctx - n_prompt
        if room < 1:
            raise ContextError(
                f"the prompt has {n_prompt} tokens and n_ctx is {self.n_ctx}: "
                f"set n_ctx to {n_prompt + 1} or more, or ask with less text or fewer pictures"
            )
        with self._lock:
            self._check_open()
            sampler = chosen.chain(self._llama._model, self._n_vocab)
        limit = min(limit or room, room)
        pieces = self._generate(tokenized, sampler, limit, TextStream(stops), revisit or self._revisit, trace)
        name = self.model_path if model is None else model
        if stream:
            return _openai.chunks(name, n_prompt, pieces, usage)
        *_, (report, _) = pieces
        return _openai.completion(name, n_prompt, report)

    def visual_tokens(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """What the vision encoder gives the decoder for a picture: float32 [tokens][n_embd], row by row of patches."""
        picture = load(image)
        with self._lock:
            self._check_open()
            tokenized = self._vision.tokenize([picture])
            images = [unit for unit in tokenized.units if isinstance(unit, Image)]
            visual = self._look(tokenized, images, Milliseconds(0.0, 0.0, 0.0, 0.0))
        return np.concatenate([visual[image].embd for image in images])

    def pieces(self, messages: Sequence[Message]) -> list[_native.Piece]:
        """What the decoder reads for messages (as `create_chat_completion` takes them): text tokens, and the visual
        tokens of pictures, in order. Nothing is decoded."""
        tokenized = self._tokenize(messages)
        with self._lock:
            self._check_open()
            visual = self._look(tokenized, tokenized.units, Milliseconds(0.0, 0.0, 0.0, 0.0))
        return pieces_of(tokenized.units, visual)

    def reset(self) -> None:
        """Forgets the conversation: the next call computes its whole prompt. Ends a streamed answer."""
        with self._lock:
            self._check_open()
            self._call += 1
            self._conversation.cut(0)

    def save_state(self, path: Path, messages: Any = None) -> None:
        """Writes the conversation to a file: what the KV cache holds, and the embeddings of its pictures.

        `messages`: kept beside it, for `load_state` to return; anything that JSON can hold. The file is whole or not
        there, and what it replaces stays until it is. Raises StateError where that cannot be.
        """
        with self._lock:
            self._check_open()
            conversation = self._conversation
            conversation.cut(len(conversation.units))
            known = {u: v for u in conversation.units if isinstance(u, Image) and (v := self._embeddings.get(u))}
            native = _native.get_state(self._llama.ctx)
            saved = state.Saved(self._belongs_to, conversation.record, native, known, messages)
        state.write(path, saved)

    def load_state(self, path: Path) -> Any:
        """Goes on with the conversation of a file that `save_state` wrote; returns the messages that it was given.

        The next call with the same messages and a new question computes no more than it would have. Ends a streamed
        answer. Raises StateError where the file is damaged, or another model's, schedule's or KV cache type's: the
        conversation before goes on then.
        """
        self._check_open()
        saved = state.read(path, self._belongs_to, n_vocab=self._n_vocab, n_embd=self._vision.n_embd)
        if saved.record.n_positions > self.n_ctx:
            raise StateError(f"the conversation has {saved.record.n_positions} positions and n_ctx is {self.n_ctx}")
        with self._lock:
            self._check_open()
            before = self._conversation.record, _native.get_state(self._llama.ctx)
            try:
                _log.forget()
                if not self._replace(saved.record, saved.native):
                    raise StateError(f"state file {os.fspath(path)!r} cannot be used{_log.why()}")
            except BaseException:
                self._replace(*before)
                raise
            self._call += 1
            for image, visual in saved.embeddings.items():
                self._embeddings.put(image, visual)
        return saved.messages

    def _replace(self, record: Record, native: bytes) -> bool:
        context = self._llama.ctx

        def load() -> bool:
            return _native.set_state(context, native) and _native.n_positions(context) == record.n_positions

        return self._conversation.replace(record, load)

    def close(self) -> None:
        """Frees both models. Called again it does nothing."""
        with self._lock:
            self._call += 1
            if hasattr(self, "_vision"):
                self._vision.close()
            self._llama.close()

    def __enter__(self) -> Llava:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._vision.close.alive:
            raise St3Error("this Llava is closed")

    def _tokenize(self, messages: Sequence[Message]) -> Tokenized:
        prompt = self._template.render(read_messages(messages))
        with self._lock:
            self._check_open()
            return self._vision.tokenize(prompt.parts, self._llama.token_bos() if prompt.bos else None)

    def _generate(
        self, tokenized: Tokenized, sampler: Any, limit: int, text: TextStream, revisit: str, trace: bool
    ) -> Iterator[tuple[Report, str]]:
        """Prefills, then yields the answer piece by piece, each with this call's report, which grows with them."""
        with self._lock:
            self._check_open()
            self._call += 1
            call = self._call
            self.last_report = report = self._prefill(tokenized, revisit, trace)
        self._on_stage("decode")
        token = 0
        while True:
            with self._lock:
                self._check_open()
                if call != self._call:
                    raise St3Error("another call on this Llava began before this answer had ended")
                started = time.perf_counter()
                if report.n_generated:
                    self._decode(token)
                token = sampler.sample(self._llama._ctx, -1)
                report.ms.decode += _ms_since(started)
                if report.trace:
                    self._note_left(report.schedule.cuts, report.trace.left, report.n_generated)
                ended = self._lib.llama_vocab_is_eog(self._vocab, token)
                data = b"" if ended else self._token_bytes(token, first=report.n_generated == 0)
            if ended:
                report.finish_reason = "stop"
                break
            piece = text.push(data)
            report.n_generated += 1
            report.answer += piece
            if report.trace:
                report.trace.pieces.append(piece)
            yield report, piece
            if text.stopped:
                report.finish_reason = "stop"
                break
            if report.n_generated >= limit:
                break
        piece = text.finish()
        report.answer += piece
        if piece and report.trace:
            report.trace.pieces[-1] += piece
        with self._lock:
            if call == self._call:
                report.end(self._native_report())
        yield report, piece

    def _prefill(self, tokenized: Tokenized, revisit: str, trace: bool) -> Report:
        """Brings the KV cache to the end of the prompt, from where it already is."""
        conversation, context, wanted = self._conversation, self._llama.ctx, tokenized.units
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

    def _note_left(self, cuts: Sequence[int], left: list[list[int]], step: int) -> None:
        """Notes in a trace which visual tokens left their stage since it was last called."""
        positions = self._conversation.visual_positions
        for layer, of_stage in zip((0, *(cut + 1 for cut in cuts)), left, strict=True):
            held = _native.positions(self._llama.ctx, layer)
            if len(held):
                gone = ~np.isin(positions, held) & (np.array(of_stage) < 0)
                for i in np.flatnonzero(gone):
                    of_stage[i] = step

    def _look(self, tokenized: Tokenized, units: Sequence[Unit], ms: Milliseconds) -> dict[Image, _native.Visual]:
        """The embeddings of the images among `units`; those that are not known are encoded."""
        images = dict.fromkeys(unit for unit in units if isinstance(unit, Image))
        known = {image: self._embeddings.get(image) for image in images}
        if any(visual is None for visual in known.values()):
            self._on_stage("encode")
        started = time.perf_counter()
        result = {}
        for image, visual in known.items():
            if visual is None:
                visual = tokenized.encode(image)
                self._embeddings.put(image, visual)
                ms.encode = _ms_since(started)
            result[image] = visual
        return result

    def _native_report(self) -> dict[str, Any]:
        """What `st3_report` says of the conversation."""
        native = _native.report(self._llama.ctx)
        if native["mode"] == "off":  # stock memory, which knows of no images: it holds all of them, in every layer
            native["given"] = self._conversation.n_visual
            native["per_layer"] = [native["given"]] * len(native["per_layer"])
            native["held"] = native["per_layer"]
        native.setdefault("held", native["per_layer"])
        return native

    def _top_logits(self) -> list[list[float]]:
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._llama.ctx, -1), (self._n_vocab,))
        top = np.argsort(-logits, kind="stable")[:_TOP_LOGITS]
        return [[int(i), float(logits[i])] for i in top]

    def _decode(self, token: int) -> None:
        batch = self._llama._batch
        batch.set_batch([token], n_past=self._conversation.n_positions, logits_all=False)
        _log.forget()
        with self._conversation.adding([token]):
            code = self._lib.llama_decode(self._llama.ctx, batch.batch)
            if code:
                raise St3Error(f"decoding failed ({code}){_log.why()}")

    def _token_bytes(self, token: int, first: bool) -> bytes:
        """The bytes of a token; the space that SentencePiece puts before a word is dropped where the answer begins."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, int(first), False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else self._lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")

    def _control_forms(self) -> list[str]:
        lib, vocab = self._lib, self._vocab
        ids = [i for i in range(self._n_vocab) if lib.llama_vocab_get_attr(vocab, i) & _CONTROL_OR_UNKNOWN]
        # A form of one character would be in ordinary text.
        return [text for i in ids if len(text := self._token_text(i)) > 1]


def load_text_model(
    path: str,
    overrides: Mapping[str, Override],
    *,
    n_ctx: int,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    type_k: str = "f16",
    type_v: str = "f16",
    verbose: bool = False,
) -> Any:
    """The bindings' `Llama` of a text model, with the schedule that `overrides` (`st3.*` keys) and the file give it.
    Options as `Llava`'s, and checked there. Raises ModelError."""
    n_ctx = n_ctx or _trained_n_ctx(_gguf.read_header(path))
    threads, threads_batch = _machine.default_threads()
    n_ubatch = min(n_ctx, n_ubatch or _DEFAULT_UBATCH)
    _log.forget()
    try:
        return _libs.load().llama.Llama(
            model_path=path,
            n_gpu_layers=n_gpu_layers,
            kv_overrides=dict(overrides) or None,
            n_ctx=n_ctx,
            n_batch=n_ubatch,
            n_ubatch=n_ubatch,
            n_threads=n_threads or threads,
            n_threads_batch=n_threads or threads_batch,
            flash_attn=True,
            type_k=KV_TYPES[type_k],
            type_v=KV_TYPES[type_v],
            verbose=verbose,
        )
    except Exception as e:  # the bindings raise ValueError, and Jinja's errors for the file's template
        reason = _native.last_error()
        raise ModelError(
            f"model {path!r} cannot be used" + (f": {reason}" if reason else _log.why() or f": {e}")
        ) from e


def _trained_n_ctx(header: _gguf.Header) -> int:
    """What n_ctx=0 stands for."""
    trained = header.metadata.get(f"{header.architecture}.context_length", 0)
    return min(int(trained), MAX_CTX) or 4096


def pieces_of(units: Sequence[Unit], visual: Mapping[Image, _native.Visual]) -> list[_native.Piece]:
    """Units as `_native.prefill` takes them: runs of text, and images between."""
    pieces: list[_native.Piece] = []
    text: list[int] = []
    for unit in (*units, None):
        if isinstance(unit, int):
            text.append(unit)
            continue
        if text:
            pieces.append(_native.Text(np.array(text, np.int32)))
            text = []
        if unit is not None:
            pieces.append(visual[unit])
    return pieces


def _check_revisit(value: Any) -> None:
    if value not in REVISIT:
        raise ConfigError(f"revisit is one of {', '.join(REVISIT)}, not {value!r}")


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
