"""Upstream's vision encoder (mtmd): a rendered prompt to tokens, its pictures to the embeddings that the decoder takes
in their place."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, ModelError, PromptError, St3Error
from ..files import gguf
from ..native import libraries, log, st3
from ..native.st3 import Piece, Visual
from ..prompts.images import RGB
from .conversation import Image, Unit, n_positions, pieces_of


@dataclasses.dataclass(frozen=True)
class Tile:
    """What the vision encoder sees of a picture, or of a part of it: uint8 [height][width][3], and in how many visual
    tokens."""

    pixels: npt.NDArray[np.uint8]
    n: int


class Vision:
    """A vision encoder with its projector (an "mmproj" GGUF), for one loaded text model.

    `model`: the llama_model pointer, which must outlive this object. `n_embd`: how wide its embeddings are. `stop`: a
    flag that ends loading and encoding, as `Worker`'s. Raises ModelError where the file does not load, does not fit the
    model, or has no vision encoder.
    """

    def __init__(
        self, path: str, model: Any, *, n_threads: int, use_gpu: bool, stop: ctypes.c_bool | None = None
    ) -> None:
        bindings = libraries.load()
        self._mtmd = mtmd = bindings.mtmd
        arrays = gguf.read_header(path, "mmproj").arrays
        mean, std = (arrays.get(f"clip.vision.image_{name}", ()) for name in ("mean", "std"))
        self._mean, self._std = np.array(mean or 0.0), np.array(std or 1.0)
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
            self._mrope = mtmd.mtmd_decode_use_mrope(context)
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
        return Visual(embd, *self._grid(chunk, n))

    def _grid(self, chunk: Any, n: int) -> tuple[int, int]:
        """Columns and rows of an image's patches; 0, 0: unknown. mtmd knows those of M-RoPE models, by the place of the
        last one. Others are taken for a square where they can be one."""
        last = self._mtmd.mtmd_image_tokens_get_decoder_pos(self._image_tokens(chunk), 0, n - 1)
        nx, ny = (last.x + 1, last.y + 1) if self._mrope else (math.isqrt(n),) * 2
        return (nx, ny) if nx * ny == n else (0, 0)

    def place(self, chunk: Any, visual: Visual, p0: int) -> Visual:
        """The embeddings of an image chunk with what the decoder needs to know where they are, from position p0 on."""
        mtmd = self._mtmd
        non_causal = bool(mtmd.mtmd_decode_use_non_causal(self._context, chunk))
        pos: npt.NDArray[np.int32] | None = None
        if self._mrope:
            tokens = self._image_tokens(chunk)
            places = (mtmd.mtmd_image_tokens_get_decoder_pos(tokens, p0, i) for i in range(len(visual.embd)))
            # mtmd's helper gives the decoder y before x
            pos = np.array([(place.t, place.y, place.x, place.z) for place in places], np.int32)
        n_pos = mtmd.mtmd_input_chunk_get_n_pos(chunk)
        return dataclasses.replace(visual, pos=pos, n_pos=n_pos, non_causal=non_causal)

    def tile(self, chunk: Any) -> Tile:
        """What the encoder sees for an image chunk. Raises ImageError where that is not one picture."""
        size = (ctypes.c_int32 * 2)()
        pixels = self._pixels(chunk, *(ctypes.byref(size, 4 * i) for i in range(2)))
        if not pixels:
            raise ImageError("what the vision encoder sees of this picture is not one picture")
        seen = np.ctypeslib.as_array(pixels, (size[1], size[0], 3)) * self._std + self._mean
        n = self._mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return Tile(np.clip(np.rint(255 * seen), 0, 255).astype(np.uint8), n)

    @functools.cached_property
    def _pixels(self) -> Any:
        function = self._mtmd._libmtmd.st3_chunk_pixels
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        function.restype = ctypes.POINTER(ctypes.c_float)
        return function

    def _image_tokens(self, chunk: Any) -> Any:
        return self._mtmd.mtmd_input_chunk_get_tokens_image(chunk)


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
        return self._vision.encode(self._read[1][self.units.index(image)])

    def tiles(self) -> list[Tile]:
        """What the vision encoder sees of its pictures, in order. Raises ImageError."""
        return [self._vision.tile(chunk) for chunk in self._read[1].values()]

    def pieces(self, visual: Mapping[Image, Visual], first: int = 0, p0: int = 0) -> list[Piece]:
        """Its units from number `first` on, as `st3.prefill` takes them from position p0 on. `visual`: the embeddings
        of their images."""
        units, chunks = self._read
        placed = []
        for i in range(first, len(units)):
            unit = units[i]
            if isinstance(unit, Image):
                placed.append(self._vision.place(chunks[i], visual[unit], p0))
            p0 += n_positions([unit])
        return pieces_of(units[first:], placed)

    @functools.cached_property
    def _read(self) -> tuple[list[Unit], dict[int, Any]]:
        """Units, and the chunks of those that are images, by their number."""
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
            n, n_pos = mtmd.mtmd_input_chunk_get_n_tokens(chunk), mtmd.mtmd_input_chunk_get_n_pos(chunk)
            images[len(units)] = chunk
            units.append(Image(digest, part, n, n_pos if n_pos != n else None))
        return units, images
