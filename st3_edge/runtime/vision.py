"""Upstream's vision encoder (mtmd): a rendered prompt to tokens, its pictures to the embeddings that the decoder takes
in their place."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ImageError, ModelError, PromptError, St3Error
from ..native import libraries, log, st3
from ..native.st3 import Visual
from ..prompts.images import RGB
from .conversation import Image, Unit


class Vision:
    """A vision encoder with its projector (an "mmproj" GGUF), for one loaded text model.

    `model`: the llama_model pointer, which must outlive this object. `n_embd`: how wide its embeddings are. `stop`: a
    flag that ends loading and encoding, as `Worker`'s. Raises ModelError where the file does not load, does not
    fit the model, or needs what pruned prefill has not (M-RoPE positions, non-causal image attention).
    """

    def __init__(
        self, path: str, model: Any, *, n_threads: int, use_gpu: bool, stop: ctypes.c_bool | None = None
    ) -> None:
        bindings = libraries.load()
        self._mtmd = mtmd = bindings.mtmd
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.n_threads = n_threads
        self._stop = stop
        if stop is not None:
            st3.set_callback(params, "progress_callback", "st3_stop_load", stop)
            st3.set_callback(params, "cb_eval", "st3_stop_encode", stop)
        log.forget()
        context = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
        if not context:
            raise ModelError(f"mmproj {path!r} cannot be used{log.why()}")
        self._context = context
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            self.n_embd = bindings.lib.llama_model_n_embd_inp(model)
            if not mtmd.mtmd_support_vision(context):
                raise ModelError(f"mmproj {path!r} has no vision encoder")
            if mtmd.mtmd_decode_use_mrope(context) or mtmd.mtmd_decode_use_non_causal(context, None):
                raise ModelError(f"mmproj {path!r} is of a model family that is not supported: LLaVA's is")
            opened.pop_all()

    def close(self) -> None:
        """Frees it. Called again it does nothing."""
        context, self._context = self._context, None
        if context:
            self._mtmd.mtmd_free(context)

    def tokenize(self, parts: Sequence[str | RGB], bos: int | None = None) -> Tokenized:
        """Text and pictures, in order, to tokens; `bos` is put before them. Nothing is encoded yet.

        The written forms of control tokens in the text become these tokens.
        """
        mtmd = self._mtmd
        chunks = mtmd.mtmd_input_chunks_init()
        result = Tokenized(self, chunks, Counter(part.digest for part in parts if isinstance(part, RGB)), bos)
        bitmaps = []
        try:
            inputs = []
            for part in parts:
                if isinstance(part, RGB):
                    pixels = (ctypes.c_uint8 * len(part.data)).from_buffer_copy(part.data)
                    bitmaps.append(mtmd.mtmd_bitmap_init(part.width, part.height, pixels))
                    mtmd.mtmd_bitmap_set_id(bitmaps[-1], part.digest.encode())
                    inputs.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
                else:
                    text = part.encode()
                    inputs.append(
                        mtmd.mtmd_input_part(ctypes.pointer(mtmd.mtmd_input_text(text, len(text), False, True)), None)
                    )
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(inputs))(*(ctypes.pointer(part) for part in inputs))
            log.forget()
            if mtmd.mtmd_tokenize_from_parts(self._context, chunks, pointers, len(inputs), False):
                raise PromptError(f"the prompt cannot be tokenized{log.why()}")
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        return result

    def encode(self, chunk: Any) -> Visual:
        """The embeddings of an image chunk of `Tokenized`."""
        mtmd = self._mtmd
        log.forget()
        failed = mtmd.mtmd_encode_chunk(self._context, chunk)
        if self._stop is not None and self._stop.value:
            raise St3Error("the encoding of a picture was interrupted")
        if failed:
            raise ImageError(f"a picture cannot be encoded{log.why()}")
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        embd = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._context), (n, self.n_embd)).copy()
        # mtmd knows the patch grid of M-RoPE models only; the pictures of LLaVA's are square.
        side = math.isqrt(n)
        return Visual(embd, side, side) if side * side == n else Visual(embd, 0, 0)


class Tokenized:
    """A prompt in tokens, not yet encoded. `pictures`: how often each picture is in it, by digest."""

    def __init__(self, vision: Vision, chunks: Any, pictures: Counter[str], bos: int | None) -> None:
        self._vision, self._chunks, self._pictures, self._bos = vision, chunks, pictures, bos
        self._mtmd = vision._mtmd
        weakref.finalize(self, self._mtmd.mtmd_input_chunks_free, chunks).atexit = False

    @property
    def units(self) -> list[Unit]:
        """Its text tokens and images, in order."""
        return self._read[0]

    def encode(self, image: Image) -> Visual:
        """The embeddings of one of its images."""
        return self._vision.encode(self._read[1][image])

    @functools.cached_property
    def _read(self) -> tuple[list[Unit], dict[Image, Any]]:
        """Units, and the chunk of each image."""
        mtmd = self._mtmd
        chunks = [mtmd.mtmd_input_chunks_get(self._chunks, i) for i in range(mtmd.mtmd_input_chunks_size(self._chunks))]
        digests = [(mtmd.mtmd_input_chunk_get_id(chunk) or b"").decode() for chunk in chunks]  # "": text
        n_chunks, seen = Counter(digests), Counter[str]()
        units: list[Unit] = [] if self._bos is None else [self._bos]
        images = {}
        for chunk, digest in zip(chunks, digests, strict=True):
            if not digest:
                n = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                units += tokens[: n.value]
                continue
            # A picture that is there twice has the same parts twice.
            part = seen[digest] % (n_chunks[digest] // self._pictures[digest])
            seen[digest] += 1
            image = Image(digest, part, mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            units.append(image)
            images[image] = chunk
        return units, images
