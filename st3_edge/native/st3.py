"""native/st3.h in Python: the pieces of a prompt, prefill, what was kept, and the report."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Override
from . import libraries
from .batch import Batch


class PieceStruct(ctypes.Structure):
    """struct st3_piece."""

    _fields_ = [
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("n", ctypes.c_int32),
        ("nx", ctypes.c_int32),
        ("ny", ctypes.c_int32),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_pos", ctypes.c_int32),
        ("non_causal", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Text:
    """A run of text tokens: ids, int32 [n]."""

    tokens: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Visual:
    """One image as the decoder takes it: embd float32 [n][n_embd]; nx * ny == n is its patch grid, row by row
    (0, 0: unknown). pos: of a model with M-RoPE, int32 [n][4], where its tokens are, and n_pos, how many positions it
    takes (st3.h); non_causal: its tokens see each other."""

    embd: npt.NDArray[np.float32]
    nx: int
    ny: int
    pos: npt.NDArray[np.int32] | None = None
    n_pos: int = 0
    non_causal: bool = False

    def above(self, other: Visual) -> Visual:
        """One image of both, the other's rows below."""
        embd = np.concatenate([self.embd, other.embd])
        pos = None if self.pos is None or other.pos is None else np.concatenate([self.pos, other.pos])
        grid = (self.nx, self.ny + other.ny) if self.nx == other.nx else (0, 0)
        return Visual(embd, *grid, pos, self.n_pos + other.n_pos)


Piece = Text | Visual


@functools.cache
def _st3() -> ctypes.CDLL:
    lib: ctypes.CDLL = libraries.load().lib._lib
    context = ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "st3_last_error": (ctypes.c_char_p, []),
        "st3_prefill": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(PieceStruct), ctypes.c_size_t],
        ),
        "st3_sample": (ctypes.c_int32, [ctypes.c_void_p, context, ctypes.c_int32]),
        "st3_kept": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
        ),
        "st3_owners": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
        ),
        "st3_visual": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
        ),
        "st3_report": (ctypes.c_size_t, [context, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t]),
        "st3_prefill_flops": (ctypes.c_double, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def set_callback(params: Any, field: str, name: str, stop: ctypes.c_bool) -> None:
    """Puts the function `name` of st3.h (st3_stop_*) into a callback of native parameters; it reads `stop`, which must
    live as long as what is made with them."""
    kind = dict(params._fields_)[field]
    setattr(params, field, ctypes.cast(getattr(_st3(), name), kind))
    setattr(params, f"{field}_{'data' if field == 'abort_callback' else 'user_data'}", ctypes.addressof(stop))


def last_error() -> str:
    """What went wrong in the last st3 call of this thread that failed; "" if none did."""
    return (_st3().st3_last_error() or b"").decode("utf-8", "replace")


def sample(sampler: Any, context: Any) -> int | None:
    """A token by the logits that the last decode left, which the llama_sampler accepts; None where none may follow."""
    token: int = _st3().st3_sample(sampler, context, -1)
    return token if token >= 0 else None


def prefill(context: Any, p0: int, pieces: Sequence[Piece]) -> int:
    """Prefills `pieces` into sequence 0, which ends before p0. Returns 0 or an error code of st3_prefill."""
    array = (PieceStruct * len(pieces))()
    keep_alive: list[npt.NDArray[Any]] = []
    for slot, piece in zip(array, pieces, strict=True):
        if isinstance(piece, Text):
            data: npt.NDArray[Any] = np.ascontiguousarray(piece.tokens, np.int32)
            slot.tokens = data.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            data = np.ascontiguousarray(piece.embd, np.float32)
            slot.embd = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            slot.nx, slot.ny = piece.nx, piece.ny
            slot.n_pos, slot.non_causal = piece.n_pos, piece.non_causal
            if piece.pos is not None:
                pos = np.ascontiguousarray(piece.pos, np.int32)
                slot.pos = pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
                keep_alive.append(pos)
        slot.n = len(data)
        keep_alive.append(data)
    return int(_st3().st3_prefill(context, 0, p0, array, len(pieces)))


def kept(context: Any, i_cut: int) -> list[int]:
    """The visual indices kept after cut `i_cut` of the last prefill, ascending; [] if nothing was pruned there."""
    return _of_cut(_st3().st3_kept, context, i_cut)


def owners(context: Any, i_cut: int) -> list[int]:
    """For each visual token of the last prefill, which one stands for it after cut `i_cut`, -1 for none; [] if nothing
    was merged."""
    return _of_cut(_st3().st3_owners, context, i_cut)


def _of_cut(function: Any, context: Any, i_cut: int) -> list[int]:
    n = function(context, 0, i_cut, None, 0)
    if n <= 0:
        return []
    out = (ctypes.c_int32 * n)()
    function(context, 0, i_cut, out, n)
    return list(out)


def visual(context: Any, layer: int) -> npt.NDArray[np.int32] | None:
    """The visual tokens of sequence 0 that a layer holds now: indices over all its images, ascending, int32 [n];
    None for memory that cannot tell."""
    n = _st3().st3_visual(context, 0, layer, None, 0)
    if n < 0:
        return None
    out = np.empty(n, np.int32)
    _st3().st3_visual(context, 0, layer, out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
    return out


def report(context: Any) -> dict[str, Any]:
    """The object of st3_report, about sequence 0."""
    size = _st3().st3_report(context, 0, None, 0) + 1
    buffer = ctypes.create_string_buffer(size)
    _st3().st3_report(context, 0, buffer, size)
    result: dict[str, Any] = json.loads(buffer.value)
    return result


def prefill_flops(model: Any, n_rows: int, n_before: int) -> int:
    """Multiplications and additions, counted as two, of an unpruned prefill of n_rows positions after n_before."""
    return int(_st3().st3_prefill_flops(model, n_rows, n_before))


def anneals(context: Any) -> bool:
    """Whether visual tokens leave while an answer grows."""
    return bool(report(context).get("anneal", {}).get("curve", "none") != "none")


def decode(context: Any, p0: int, tokens: Sequence[int]) -> int:
    """Decodes text tokens into sequence 0 from position p0 on, in one batch that gives logits for each. Returns 0 or an
    error code of llama_decode."""
    with contextlib.closing(Batch(len(tokens))) as batch:
        batch.fill(tokens, p0, all_logits=True)
        return int(libraries.load().lib.llama_decode(context, batch.native))


def remove(context: Any, p0: int) -> bool:
    """Frees the positions of sequence 0 from p0 on. False where the memory cannot forget a part of a sequence."""
    lib = libraries.load().lib
    memory = lib.llama_get_memory(context)
    if p0 == 0:
        lib.llama_memory_clear(memory, False)
        return True
    return bool(lib.llama_memory_seq_rm(memory, 0, p0, -1))


def n_positions(context: Any) -> int:
    """The position that follows all of sequence 0."""
    lib = libraries.load().lib
    return int(lib.llama_memory_seq_pos_max(lib.llama_get_memory(context), 0)) + 1


def get_state(context: Any) -> bytes:
    """What sequence 0 holds, as llama.cpp writes it."""
    lib = libraries.load().lib
    size = lib.llama_state_seq_get_size(context, 0)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(memoryview(buffer)[: lib.llama_state_seq_get_data(context, buffer, size, 0)])


def set_state(context: Any, state: bytes) -> bool:
    """Replaces sequence 0 by what `get_state` gave; False where llama.cpp refuses it: the sequence may be lost then."""
    lib = libraries.load().lib
    buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    return bool(lib.llama_state_seq_set_data(context, buffer, len(state), 0) == len(state))


def native_overrides(lib: Any, keys: Mapping[str, Override]) -> Any:
    """An array of llama_model_kv_override, with the empty one that ends it."""
    array = (lib.llama_model_kv_override * (len(keys) + 1))()
    for slot, (key, value) in zip(array, keys.items(), strict=False):
        slot.key = key.encode()
        if isinstance(value, str):
            slot.tag, slot.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        elif isinstance(value, bool):
            slot.tag, slot.value.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            slot.tag, slot.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            slot.tag, slot.value.val_f64 = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
    return array
