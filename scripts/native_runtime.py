"""The native libraries by way of ctypes: models, contexts and `st3_*` calls, for tests and benchmarks.

The user's way in is the package st3_edge; this is the thinner one that tests and timings want. Libraries come
from $ST3_LIB_DIR, else from the package's lib folder; a process runs on those of one folder.
$ST3_GPU_LAYERS layers go to a GPU, where the libraries have one.
"""

from __future__ import annotations

import ctypes as C
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from st3_edge.errors import St3Error
from st3_edge.native import libraries
from st3_edge.native.st3 import PieceStruct, native_overrides

KV_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
Value = str | int | float


class NativeError(St3Error):
    """A native call failed; the message holds the library's own words."""


def lib_dir() -> Path | None:
    """The folder of the native libraries, as the package finds it; None where they are not built."""
    folder = libraries.folder()
    return folder if libraries.path_of("llama").is_file() else None


def built() -> Path:
    """The folder of the native libraries. Raises SystemExit where they are not built."""
    folder = lib_dir()
    if folder is None:
        raise SystemExit("no native libraries: build the package (pip install .) or set ST3_LIB_DIR")
    return folder


def load(folder: Path, st3: bool) -> ModuleType:
    """llama.h on the libraries of that folder. Raises NativeError if this process runs on others already."""
    if st3:
        os.environ["ST3_LIB_DIR"] = str(folder)
    else:
        libraries.use_stock(folder)
    bindings = importlib.import_module("st3_edge.native.bindings.llama_cpp")
    runs_on = Path(bindings._lib._name).resolve().parent
    if runs_on != folder.resolve():
        raise NativeError(f"this process runs on the libraries in {runs_on}")
    return bindings


@dataclass(frozen=True)
class Image:
    """Embeddings float32 [n, width] of an image and its patch grid (0, 0: unknown). non_causal: its tokens see each
    other."""

    embd: np.ndarray
    nx: int = 0
    ny: int = 0
    non_causal: bool = False


_callbacks: list[object] = []


def lasting(callback: Any) -> Any:
    """A log callback for as long as the process lives: whoever sets theirs after it may pass lines on to it."""
    _callbacks.append(callback)
    return callback


class Runtime:
    """The libraries of one folder. `st3` is False for stock llama.cpp, which has no st3_* functions."""

    def __init__(self, folder: Path, st3: bool = True) -> None:
        self.llama = L = load(folder, st3)
        self.log: list[str] = []
        on_log = lasting(L.llama_log_callback(self._take_log))
        self._old_log = C.c_void_p(), C.c_void_p()
        self.lib = C.CDLL(L._lib._name)  # the same library; argtypes of our own, the package sets others
        get_log = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)(("llama_log_get", self.lib))
        get_log(*(C.addressof(p) for p in self._old_log))
        L.llama_log_set(on_log, C.c_void_p(0))
        L.llama_backend_init()
        libraries.load_backends(self.lib)
        if st3:
            f = self.lib
            f.st3_abi_version.restype = C.c_int32
            f.st3_last_error.restype = C.c_char_p
            f.st3_check_model.argtypes = [C.c_void_p]
            f.st3_prefill.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.POINTER(PieceStruct), C.c_size_t]
            f.st3_positions.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.POINTER(C.c_int32), C.c_int32]
            f.st3_weights.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.POINTER(C.c_float), C.c_int32]
            f.st3_visual.argtypes = f.st3_positions.argtypes
            f.st3_kept.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.POINTER(C.c_int32), C.c_int32]
            f.st3_owners.argtypes = f.st3_kept.argtypes
            f.st3_report.argtypes = [C.c_void_p, C.c_int32, C.c_char_p, C.c_size_t]
            f.st3_report.restype = C.c_size_t
            f.st3_announce_image.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.c_int32, C.c_char_p]
            f.st3_announce_image.restype = None
            f.st3_prefill_flops.argtypes = [C.c_void_p, C.c_int32, C.c_int32]
            f.st3_prefill_flops.restype = C.c_double

    def close(self) -> None:
        """Give the log back to whom it went before."""
        set_log = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)(("llama_log_set", self.lib))
        set_log(*self._old_log)

    def _take_log(self, level: int, text: bytes, _: C.c_void_p) -> None:
        if level >= 3:
            self.log.append(text.decode(errors="replace"))
            del self.log[:-200]

    def last_error(self) -> str:
        """st3_last_error()."""
        return self.lib.st3_last_error().decode()


class Model:
    """A loaded GGUF; `overrides` are metadata that the file lacks."""

    def __init__(self, rt: Runtime, path: Path, overrides: dict[str, Value] | None = None, repack: bool = True) -> None:
        L, self.rt = rt.llama, rt
        params = L.llama_model_default_params()
        params.n_gpu_layers = int(os.environ.get("ST3_GPU_LAYERS", "0"))
        params.use_extra_bufts = repack
        self._overrides = params.kv_overrides = native_overrides(L, overrides or {})
        rt.log.clear()
        self.ptr = L.llama_model_load_from_file(str(path).encode(), params)
        if not self.ptr:
            raise NativeError(f"cannot load {path.name}: {''.join(rt.log)}")
        self.n_embd = L.llama_model_n_embd(self.ptr)
        self.n_embd_inp = L.llama_model_n_embd_inp(self.ptr)  # wider with deepstack
        self.mrope = L.llama_model_rope_type(self.ptr) in (8, 40)  # LLAMA_ROPE_TYPE_MROPE, _IMROPE
        self.n_layer = L.llama_model_n_layer(self.ptr)
        self.vocab = L.llama_model_get_vocab(self.ptr)
        self.n_vocab = L.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; contexts must be closed before."""
        if self.ptr:
            self.rt.llama.llama_model_free(self.ptr)
            self.ptr = None

    def check(self) -> str | None:
        """What st3_check_model has against the metadata; None if nothing."""
        return self.rt.last_error() if self.rt.lib.st3_check_model(self.ptr) else None

    def adapter(self, path: Path) -> object:
        """A LoRA adapter, which the model frees. Raises NativeError."""
        self.rt.log.clear()
        made = self.rt.llama.llama_adapter_lora_init(self.ptr, str(path).encode())
        if not made:
            raise NativeError(f"cannot load {path.name}: {''.join(self.rt.log)}")
        return made

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, without BOS."""
        raw = text.encode()
        out = (C.c_int32 * (len(raw) + 8))()
        n = self.rt.llama.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, special)
        return list(out[:n])

    def bos(self) -> list[int]:
        """What a prompt begins with: the BOS token where the file asks for it."""
        llama = self.rt.llama
        return [llama.llama_vocab_bos(self.vocab)] if llama.llama_vocab_get_add_bos(self.vocab) else []

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        out, raw = C.create_string_buffer(256), b""
        for t in tokens:
            n = self.rt.llama.llama_token_to_piece(self.vocab, t, out, len(out), 0, False)
            raw += out.raw[:n]
        return raw.decode(errors="replace")


class Context:
    """A context of a model."""

    def __init__(
        self,
        model: Model,
        n_ctx: int = 512,
        n_ubatch: int | None = None,
        n_batch: int | None = None,
        kv: str = "F16",
        threads: int = 1,
        flash: bool = True,
        n_seq: int = 1,
        unified: bool = False,
        pooling: int | None = None,
    ) -> None:
        L, self.model, self.rt = model.rt.llama, model, model.rt
        params = L.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch or n_ctx
        params.n_ubatch = n_ubatch or n_ctx
        params.n_seq_max = n_seq
        params.kv_unified = unified
        if pooling is not None:
            params.embeddings, params.pooling_type = True, pooling
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else L.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = False
        self._keep_alive: object = None
        self.rt.log.clear()
        self.ptr = L.llama_init_from_model(model.ptr, params)
        if not self.ptr:
            raise NativeError(f"no context: {''.join(self.rt.log)}")

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        if self.ptr:
            self.rt.llama.llama_free(self.ptr)
            self.ptr = None

    def prefill(self, pieces: Sequence[Sequence[int] | Image], p0: int = 0, seq: int = 0) -> int:
        """st3_prefill; returns its code."""
        array, keep = (PieceStruct * len(pieces))(), []
        for slot, piece in zip(array, pieces, strict=True):
            if isinstance(piece, Image):
                data = np.ascontiguousarray(piece.embd, np.float32)
                slot.embd = data.ctypes.data_as(C.POINTER(C.c_float))
                slot.n, slot.nx, slot.ny, slot.non_causal = len(data), piece.nx, piece.ny, piece.non_causal
            else:
                data = np.ascontiguousarray(piece, np.int32)
                slot.tokens = data.ctypes.data_as(C.POINTER(C.c_int32))
                slot.n = len(data)
            keep.append(data)
        return self.rt.lib.st3_prefill(self.ptr, seq, p0, array, len(pieces))

    def decode(self, rows: Sequence[int] | np.ndarray, p0: int, outputs: str = "last", seq: int = 0) -> int:
        """llama_decode of token ids, or of embeddings [n, width], from position p0 on; returns its code."""
        L = self.rt.llama
        embd = isinstance(rows, np.ndarray)
        n = len(rows)
        batch = L.llama_batch_init(n, self.model.n_embd_inp if embd else 0, 1)
        try:
            batch.n_tokens = n
            if embd:
                data = np.ascontiguousarray(rows, np.float32)
                C.memmove(batch.embd, data.ctypes.data, data.nbytes)
            for i in range(n):
                if not embd:
                    batch.token[i] = int(rows[i])
                batch.pos[i] = p0 + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = outputs == "all" or (outputs == "last" and i == n - 1)
            return L.llama_decode(self.ptr, batch)
        finally:
            L.llama_batch_free(batch)

    def decode_rows(self, rows: Sequence[tuple[int, int, Sequence[int]]], outputs: Sequence[int] | None = None) -> int:
        """llama_decode of (token, position, sequences), rows of `outputs` (None: all) with logits; returns its code."""
        L = self.rt.llama
        batch = L.llama_batch_init(len(rows), 0, max(len(seqs) for _, _, seqs in rows))
        try:
            batch.n_tokens = len(rows)
            for i, (token, pos, seqs) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, len(seqs)
                batch.logits[i] = outputs is None or i in outputs
                for j, seq in enumerate(seqs):
                    batch.seq_id[i][j] = seq
            return L.llama_decode(self.ptr, batch)
        finally:
            L.llama_batch_free(batch)

    def logits(self, i: int = -1) -> np.ndarray:
        """A copy of the logits of output i of the last batch."""
        p = self.rt.llama.llama_get_logits_ith(self.ptr, i)
        if not p:
            raise NativeError(f"no logits for output {i}")
        return np.ctypeslib.as_array(p, (self.model.n_vocab,)).copy()

    def embeddings(self, seq: int = 0) -> np.ndarray:
        """A copy of the pooled embeddings of a sequence."""
        p = self.rt.llama.llama_get_embeddings_seq(self.ptr, seq)
        if not p:
            raise NativeError(f"no embeddings of sequence {seq}")
        return np.ctypeslib.as_array(p, (self.model.n_embd,)).copy()

    def announce(self, n: int, nx: int = 0, ny: int = 0, picture: str = "") -> None:
        """st3_announce_image."""
        self.rt.lib.st3_announce_image(self.ptr, n, nx, ny, picture.encode())

    def picture(self, image: Image, p0: int, seq: int = 0) -> int:
        """An image as mtmd's helper decodes it: announced, in batches of n_batch; returns llama_decode's code."""
        n, n_batch = len(image.embd), self.rt.llama.llama_n_batch(self.ptr)
        self.announce(n, image.nx, image.ny)
        for i in range(0, n, n_batch):
            if code := self.decode(image.embd[i : i + n_batch], p0 + i, "none", seq):
                return code
        return 0

    def kept(self, n_cuts: int, seq: int = -1) -> list[np.ndarray]:
        """st3_kept of cuts 0 to n_cuts - 1."""
        return [self._of_cut(self.rt.lib.st3_kept, i, seq) for i in range(n_cuts)]

    def owners(self, n_cuts: int, seq: int = -1) -> list[np.ndarray]:
        """st3_owners of cuts 0 to n_cuts - 1."""
        return [self._of_cut(self.rt.lib.st3_owners, i, seq) for i in range(n_cuts)]

    def _of_cut(self, function: Callable, i: int, seq: int) -> np.ndarray:
        n = function(self.ptr, seq, i, None, 0)
        if n < 0:
            raise NativeError(f"nothing of cut {i}: {self.rt.last_error()}")
        row = (C.c_int32 * max(1, n))()
        function(self.ptr, seq, i, row, n)
        return np.array(row[:n], dtype=np.int64)

    def report(self, seq: int = -1) -> dict:
        """st3_report."""
        n = self.rt.lib.st3_report(self.ptr, seq, None, 0)
        out = C.create_string_buffer(n + 1)
        self.rt.lib.st3_report(self.ptr, seq, out, n + 1)
        return json.loads(out.value)

    @property
    def _memory(self) -> object:
        return self.rt.llama.llama_get_memory(self.ptr)

    def adapt(self, adapters: Sequence[tuple[object, float]]) -> int:
        """llama_set_adapters_lora with these strengths; returns its code."""
        L, n = self.rt.llama, len(adapters)
        pointers = (L.llama_adapter_lora_p_ctypes * n)(*(adapter for adapter, _ in adapters))
        scales = (C.c_float * n)(*(strength for _, strength in adapters))
        return L.llama_set_adapters_lora(self.ptr, pointers, n, scales)

    def clear(self) -> None:
        """Empty the cache."""
        self.rt.llama.llama_memory_clear(self._memory, True)

    def positions(self, seq: int = 0) -> tuple[int, int]:
        """Smallest and largest position in the cache, (-1, -1) where it is empty."""
        L = self.rt.llama
        return L.llama_memory_seq_pos_min(self._memory, seq), L.llama_memory_seq_pos_max(self._memory, seq)

    def held(self, layer: int, seq: int = 0) -> np.ndarray:
        """st3_positions: the positions of a sequence that a layer holds. Raises NativeError."""
        n = self.rt.lib.st3_positions(self.ptr, seq, layer, None, 0)
        if n < 0:
            raise NativeError(self.rt.last_error())
        out = np.empty(n, np.int32)
        if self.rt.lib.st3_positions(self.ptr, seq, layer, out.ctypes.data_as(C.POINTER(C.c_int32)), n) != n:
            raise NativeError("the number of positions changed")
        return out.astype(np.int64)

    def weights(self, layer: int, seq: int = 0) -> np.ndarray:
        """st3_weights: beside `held`, how many tokens each position stands for."""
        n = self.rt.lib.st3_weights(self.ptr, seq, layer, None, 0)
        if n < 0:
            raise NativeError(self.rt.last_error())
        row = (C.c_float * max(1, n))()
        self.rt.lib.st3_weights(self.ptr, seq, layer, row, n)
        return np.array(row[:n], dtype=np.float64)

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        """llama_memory_seq_rm."""
        return self.rt.llama.llama_memory_seq_rm(self._memory, seq, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """llama_memory_seq_cp."""
        self.rt.llama.llama_memory_seq_cp(self._memory, src, dst, p0, p1)

    def can_shift(self) -> bool:
        """llama_memory_can_shift."""
        return self.rt.llama.llama_memory_can_shift(self._memory)

    def seq_keep(self, seq: int) -> None:
        """llama_memory_seq_keep."""
        self.rt.llama.llama_memory_seq_keep(self._memory, seq)

    def seq_add(self, seq: int, p0: int, p1: int, by: int) -> None:
        """llama_memory_seq_add."""
        self.rt.llama.llama_memory_seq_add(self._memory, seq, p0, p1, by)

    def seq_div(self, seq: int, p0: int, p1: int, by: int) -> None:
        """llama_memory_seq_div."""
        self.rt.llama.llama_memory_seq_div(self._memory, seq, p0, p1, by)

    def state_size(self, seq: int | None = None) -> int:
        """The bytes that `save` will take."""
        L = self.rt.llama
        return L.llama_state_get_size(self.ptr) if seq is None else L.llama_state_seq_get_size(self.ptr, seq)

    def save(self, seq: int | None = None) -> bytes:
        """The state of a sequence, or of the whole context. Raises NativeError."""
        L, size = self.rt.llama, self.state_size(seq)
        raw = (C.c_uint8 * max(1, size))()
        if seq is None:
            n = L.llama_state_get_data(self.ptr, raw, size)
        else:
            n = L.llama_state_seq_get_data(self.ptr, raw, size, seq)
        if n != size or not n:
            raise NativeError(f"a state of {size} bytes, {n} of them written")
        return bytes(raw)

    def restore(self, raw: bytes, seq: int | None = None) -> int:
        """Put a saved state back; returns the bytes read, 0 where it is refused."""
        L = self.rt.llama
        data = (C.c_uint8 * max(1, len(raw))).from_buffer_copy(raw or b"\0")
        if seq is None:
            return L.llama_state_set_data(self.ptr, data, len(raw))
        return L.llama_state_seq_set_data(self.ptr, data, len(raw), seq)

    def save_file(self, path: Path, seq: int | None = None) -> bool:
        """Write a state to a file; false where that failed."""
        L, name = self.rt.llama, str(path).encode()
        if seq is None:
            return bool(L.llama_state_save_file(self.ptr, name, None, 0))
        return L.llama_state_seq_save_file(self.ptr, name, seq, None, 0) > 0

    def load_file(self, path: Path, seq: int | None = None) -> bool:
        """Read it back; false where it is refused."""
        L, name, n, room = self.rt.llama, str(path).encode(), C.c_size_t(), (C.c_int32 * 1)()
        if seq is None:
            return bool(L.llama_state_load_file(self.ptr, name, room, 1, n))
        return L.llama_state_seq_load_file(self.ptr, name, seq, room, 1, n) > 0

    def abort_when(self, stop: Callable[[], bool] | None) -> None:
        """Set (or, with None, remove) a function that ends the running decode by returning True."""
        L = self.rt.llama
        self._keep_alive = L.ggml_abort_callback((lambda _: stop()) if stop else 0)
        L.llama_set_abort_callback(self.ptr, self._keep_alive, None)
