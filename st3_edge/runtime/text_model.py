"""A text model and its context: llama_model and llama_context."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping

from ..config import KV_TYPES, MAX_CTX, Override
from ..errors import ModelError
from ..files import gguf
from ..native import libraries, log, machine, st3

# Pruned prefill needs the whole prompt in one physical batch. Its compute buffers grow with it, so the default holds
# a picture of LLaVA-1.6 (up to 2880 tokens), or six of LLaVA-1.5, and not the whole of a long context; a longer prompt
# runs unpruned between its layers.
_DEFAULT_UBATCH = 4096
_ALL_LAYERS = 2**31 - 1


class TextModel:
    """`path` with the schedule that `overrides` (`st3.*` keys) and the file give it.

    model, vocab, ctx   llama.cpp's pointers; None after `close`
    n_vocab             tokens of the vocabulary
    stop                a flag that ends loading and computing, as `Worker`'s

    lora: adapters and their strengths. Other options as `Llava`'s, and checked there. Raises ModelError.
    """

    def __init__(
        self,
        path: str,
        overrides: Mapping[str, Override],
        *,
        n_ctx: int,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        lora: Mapping[str, float] | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        stop: ctypes.c_bool | None = None,
    ) -> None:
        bindings = libraries.load()
        lib = self._lib = bindings.lib
        self.model = self.vocab = self.ctx = None
        with contextlib.ExitStack() as opened:
            opened.callback(self._forget)
            params = lib.llama_model_default_params()
            params.n_gpu_layers = _ALL_LAYERS if n_gpu_layers < 0 else n_gpu_layers
            keys = params.kv_overrides = st3.native_overrides(lib, overrides)  # noqa: F841  until it is loaded
            if stop is not None:
                st3.set_callback(params, "progress_callback", "st3_stop_load", stop)
            log.forget()
            self.model = lib.llama_model_load_from_file(os.fsencode(path), params)
            if not self.model:
                raise _unusable(path)
            opened.callback(lib.llama_model_free, self.model)

            params = lib.llama_context_default_params()
            params.n_ctx = n_ctx or trained_n_ctx(gguf.read_header(path))
            params.n_batch = params.n_ubatch = min(params.n_ctx, n_ubatch or _DEFAULT_UBATCH)
            threads, threads_batch = machine.default_threads()
            params.n_threads, params.n_threads_batch = n_threads or threads, n_threads or threads_batch
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
            if stop is not None:
                st3.set_callback(params, "abort_callback", "st3_stop_compute", stop)
            self.ctx = lib.llama_init_from_model(self.model, params)
            if not self.ctx:
                raise _unusable(path)
            opened.callback(lib.llama_free, self.ctx)
            self._adapt(lora or {})

            self.vocab = lib.llama_model_get_vocab(self.model)
            self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
            self._opened = opened.pop_all()

    def _adapt(self, lora: Mapping[str, float]) -> None:
        """Loads adapters, which the model frees, and applies them."""
        adapters = []
        for path in lora:
            log.forget()
            adapter = self._lib.llama_adapter_lora_init(self.model, os.fsencode(path))
            if not adapter:
                raise ModelError(f"adapter {path!r} cannot be used{log.why()}")
            adapters.append(adapter)
        if adapters:
            n = len(adapters)
            scales = (ctypes.c_float * n)(*lora.values())
            pointers = (self._lib.llama_adapter_lora_p_ctypes * n)(*adapters)
            if self._lib.llama_set_adapters_lora(self.ctx, pointers, n, scales):
                raise ModelError("the adapters cannot be applied together")

    def close(self) -> None:
        """Frees context and model. Called again it does nothing."""
        self._opened.close()

    def _forget(self) -> None:
        self.model = self.vocab = self.ctx = None

    @property
    def bos(self) -> int:
        """The token that texts begin with; -1: there is none."""
        return int(self._lib.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        """The token that ends an answer; -1: there is none."""
        return int(self._lib.llama_vocab_eos(self.vocab))

    def text(self, token: int) -> str:
        """A token as the vocabulary writes it; "" for -1."""
        return "" if token < 0 else self._lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def piece(self, token: int, first: bool) -> bytes:
        """The bytes of a token; of the `first` of an answer without the space that SentencePiece puts before a word."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self.vocab, token, buffer, size, int(first), False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n


def _unusable(path: str) -> ModelError:
    reason = st3.last_error()
    return ModelError(f"model {path!r} cannot be used" + (f": {reason}" if reason else log.why()))


def trained_n_ctx(header: gguf.Header) -> int:
    """What n_ctx=0 stands for."""
    trained = header.metadata.get(f"{header.architecture}.context_length", 0)
    return min(int(trained), MAX_CTX) or 4096
