"""`Llava`: a quantized LLaVA in GGUF, answering questions about pictures with pruned visual tokens."""

from __future__ import annotations

import ctypes
import fnmatch
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _gguf, _libs, _log, _machine, _native, demo, state
from ._text import TextStream
from .chat import ChatTemplate, Message, read_messages
from .config import KV_TYPES, Override, ST3Config
from .conversation import REVISIT, Conversation, Embeddings, Image, Record, Unit, n_positions, reusable
from .errors import ConfigError, ModelError, PromptError, St3Error, StateError, one_line
from .images import ImageSource, load
from .report import Milliseconds, Report, Trace
from .sampling import Sampling, response_grammar
from .vision import Tokenized, Vision

Path = str | os.PathLike[str]
Response = dict[str, Any]

MAX_CTX = 2**20
# Pruned prefill needs the whole prompt in one physical batch. Its compute buffers grow with it, so the default holds
# a picture of LLaVA-1.6 (up to 2880 tokens), or six of LLaVA-1.5, and not the whole of a long context; a longer prompt
# runs unpruned between its layers.
_DEFAULT_UBATCH = 4096

# What upstream's LLaVA graph uses without asking whether it was in the file: it would crash.
_MMPROJ_TENSORS = (
    *("v.patch_embd.weight", "v.position_embd.weight"),
    *("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"),
)

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
        _check_int("n_ctx", n_ctx, 0, MAX_CTX)
        _check_int("n_ubatch", n_ubatch, 1, MAX_CTX)
        _check_int("n_threads", n_threads, 1, 1024)
        _check_int("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        _check_int("image_cache_bytes", image_cache_bytes, 0, 2**62)
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
        self._kv_types = f"{type_k}, {type_v}"
        self.last_report: Report | None = None
        self._seed = seed
        self._revisit = revisit
        self._embeddings = Embeddings(image_cache_bytes)
        self._on_stage = on_stage or (lambda _: None)
        self._lib = bindings.lib
        self._lock = threading.Lock()
        self._call = 0
        if n_ctx == 0:
            trained = header.metadata.get(f"{header.architecture}.context_length", 0)
            n_ctx = min(int(trained), MAX_CTX) or 4096
        self.n_ctx = n_ctx
        overrides = config.overrides(header.schedule)
        self._schedule = {**header.schedule, **overrides}
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
        self._conversation = Conversation(lambda p0: _native.remove(self._llama.ctx, p0))
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

        The file names may hold wildcards, if each fits one file. `options`: as for the class. Raises ModelError where
        the repository or a file is not there, or there is no network and they are not in the cache.
        """
        try:
            import huggingface_hub as hub
        except ImportError as e:
            raise ModelError("from_pretrained needs huggingface-hub: pip install huggingface-hub") from e
        paths = []
        for pattern in (filename, mmproj_filename):
            try:
                name = pattern
                if any(c in pattern for c in "*?["):
                    names = fnmatch.filter(hub.HfApi().list_repo_files(repo_id, revision=revision), pattern)
                    if len(names) != 1:
                        raise ModelError(f"{len(names)} files of {repo_id} fit {pattern!r}, not one")
                    name = names[0]
                paths.append(
                    hub.hf_hub_download(
                        repo_id,
                        name,
                        revision=revision,
                        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                        local_files_only=local_files_only,
                    )
                )
            except St3Error:
                raise
            except Exception as e:  # its own errors, and those of the network libraries below it
                reason = one_line(e)
                raise ModelError(
                    f"{pattern!r} of {repo_id!r} cannot be downloaded, and is not in the cache: {reason}"
                ) from e
        return cls(paths[0], paths[1], config, **options)

    def ask(self, images: ImageSource | Sequence[ImageSource], question: str, **options: Any) -> str:
        """The answer to one question about one picture or several. `options`: as for `create_chat_completion`,
        less stream."""
        several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
        sources: Sequence[Any] = images if several else [images]  # type: ignore[assignment]
        content = [{"type": "image", "image": source} for source in sources]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        response = self.create_chat_completion([message], **options)
        answer: str = response["choices"][0]["message"]["content"]  # type: ignore[index]
        return answer

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        grammar: Any = None,
        response_format: Mapping[str, Any] | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        model: str | None = None,
        revisit: str | None = None,
        trace: bool = False,
    ) -> Response | Iterator[Response]:
        """Answers messages in the OpenAI shape (see `st3_edge.chat.read_messages`), as llama-cpp-python does.

        Returns a chat.completion object, or with stream=True an iterator of chat.completion.chunk objects. The former,
        and the last of the latter, also hold "st3": the call's report as `Report.to_dict()` gives it; `last_report` is
        the object. What the KV cache holds of these messages, from the calls before, is not computed again.
        max_tokens: None, or below 1: as many as the context holds. Sampling options: see
        `st3_edge.sampling.Sampling`; penalties look at the answer's last 64 tokens. revisit: the class's, for this
        call. trace=True fills the report's trace.

        Raises before any work PromptError, ImageError or ConfigError; St3Error where llama.cpp fails. The conversation
        so far can go on after each of them, and after an answer that was not read to its end.
        """
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            typical_p=typical_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=self._seed if seed is None else seed,
            grammar=response_grammar(response_format) or grammar,
            logit_bias=logit_bias or {},
        )
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(isinstance(s, str) for s in stops):
            raise ConfigError("stop is a string or a list of strings")
        if revisit is not None:
            _check_revisit(revisit)
        self._check_open()
        tokenized = self._tokenize(messages)
        n_prompt = n_positions(tokenized.units)
        room = self.n_ctx - n_prompt
        if room < 1:
            raise PromptError(
                f"the prompt has {n_prompt} tokens and n_ctx is {self.n_ctx}: "
                f"set n_ctx to {n_prompt + 1} or more, or ask with less text or fewer pictures"
            )
        limit = room if max_tokens is None or max_tokens < 1 else min(max_tokens, room)
        sampler = sampling.chain(self._llama._model, self._n_vocab)
        pieces = self._generate(tokenized, sampler, limit, TextStream(stops), revisit or self._revisit, trace)

        head: Response = {
            "id": f"chatcmpl-{uuid.uuid4()}",
            "object": "chat.completion.chunk" if stream else "chat.completion",
            "created": int(time.time()),
            "model": self.model_path if model is None else model,
        }
        if stream:
            return self._chunks(head, pieces)
        text = "".join(pieces)
        report = self.last_report
        assert report is not None
        return {
            **head,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": None,
                    "finish_reason": report.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": report.n_generated,
                "total_tokens": n_prompt + report.n_generated,
            },
            "st3": report.to_dict(),
        }

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
        self._check_open()
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

    @functools.cached_property
    def _belongs_to(self) -> dict[str, str]:
        """What a saved conversation is good for."""
        return {
            "model": state.fingerprint(self.model_path),
            "vision half": state.fingerprint(self.mmproj_path),
            "schedule": json.dumps(self._schedule, sort_keys=True),
            "KV cache type": self._kv_types,
            "llama.cpp": f"{_libs.load().llama.__version__}, st3 {_libs.ABI_VERSION}",
        }

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
        return self._vision.tokenize(prompt.parts, self._llama.token_bos() if prompt.bos else None)

    def _chunks(self, head: Response, pieces: Iterator[str]) -> Iterator[Response]:
        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> Response:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return {**head, "choices": [choice]}

        yield chunk({"role": "assistant"})
        for piece in pieces:
            if piece:
                yield chunk({"content": piece})
        report = self.last_report
        assert report is not None
        yield {**chunk({}, report.finish_reason), "st3": report.to_dict()}

    def _generate(
        self, tokenized: Tokenized, sampler: Any, limit: int, text: TextStream, revisit: str, trace: bool
    ) -> Iterator[str]:
        """Prefills, then yields the answer piece by piece; `last_report` is kept up to date."""
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
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                report.finish_reason = "stop"
                break
            piece = text.push(self._token_bytes(token, first=report.n_generated == 0))
            report.n_generated += 1
            report.answer += piece
            if report.trace:
                report.trace.pieces.append(piece)
            yield piece
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
        yield piece

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
            traced = Trace(
                prompt_tokens=[-1 if isinstance(unit, Image) else unit for unit in wanted],
                first_logits_top=self._top_logits(),
                kept=[_native.kept(context, i) for i in cuts],
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


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if value is None and name in ("n_ubatch", "n_threads"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def check_pair(model: str, mmproj: str) -> _gguf.Header:
    """Reads both headers; raises ModelError where the two files are not a text model and a vision half."""
    header = _gguf.read_header(model)
    if header.architecture == "clip":
        raise ModelError(f"model {model!r} is a vision half (mmproj); the text model belongs here")
    other = _gguf.read_header(mmproj, "mmproj")
    if other.architecture != "clip":
        raise ModelError(f"mmproj {mmproj!r} is a text model; the vision half (mmproj) belongs here")
    if other.metadata.get("clip.projector_type") == "mlp":
        for tensor in _MMPROJ_TENSORS:
            if tensor not in other.tensors:
                raise ModelError(f"mmproj {mmproj!r} lacks the tensor {tensor}: it is damaged, or no LLaVA's")
    return header


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
