"""One side of a comparison, in a process of its own: `python -m st3_edge.commands.bench.worker`.

It speaks in lines of JSON. Standard input brings a Job, answered by Worker.setup, and then {"call": name, ...} for
`begin`, `decode` and `end`, each answered by what the method returns. {"error": text} ends the process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import KV_TYPES, Override
from ...errors import ModelError, PromptError, St3Error
from ...files import gguf
from ...files.pair import is_llava
from ...native import backends, libraries, log, machine, st3
from ...prompts.images import load
from ...prompts.messages import read_messages
from ...prompts.templates import ChatTemplate
from ...runtime.conversation import Image, Unit, n_tokens
from ...runtime.vision import Tokenized, Vision

_KV_SIZE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells")
_MIN_UBATCH = 512  # upstream's default
_MROPE = (8, 40)  # LLAMA_ROPE_TYPE_MROPE, _IMROPE


@dataclass(frozen=True)
class Job:
    """st3: whether this is ST³'s side; the other uses llama.cpp's own calls alone. stock: the folder of its libraries,
    None: the package's. keys: `st3.*` overrides. mmproj None: `visual` random embeddings of an image, its patches in so
    many columns (0: unknown). question None: `text` random tokens around the pictures. n_ctx, n_ubatch None: what
    prompt and answer need. Else as the options of `Llava`."""

    st3: bool
    stock: str | None
    keys: dict[str, Override]
    model: str
    mmproj: str | None
    pictures: list[str]
    question: str | None
    visual: int
    text: int
    generate: int
    n_ctx: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str = "f16"
    repack: bool = True
    columns: int = 0


class Worker:
    """A loaded model and one request of it, again and again.

    Raises St3Error's kinds where a library, a file or the request cannot be used.
    """

    def __init__(self, job: Job) -> None:
        if job.stock:
            libraries.use_stock(Path(job.stock))
        bindings = libraries.load()
        log.route(log.Log())
        size = _KVSize()
        log.logger.addHandler(size)
        log.logger.setLevel(logging.INFO)
        self._job, self._lib = job, bindings.lib
        threads, threads_batch = (job.n_threads,) * 2 if job.n_threads else machine.default_threads()

        params = self._lib.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = job.n_gpu_layers, job.repack
        self._overrides = st3.native_overrides(self._lib, job.keys)
        params.kv_overrides = self._overrides
        self._model = self._made(self._lib.llama_model_load_from_file, os.fsencode(job.model), params)
        self._vision = None
        if job.mmproj:
            use_gpu = job.n_gpu_layers != 0
            self._vision = Vision(job.mmproj, self._model, n_threads=threads_batch, use_gpu=use_gpu)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._n_vocab = self._lib.llama_vocab_n_tokens(self._vocab)
        n_embd = self._lib.llama_model_n_embd_inp(self._model)
        self._template = self._chat_template()
        self._pictures = [load(picture) for picture in job.pictures]  # read anew for each request
        self._random = np.random.default_rng(1).standard_normal((job.visual, n_embd), np.float32)
        self._words = self._draw(job.text, 1)
        self._answer = self._draw(job.generate, 2)

        self._mrope = self._lib.llama_model_rope_type(self._model) in _MROPE
        self._non_causal = gguf.read_header(job.model).architecture == "gemma3"  # as mtmd decides for its images
        units = self._units(self._tokenize())
        self._n_prompt = n_tokens(units)
        n_ctx = job.n_ctx or self._n_prompt + job.generate
        if n_ctx < self._n_prompt + job.generate:
            raise PromptError(
                f"the prompt has {self._n_prompt} tokens, the answer gets {job.generate}, and n_ctx is {n_ctx}"
            )
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_ubatch = min(n_ctx, job.n_ubatch or max(self._n_prompt, _MIN_UBATCH))
        params.n_batch = n_ctx
        params.n_threads, params.n_threads_batch = threads, threads_batch
        params.type_k = params.type_v = KV_TYPES[job.kv_type]
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._ctx = self._made(self._lib.llama_init_from_model, self._model, params)
        self._text = _new_batch(self._lib, n_ctx, 0)
        self._embd = _new_batch(self._lib, n_ctx, n_embd)
        self._at = 0  # the next position
        self._decoded = 0  # tokens of the answer
        self._caches = size.caches
        self.setup = {
            "visual": sum(unit.n for unit in units if isinstance(unit, Image)),
            "text": sum(not isinstance(unit, Image) for unit in units),
            "layers": self._lib.llama_model_n_layer(self._model),
            "n_ctx": self._lib.llama_n_ctx(self._ctx),
            "n_ubatch": self._lib.llama_n_ubatch(self._ctx),
            "threads": [threads, threads_batch],
            "ggml": backends.ggml_version(bindings),
            "cpu_features": backends.cpu_features(bindings),
            "devices": backends.devices(bindings.lib._lib) if job.st3 else [],  # stock's libraries know no kernels
            "compiler": machine.compiler(libraries.path_of("llama")),
        }

    def begin(self) -> dict[str, float]:
        """A request up to its first token, on an empty cache: milliseconds of the vision encoder (where there is one),
        of the prefill, and of all together, reading and scaling of pictures and tokenizing too; KV bytes."""
        st3.remove(self._ctx, 0)
        machine.reset_peak_memory()
        started = time.perf_counter()
        self._pictures = [load(picture) for picture in self._job.pictures]
        tokenized = self._tokenize()
        units = self._units(tokenized)
        ready = time.perf_counter()
        pieces = self._pieces(tokenized, units)
        seen = time.perf_counter()
        self._prefill(pieces)
        self._choose()
        done = time.perf_counter()
        self._decoded = 0
        encode = {"encode_ms": 1e3 * (seen - ready)} if tokenized else {}
        kv = {f"kv_{name}_bytes": n for name, n in self._kv().items()}
        return {**encode, "prefill_ms": 1e3 * (done - seen), "first_token_ms": 1e3 * (done - started), **kv}

    def decode(self, n: int, watch: bool = False) -> dict[str, list[float]]:
        """`n` more tokens of the answer, the same on both sides: milliseconds of each, and if `watch`ed the KV bytes in
        use after each, which is not timed."""
        steps: list[float] = []
        live: list[float] = []
        for token in self._answer[self._decoded : self._decoded + n]:
            started = time.perf_counter()
            self._run(self._text, np.array([token], np.int32), output=True)
            self._decoded += 1
            self._choose()
            steps.append(round(1e3 * (time.perf_counter() - started), 4))
            if watch:
                live.append(self._kv()["live"])
        return {"steps_ms": steps, "live": live}

    def end(self) -> dict[str, Any]:
        """Memory at the end of the answer and, of ST³'s side, the report."""
        memory: dict[str, Any] = {f"kv_{name}_end_bytes": n for name, n in self._kv().items()}
        memory["peak_rss_bytes"] = machine.peak_memory()
        if self._job.st3:
            memory["report"] = st3.report(self._ctx)
        return memory

    def _made(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What llama.cpp makes of the arguments; it lives as long as the process."""
        log.forget()
        made = make(*arguments)
        if not made:
            raise ModelError(f"model {self._job.model!r} cannot be used{log.why()}")
        return made

    def _chat_template(self) -> ChatTemplate:
        lib, vocab = self._lib, self._vocab

        def text(token: int) -> str:
            return "" if token < 0 else lib.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")

        own = gguf.read_header(self._job.model).metadata.get("tokenizer.chat_template")
        return ChatTemplate(
            str(own) if own else None,
            bos=text(lib.llama_vocab_bos(vocab)),
            eos=text(lib.llama_vocab_eos(vocab)),
            adds_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            picture_end="\n" if self._job.mmproj and is_llava(self._job.mmproj) else "",
        )

    def _draw(self, n: int, seed: int) -> list[int]:
        """Token ids: which ones they are makes no difference to the time."""
        return [int(t) for t in np.random.default_rng(seed).integers(3, self._n_vocab, n)]

    def _tokenize(self) -> Tokenized | None:
        if self._vision is None:
            return None
        if self._job.question is None:
            return self._vision.tokenize(self._pictures)
        content = [{"type": "image", "image": picture} for picture in self._pictures]
        content.append({"type": "text", "text": self._job.question})
        prompt = self._template.render(read_messages([{"role": "user", "content": content}]))
        bos = self._lib.llama_vocab_bos(self._vocab) if prompt.bos else None
        return self._vision.tokenize(prompt.parts, bos)

    def _units(self, tokenized: Tokenized | None) -> list[Unit]:
        """The prompt: as it was tokenized, or random words around the pictures, 1/16 of them before."""
        if tokenized and self._job.question is not None:
            return tokenized.units
        before, after = self._around()
        images: list[Unit] = tokenized.units if tokenized else [Image("random", 0, len(self._random))]
        return [*before, *images, *after]

    def _around(self) -> tuple[list[int], list[int]]:
        """Random words before and behind the pictures."""
        n = max(1, self._job.text // 16)
        return self._words[:n], self._words[n:]

    def _pieces(self, tokenized: Tokenized | None, units: list[Unit]) -> list[st3.Piece]:
        """The prompt, with its pictures encoded."""
        visual = {unit: tokenized.encode(unit) for unit in units if isinstance(unit, Image)} if tokenized else {}
        if tokenized and self._job.question is not None:
            return tokenized.pieces(visual)
        first, last = (st3.Text(np.array(words, np.int32)) for words in self._around())
        p0 = len(first.tokens)
        return [first, *(tokenized.pieces(visual, p0=p0) if tokenized else [self._image(p0)]), last]

    def _image(self, p0: int) -> st3.Visual:
        """Random embeddings, placed as mtmd places an image."""
        n, nx = len(self._random), self._job.columns
        ny = n // nx if nx else 0
        if not self._mrope:
            return st3.Visual(self._random, nx, ny, n_pos=n, non_causal=self._non_causal)
        i = np.arange(n)
        pos = p0 + np.stack([0 * i, i // (nx or n), i % (nx or n), -p0 + 0 * i], 1)
        return st3.Visual(self._random, nx, ny, pos.astype(np.int32), max(nx, ny) or n)

    def _prefill(self, pieces: list[st3.Piece]) -> None:
        if self._job.st3:
            log.forget()
            code = st3.prefill(self._ctx, 0, pieces)
            if code:
                raise St3Error(f"prefill failed ({code}): {st3.last_error() or log.why()}")
            self._at = st3.n_positions(self._ctx)
            return
        self._at = 0
        for piece in pieces:  # as upstream's multimodal code does it: piece by piece, logits for the last row alone
            if isinstance(piece, st3.Text):
                self._run(self._text, piece.tokens, output=piece is pieces[-1])
            else:
                self._lib.llama_set_causal_attn(self._ctx, not piece.non_causal)
                self._run(self._embd, piece.embd, output=False, pos=piece.pos, n_pos=piece.n_pos)
                self._lib.llama_set_causal_attn(self._ctx, True)

    def _run(
        self,
        batch: Any,
        rows: npt.NDArray[Any],
        output: bool,
        pos: npt.NDArray[np.int32] | None = None,
        n_pos: int | None = None,
    ) -> None:
        """llama_decode of token ids [n] or embeddings [n][n_embd] from where the sequence ends, or at the positions
        [n][4]; n_pos: how many they take, if not n."""
        n = batch.n_tokens = len(rows)
        into = batch.embd if batch.embd else batch.token
        ctypes.memmove(into, rows.ctypes.data, rows.nbytes)
        places = np.arange(self._at, self._at + n, dtype=np.int32) if pos is None else np.ascontiguousarray(pos.T)
        batch.pos = places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        logits = np.ctypeslib.as_array(batch.logits, (n,))
        logits[:] = 0
        logits[-1] = output
        log.forget()
        code = self._lib.llama_decode(self._ctx, batch)
        if code:
            raise St3Error(f"decoding failed ({code}){log.why()}")
        self._at += n_pos or n

    def _choose(self) -> int:
        """The likeliest token; waits for the logits."""
        logits = self._lib.llama_get_logits_ith(self._ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self._n_vocab,)).argmax())

    def _kv(self) -> dict[str, int]:
        """KV bytes, allocated and in use."""
        if self._job.st3:
            kv = st3.report(self._ctx)["kv_bytes"]
            return {"allocated": kv["allocated"], "live": kv["live"]}
        held = self._n_prompt + self._decoded
        live = sum(n_bytes * min(held, cells) // cells for n_bytes, cells in self._caches)
        return {"allocated": sum(n_bytes for n_bytes, _ in self._caches), "live": live}


class _KVSize(logging.Handler):
    """Hears what llama.cpp says about the sizes of KV caches that it allocates: bytes and cells of each."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[tuple[int, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = _KV_SIZE.match(record.getMessage())
        if found:
            self.caches.append((round(float(found[1]) * 2**20), int(found[2])))


def _new_batch(lib: Any, n: int, n_embd: int) -> Any:
    """A llama_batch for rows of sequence 0; it lives as long as the process."""
    batch = lib.llama_batch_init(n, n_embd, 1)
    for i in range(n):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    return batch


def main() -> None:
    """Serves one job."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else writes to standard output

    def answer(what: Mapping[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        worker = Worker(Job(**json.loads(sys.stdin.readline())))
        calls: dict[str, Callable[..., Mapping[str, Any]]]
        calls = {"begin": worker.begin, "decode": worker.decode, "end": worker.end}
        answer(worker.setup)
        for line in sys.stdin:
            arguments = json.loads(line)
            answer(calls[arguments.pop("call")](**arguments))
    except St3Error as e:
        answer({"error": str(e)})
    except BrokenPipeError:
        return  # nobody listens any more
