"""The vision half of a model, by way of libmtmd, for tests and measurements: see native_runtime.py."""

from __future__ import annotations

import ctypes as C
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from native_runtime import Context, Image, Model, NativeError, lasting

from st3_edge.native import log


class Vision:
    """The vision tower and projector of an mmproj file, by way of libmtmd."""

    def __init__(self, model: Model, mmproj: Path, threads: int = 2) -> None:
        mtmd = importlib.import_module("st3_edge.native.bindings.mtmd_cpp")
        self.m, self.n_embd = mtmd, model.n_embd_inp
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup, params.n_threads = False, False, False, threads
        if not log.is_ours():
            quiet = lasting(model.rt.llama.llama_log_callback(lambda level, text, data: None))
            mtmd.mtmd_log_set(quiet, None)
            mtmd.mtmd_helper_log_set(quiet, None)
        self.ctx = mtmd.mtmd_init_from_file(str(mmproj).encode(), model.ptr, params)
        if not self.ctx:
            raise NativeError(f"cannot load {mmproj.name}")

    @contextmanager
    def chunks(self, text: str, *pictures: np.ndarray) -> Iterator[object]:
        """The mtmd chunks of a prompt: text with "<__media__>" where each picture, uint8 [height, width, 3], goes.
        Raises NativeError."""
        m, raw = self.m, [np.ascontiguousarray(rgb, np.uint8) for rgb in pictures]
        bitmaps = [m.mtmd_bitmap_init(r.shape[1], r.shape[0], r.ctypes.data_as(C.POINTER(C.c_uint8))) for r in raw]
        chunks = m.mtmd_input_chunks_init()
        try:
            for i, bitmap in enumerate(bitmaps):
                m.mtmd_bitmap_set_id(bitmap, f"picture {i}".encode())
            words = m.mtmd_input_text(text.encode(), len(text.encode()), False, True)
            if m.mtmd_tokenize(self.ctx, chunks, C.byref(words), (C.c_void_p * len(raw))(*bitmaps), len(raw)):
                raise NativeError("the picture was refused")
            yield chunks
        finally:
            m.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                m.mtmd_bitmap_free(bitmap)

    def pieces(self, chunks: object) -> list[list[int] | Image]:
        """Text tokens, and the embeddings of each image chunk, in order. Raises NativeError."""
        m, out = self.m, []
        for i in range(m.mtmd_input_chunks_size(chunks)):
            chunk = m.mtmd_input_chunks_get(chunks, i)
            if m.mtmd_input_chunk_get_type(chunk) == m.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                out.append(self._encode(chunk))
            else:
                n = C.c_size_t()
                tokens = m.mtmd_input_chunk_get_tokens_text(chunk, C.byref(n))
                out.append([int(t) for t in tokens[: n.value]])
        return out

    def _encode(self, chunk: object) -> Image:
        m = self.m
        if m.mtmd_encode_chunk(self.ctx, chunk):
            raise NativeError("the picture was not encoded")
        tokens = m.mtmd_input_chunk_get_tokens_image(chunk)
        n = m.mtmd_image_tokens_get_n_tokens(tokens)
        nx, ny = m.mtmd_image_tokens_get_nx(tokens), m.mtmd_image_tokens_get_ny(tokens)
        out = np.ctypeslib.as_array(m.mtmd_get_output_embd(self.ctx), (n, self.n_embd)).copy()
        side = int(n**0.5)
        if ny == 1 and side * side == n:  # mtmd tells the grid of LLaVA as one row
            nx = ny = side
        return Image(out, nx, ny) if nx * ny == n else Image(out)

    def encode(self, rgb: np.ndarray) -> Image:
        """Embeddings of a picture, uint8 [height, width, 3], the first image of several. Raises NativeError."""
        with self.chunks("<__media__>", rgb) as chunks:
            return next(p for p in self.pieces(chunks) if isinstance(p, Image))

    def evaluate(self, ctx: Context, chunks: object, p0: int = 0, seq: int = 0) -> int:
        """Chunks into a sequence by mtmd's helper, as front ends do; returns the position that follows. Raises
        NativeError."""
        m, end = self.m, ctx.rt.llama.llama_pos(0)
        n_batch = ctx.rt.llama.llama_n_batch(ctx.ptr)
        if code := m.mtmd_helper_eval_chunks(self.ctx, ctx.ptr, chunks, p0, seq, n_batch, True, C.byref(end)):
            raise NativeError(f"the prompt was not decoded ({code})")
        return int(end.value)

    def close(self) -> None:
        """Free the tower."""
        if self.ctx:
            self.m.mtmd_free(self.ctx)
            self.ctx = None
