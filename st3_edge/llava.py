"""`Llava`: a quantized LLaVA in GGUF, answering questions about pictures with pruned visual tokens."""

from __future__ import annotations

import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from . import demo
from .config import KV_TYPES, MAX_CTX, REVISIT, ST3Config, check_whole, is_number
from .errors import ConfigError, StateError
from .files import choose
from .files.pair import check_adapter, check_pair, is_llava
from .native import libraries, st3
from .native.st3 import Visual
from .native.worker import Worker
from .prompts import openai
from .prompts.images import ImageSource, load
from .prompts.messages import Message, read_messages
from .prompts.openai import Response
from .prompts.templates import ChatTemplate
from .report import Report
from .runtime import sampling, state
from .runtime.conversation import n_tokens
from .runtime.generation import Answer
from .runtime.prefill import ms_since
from .runtime.session import Session
from .runtime.text_model import trained_n_ctx
from .runtime.text_stream import TextStream
from .runtime.vision import Tile

Path = str | os.PathLike[str]


class Llava:
    """A text model and its vision half (mmproj), loaded, with one conversation in its KV cache.

        with Llava.demo() as llava:
            answer = llava.ask("picture.png", "What color is the star?")
            print(llava.last_report.visual_tokens.per_layer)

    model_path, mmproj_path   two GGUF files that belong together; mmproj_path None: the one in the model's folder
    config                    how visual tokens are pruned; None: ST3Config(), the model file's own schedule, and where
                              it carries none the preset "st3"; preset "off": as stock llama.cpp
    n_ctx                     tokens of prompt and answer together, at most; 0: what the model was trained on
    n_ubatch                  tokens of a prompt that can be prefilled at once and so pruned; None: min(n_ctx, 4096)
    n_threads                 CPU threads; None: by the CPUs that this process may use
    n_gpu_layers              layers to offload where a GPU backend was built; -1: all
    lora                      LoRA adapters of the text model in GGUF: a path, several, or a strength (1.0) for each
    type_k, type_v            KV cache types, of KV_TYPES
    seed                      of sampling, where a call gives none; None: another one each call
    revisit                   what a new question sees of pictures that an earlier one asked about: "never": what the
                              first question left of them; "turn": all of them, pruned anew by this question
    image_cache_bytes         visual tokens that are kept for the next time that a picture is seen, at most
    image_cache_dir           a folder where encoded pictures stay for the next process that loads this mmproj, 1 GiB at
                              most, in files that only this user can read; None: nowhere. It holds what was encoded,
                              not the pictures, but tells what is on them
    chat_template             Jinja; None: the model file's own, and where it has none Vicuna's
    verbose                   llama.cpp's log of this Llava to standard error
    on_stage                  called with "encode", "prefill" and "decode" as each of a call begins; without "encode"
                              where no picture is encoded

    Raises ModelError, ConfigError or LibraryError, and PromptError for a chat_template that is no Jinja or shows
    nothing of a message. The work is done in a thread of its own, one call after the other: a call waits for a step of
    another to end, and then ends the other's answer. Ctrl-C, and whatever a signal handler raises, ends a call soon,
    and the conversation can go on. In a forked child it cannot be used.
    """

    def __init__(
        self,
        model_path: Path,
        mmproj_path: Path | None = None,
        config: ST3Config | None = None,
        *,
        n_ctx: int = 4096,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        lora: Path | Iterable[Path] | Mapping[Path, float] | None = (),
        type_k: str = "f16",
        type_v: str = "f16",
        seed: int | None = None,
        revisit: str = REVISIT[0],
        image_cache_bytes: int = 256 * 2**20,
        image_cache_dir: Path | None = None,
        chat_template: str | None = None,
        verbose: bool = False,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        _check_options(**locals())
        model_name = os.fspath(model_path)
        mmproj_name = choose.beside(model_name) if mmproj_path is None else os.fspath(mmproj_path)
        adapters = _adapters(lora)
        header = check_pair(model_name, mmproj_name)
        for adapter in adapters:
            check_adapter(adapter, header)

        self.config = config = config or ST3Config()
        self.model_path, self.mmproj_path = model_name, mmproj_name
        self.last_report: Report | None = None
        self._seed, self._revisit = seed, revisit
        self.n_ctx = n_ctx = n_ctx or trained_n_ctx(header)
        overrides = config.overrides(header.schedule)
        schedule = {**header.schedule, **overrides}
        self._preset = schedule.get("st3.preset", "a schedule of its own")
        # What a saved conversation is good for. Of the files as they are loaded: later they may be others.
        belongs_to = {
            "model": state.fingerprint(model_name),
            "vision half": state.fingerprint(mmproj_name),
            **{f"adapter {i}": f"{state.fingerprint(p)} at {s:g}" for i, (p, s) in enumerate(adapters.items())},
            "schedule": json.dumps(schedule, sort_keys=True),
            "KV cache type": f"{type_k}, {type_v}",
        }
        libraries.check_present()
        worker = self._worker = Worker(self)
        self._on_stage = on_stage = on_stage or (lambda _: None)
        own = header.metadata.get("tokenizer.chat_template")
        try:
            worker.run(
                self._load,
                chat_template if chat_template is not None else str(own) if own else None,
                "\n" if is_llava(mmproj_name) else "",
                worker=worker,
                model=model_name,
                mmproj=mmproj_name,
                overrides=overrides,
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                n_threads=n_threads,
                n_gpu_layers=n_gpu_layers,
                lora=adapters,
                type_k=type_k,
                type_v=type_v,
                image_cache_bytes=image_cache_bytes,
                image_cache_dir=image_cache_dir,
                belongs_to=belongs_to,
                verbose=verbose,
                on_stage=lambda stage: worker.call_back(functools.partial(on_stage, stage)),
            )
        except BaseException:
            worker.close()  # frees what it had loaded
            raise

    def _load(self, chat_template: str | None, picture_end: str, **options: Any) -> None:
        session = self._session = Session(**options)
        llama = session.llama
        self._template = ChatTemplate(
            chat_template,
            bos=llama.text(llama.bos),
            eos=llama.text(llama.eos),
            control=session.control_forms(),
            adds_bos=bool(session.lib.llama_vocab_get_add_bos(llama.vocab)),
            picture_end=picture_end,
        )

    @classmethod
    def demo(cls, config: ST3Config | None = None, **options: Any) -> Llava:
        """The embedded model. `options`: as for the class."""
        return cls(*demo.model_paths(), config, **options)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        mmproj_filename: str | None = None,
        config: ST3Config | None = None,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Llava:
        """A model and its mmproj of a Hugging Face repository, downloaded once and then taken from the cache.

        `repo_id`: "owner/repo", or "owner/repo:QUANT", whose files are found by their names. Both file names may be
        given instead; they may hold wildcards, if each fits one file of the cache, or of the repository; of a model in
        several parts, all are downloaded. `options`: as for the class. Raises ModelError where the repository or a file
        is not there, or there is no network and they are not in the cache.
        """
        # A mistyped option, or one out of its range, before the download.
        inspect.signature(cls).bind("", "", config, **options)
        _check_options(config, **options)
        from .files import hub  # takes long to import

        if (filename is None) != (mmproj_filename is None):
            raise ConfigError("filename and mmproj_filename go together: give both, or neither")
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if filename is None or mmproj_filename is None:
            model, mmproj, _ = hub.pair(repo_id, **where)
        else:
            model, mmproj = (hub.file(repo_id, name, **where) for name in (filename, mmproj_filename))
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
        answer: str = response["choices"][0]["message"]["content"]
        return answer

    @overload
    def create_chat_completion(
        self, messages: Sequence[Message], *, stream: Literal[False] | None = False, **options: Any
    ) -> Response: ...

    @overload
    def create_chat_completion(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Iterator[Response]: ...

    @overload
    def create_chat_completion(
        self, messages: Sequence[Message], *, stream: bool | None, **options: Any
    ) -> Response | Iterator[Response]: ...

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
        """Answers messages in the OpenAI shape (see `read_messages` of st3_edge.prompts.messages), as llama-cpp-python
        does.

        Returns a chat.completion object, or with stream=True an iterator of chat.completion.chunk objects. The former,
        and of the latter the one with the finish_reason, also hold "st3": the call's report as `Report.to_dict()` gives
        it; `last_report` is the object. With stream_options={"include_usage": True} one more chunk counts the tokens.
        What the KV cache holds of these messages, from the calls before, is not computed again.
        max_tokens, or by its other name max_completion_tokens: None, or below 1: as many as the context holds. Sampling
        options: see `st3_edge.runtime.sampling.Sampling`, whose defaults stand for None; penalties look at the answer's
        last 64 tokens. revisit: the class's, for this call. trace=True fills the report's trace. `others`: OpenAI's
        other arguments, where they ask for nothing (None, n=1, tools=[], tool_choice="none", logprobs=False ...), or
        where no answer depends on them (user, store, metadata, service_tier, parallel_tool_calls ...).

        Raises before any work PromptError, ImageError or ConfigError, this also for arguments that are not supported,
        and TypeError for those that there are not; St3Error where llama.cpp fails. The conversation so far can go on
        after each of them, and after an answer that was not read to its end.
        """
        started = time.perf_counter()
        openai.check_others(others)
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
        usage = openai.includes_usage(stream, stream_options)
        stops = openai.stops_of(stop)
        limit = openai.limit_of(max_tokens, max_completion_tokens)
        if revisit is not None:
            _check_revisit(revisit)
        prompt = self._template.render(read_messages(messages))
        answer = self._worker.run(self._session.prepare, prompt, chosen, TextStream(stops), limit)
        pieces = self._generate(answer, revisit or self._revisit, trace, time.perf_counter() - started)
        name = self.model_path if model is None else model
        if stream:
            return openai.chunks(name, answer.n_prompt, pieces, usage)
        *_, (report, _) = pieces
        return openai.completion(name, answer.n_prompt, report)

    def visual_tokens(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """What the vision encoder gives the decoder for a picture: float32 [tokens][n_embd], row by row of patches.
        Raises ImageError, and St3Error after `close`."""
        pieces = self._worker.run(self._session.pieces, [load(image)], bos=False)
        return np.concatenate([piece.embd for piece in pieces if isinstance(piece, Visual)])

    def tiles(self, image: ImageSource) -> list[Tile]:
        """What the vision encoder sees of a picture: itself at another size, or tiles of it, in the order of their
        visual tokens. Raises ImageError, also where it puts them together in a way of its own, and St3Error after
        `close`."""
        return self._worker.run(self._session.tiles, load(image))

    def pieces(self, messages: Sequence[Message]) -> list[st3.Piece]:
        """What the decoder reads for messages (as `create_chat_completion` takes them): text tokens, and the visual
        tokens of pictures, in order. Nothing is decoded. Raises PromptError and ImageError as that does, and St3Error
        after `close`."""
        prompt = self._template.render(read_messages(messages))
        return self._worker.run(self._session.pieces, prompt.parts, prompt.bos)

    def reset(self) -> None:
        """Forgets the conversation: the next call computes its whole prompt. Ends a streamed answer."""
        self._worker.run(self._session.reset)

    def save_state(self, path: Path, messages: Any = None) -> None:
        """Writes the conversation to a file: what the KV cache holds, and the embeddings of its pictures.

        `messages`: kept beside it, for `load_state` to return; anything that JSON can hold. The file is whole or not
        there, and what it replaces stays until it is. Raises StateError where that cannot be, and St3Error after
        `close`.
        """
        self._worker.run(self._session.save, path, messages)

    def load_state(self, path: Path, check: Callable[[Any], object] | None = None) -> Any:
        """Goes on with the conversation of a file that `save_state` wrote; returns the messages that it was given.

        `check`: called with these messages before anything changes; what it raises leaves the conversation as it is.
        The next call with the same messages and a new question computes no more than it would have. Ends a streamed
        answer. Raises StateError where the file is damaged, or another model's, schedule's or KV cache type's: the
        conversation before goes on then.
        """
        llama, vision = self._session.llama, self._session.vision
        saved = state.read(path, self._session.belongs_to, n_vocab=llama.n_vocab, n_embd=vision.n_embd)
        n = n_tokens(saved.record.units)
        if n > self.n_ctx:
            raise StateError(f"the conversation has {n} tokens and n_ctx is {self.n_ctx}")
        if check is not None:
            check(saved.messages)
        self._worker.run(self._session.replace, saved, os.fspath(path))
        return saved.messages

    def close(self) -> None:
        """Frees both models; ends a call that is at work in another thread. Called again it does nothing."""
        self._worker.close()

    def __enter__(self) -> Llava:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name, preset = os.path.basename(self.model_path), self._preset  # noqa: PTH119
        what = f"{name}, {preset}, {self._session.conversation.n_tokens} of {self.n_ctx} tokens"
        return f"<Llava {what if self._worker.is_open else f'{name}, closed'}>"

    def _generate(self, answer: Answer, revisit: str, trace: bool, prepared: float) -> Iterator[tuple[Report, str]]:
        """Prefills, then yields the answer piece by piece, each with this call's report, which grows with them.
        prepared: seconds that the call has taken before."""
        session, run = self._session, self._worker.run
        started = time.perf_counter() - prepared
        self.last_report = report = run(session.begin, answer, revisit=revisit, trace=trace)
        self._on_stage("decode")
        ended = False
        while not ended:
            piece, ended = run(session.step, answer)
            report.ms.first_token = report.ms.first_token or ms_since(started)
            yield report, piece


def _check_revisit(value: Any) -> None:
    if value not in REVISIT:
        raise ConfigError(f"revisit is one of {', '.join(REVISIT)}, not {value!r}")


def _check_options(
    config: Any,
    *,
    n_ctx: Any = 0,
    n_ubatch: Any = None,
    n_threads: Any = None,
    n_gpu_layers: Any = 0,
    lora: Any = (),
    type_k: Any = "f16",
    type_v: Any = "f16",
    seed: Any = None,
    revisit: Any = REVISIT[0],
    image_cache_bytes: Any = 0,
    image_cache_dir: Any = None,
    chat_template: Any = None,
    on_stage: Any = None,
    **_: Any,
) -> None:
    """Raises ConfigError for an argument of Llava's that is wrong whatever the files hold."""
    if not isinstance(config, ST3Config | None):
        raise ConfigError(f"config is an ST3Config or None, not of the type {type(config).__name__}")
    check_whole("n_ctx", n_ctx, 0, MAX_CTX)
    check_whole("n_ubatch", n_ubatch, 1, MAX_CTX, optional=True)
    check_whole("n_threads", n_threads, 1, 1024, optional=True)
    check_whole("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
    check_whole("image_cache_bytes", image_cache_bytes, 0, 2**62)
    sampling.check_seed(seed)
    _check_revisit(revisit)
    _adapters(lora)
    if not isinstance(image_cache_dir, str | os.PathLike | None):
        raise ConfigError(f"image_cache_dir is a path or None, not of the type {type(image_cache_dir).__name__}")
    if not isinstance(chat_template, str | None):
        raise ConfigError(f"chat_template is a string or None, not of the type {type(chat_template).__name__}")
    if not (on_stage is None or callable(on_stage)):
        raise ConfigError(f"on_stage is a function or None, not of the type {type(on_stage).__name__}")
    for name, kv_type in (("type_k", type_k), ("type_v", type_v)):
        if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
            raise ConfigError(f"{name} is one of {', '.join(KV_TYPES)}, not {kv_type!r}")


def _adapters(lora: Any) -> dict[str, float]:
    """Paths of adapters and their strengths. Raises ConfigError for what is no path, or a strength that is no number
    that float32 holds."""
    if isinstance(lora, str | os.PathLike):
        lora = (lora,)
    if not isinstance(lora, Iterable | None):
        raise ConfigError(f"lora is a path, several, or a strength for each, not of the type {type(lora).__name__}")
    result = {}
    for path, strength in lora.items() if isinstance(lora, Mapping) else ((path, 1.0) for path in lora or ()):
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"an adapter is the path of a file, not of the type {type(path).__name__}")
        if not is_number(strength) or abs(strength) > 1e30:
            raise ConfigError(f"the strength of an adapter is a number, not {strength!r}")
        result[os.fspath(path)] = float(strength)
    return result
