"""Upstream's vision encoder (mtmd): a rendered prompt to tokens, its pictures to the embeddings that the decoder takes
in their place."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _libs, _log
from ._native import Piece, Text, Visual
from .errors import ImageError, ModelError, PromptError
from .images import RGB


class Vision:
    """A vision encoder with its projector (an "mmproj" GGUF), for one loaded text model.

    `model`: the llama_model pointer, which must outlive this object. Raises ModelError where the file does not load,
    does not fit the model, or needs what pruned prefill has not (M-RoPE positions, non-causal image attention).
    """

    def __init__(self, path: str, model: Any, *, n_threads: int, use_gpu: bool) -> None:
        bindings = _libs.load()
        self._mtmd = mtmd = bindings.mtmd
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.n_threads = n_threads
        _log.forget()
        context = mtmd.mtmd_init_from_file(path.encode(), model, params)
        if not context:
            raise ModelError(f"mmproj {path!r} cannot be used{_log.why()}")
        self.close = weakref.finalize(self, mtmd.mtmd_free, context)
        self._context = context
        self._n_embd = bindings.lib.llama_model_n_embd_inp(model)
        if not mtmd.mtmd_support_vision(context):
            raise ModelError(f"mmproj {path!r} has no vision encoder")
        if mtmd.mtmd_decode_use_mrope(context) or mtmd.mtmd_decode_use_non_causal(context, None):
            raise ModelError(f"mmproj {path!r} is of a model family that is not supported: LLaVA's is")

    def tokenize(self, parts: Sequence[str | RGB], bos: int | None = None) -> Tokenized:
        """Text and pictures, in order, to tokens; `bos` is put before them. Nothing is encoded yet.

        The written forms of control tokens in the text become these tokens.
        """
        mtmd = self._mtmd
        chunks = mtmd.mtmd_input_chunks_init()
        result = Tokenized(self, chunks, bos)
        bitmaps = []
        try:
            inputs = []
            for part in parts:
                if isinstance(part, RGB):
                    pixels = (ctypes.c_uint8 * len(part.data)).from_buffer_copy(part.data)
                    bitmaps.append(mtmd.mtmd_bitmap_init(part.width, part.height, pixels))
                    inputs.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
                else:
                    text = part.encode()
                    inputs.append(
                        mtmd.mtmd_input_part(ctypes.pointer(mtmd.mtmd_input_text(text, len(text), False, True)), None)
                    )
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(inputs))(*(ctypes.pointer(part) for part in inputs))
            _log.forget()
            if mtmd.mtmd_tokenize_from_parts(self._context, chunks, pointers, len(inputs), False):
                raise PromptError(f"the prompt cannot be tokenized{_log.why()}")
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        return result

    def encode(self, chunk: Any) -> Visual:
        """The embeddings of an image chunk of `Tokenized`."""
        mtmd = self._mtmd
        _log.forget()
        if mtmd.mtmd_encode_chunk(self._context, chunk):
            raise ImageError(f"a picture cannot be encoded{_log.why()}")
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        embd = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._context), (n, self._n_embd)).copy()
        # mtmd tells the patch grid of M-RoPE models only; the pictures of LLaVA's are square.
        side = math.isqrt(n)
        return Visual(embd, side, side) if side * side == n else Visual(embd, 0, 0)


class Tokenized:
    """A prompt in tokens, not yet encoded."""

    def __init__(self, vision: Vision, chunks: Any, bos: int | None) -> None:
        self._vision, self._chunks, self._bos = vision, chunks, bos
        self._mtmd = vision._mtmd
        weakref.finalize(self, self._mtmd.mtmd_input_chunks_free, chunks)

    def _each(self) -> list[Any]:
        mtmd = self._mtmd
        return [mtmd.mtmd_input_chunks_get(self._chunks, i) for i in range(self.n_chunks)]

    @property
    def n_chunks(self) -> int:
        return int(self._mtmd.mtmd_input_chunks_size(self._chunks))

    @property
    def n_tokens(self) -> int:
        """All tokens of the prompt, visual ones too: the positions that it takes."""
        count = sum(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk) for chunk in self._each())
        return int(count) + (self._bos is not None)

    @property
    def ids(self) -> list[int]:
        """The token ids, with one -1 for each image."""
        ids = [] if self._bos is None else [self._bos]
        for chunk in self._each():
            text = self._text(chunk)
            ids += [-1] if text is None else text
        return ids

    def pieces(self) -> list[Piece]:
        """Encodes the pictures; the prompt as `_native.prefill` takes it."""
        pieces: list[Piece] = []
        pending = [] if self._bos is None else [self._bos]
        for chunk in self._each():
            text = self._text(chunk)
            if text is not None:
                pending += text
                continue
            if pending:
                pieces.append(Text(np.array(pending, np.int32)))
                pending = []
            pieces.append(self._vision.encode(chunk))
        if pending:
            pieces.append(Text(np.array(pending, np.int32)))
        return pieces

    def _text(self, chunk: Any) -> list[int] | None:
        """The ids of a text chunk; None for an image's."""
        mtmd = self._mtmd
        if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            return None
        n = ctypes.c_size_t()
        tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
        return list(tokens[: n.value])
