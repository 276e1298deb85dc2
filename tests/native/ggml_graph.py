"""Just enough of ggml by way of ctypes to run one `ggml_attn_span` on a backend."""

from __future__ import annotations

import ctypes as C
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


class InitParams(C.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool)]


_P, _I64 = C.c_void_p, C.c_int64
_SIGNATURES = {
    "base": {
        "ggml_init": (_P, [InitParams]),
        "ggml_free": (None, [_P]),
        "ggml_new_tensor_1d": (_P, [_P, C.c_int, _I64]),
        "ggml_new_tensor_2d": (_P, [_P, C.c_int, _I64, _I64]),
        "ggml_new_tensor_3d": (_P, [_P, C.c_int, _I64, _I64, _I64]),
        "ggml_permute": (_P, [_P, _P, C.c_int, C.c_int, C.c_int, C.c_int]),
        "ggml_cpy": (_P, [_P, _P, _P]),
        "ggml_new_graph": (_P, [_P]),
        "ggml_new_graph_custom": (_P, [_P, C.c_size_t, C.c_bool]),
        "ggml_build_forward_expand": (None, [_P, _P]),
        "ggml_nbytes": (C.c_size_t, [_P]),
        "ggml_tensor_overhead": (C.c_size_t, []),
        "ggml_graph_overhead": (C.c_size_t, []),
        "ggml_graph_overhead_custom": (C.c_size_t, [C.c_size_t, C.c_bool]),
        "ggml_attn_span": (_P, [_P, _P, _P, _P, _P, C.c_float, C.c_int]),
        "ggml_backend_alloc_ctx_tensors": (_P, [_P, _P]),
        "ggml_backend_buffer_free": (None, [_P]),
        "ggml_backend_tensor_set": (None, [_P, _P, C.c_size_t, C.c_size_t]),
        "ggml_backend_tensor_get": (None, [_P, _P, C.c_size_t, C.c_size_t]),
        "ggml_backend_graph_compute": (C.c_int, [_P, _P]),
        "ggml_backend_supports_op": (C.c_bool, [_P, _P]),
        "ggml_backend_free": (None, [_P]),
        "ggml_backend_get_device": (_P, [_P]),
        "ggml_backend_dev_backend_reg": (_P, [_P]),
        "ggml_backend_reg_get_proc_address": (_P, [_P, C.c_char_p]),
    },
    "main": {
        "ggml_backend_init_by_type": (_P, [C.c_int, C.c_char_p]),
        "ggml_backend_load_all_from_path": (None, [C.c_char_p]),
    },
}


class Backend:
    """The first backend of a kind (enum ggml_backend_dev_type) in the libraries of a folder."""

    def __init__(self, folder: Path, kind: int) -> None:
        end = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
        for part, name in (("base", "ggml-base"), ("main", "ggml")):
            lib = C.CDLL(str(next(folder.glob(f"*{name}.{end}"))))
            for f, (result, arguments) in _SIGNATURES[part].items():
                function = getattr(lib, f)
                function.restype, function.argtypes = result, arguments
                setattr(self, f, function)
        self.backend = self.ggml_backend_init_by_type(kind, None)
        if not self.backend:
            self.ggml_backend_load_all_from_path(str(folder).encode())
            self.backend = self.ggml_backend_init_by_type(kind, None)
        if not self.backend:
            raise LookupError(f"no backend of kind {kind}")

    def attn_span(
        self,
        q: np.ndarray,
        k: np.ndarray,
        k_kind: Kind,
        mask: np.ndarray,
        ids: np.ndarray,
        scale: float,
        reduce: str,
        cache_view: bool,
        runs: int = 1,
    ) -> np.ndarray:
        """Run the op. q [n_head, n_q, d] float32; k: packed rows [n_head_kv, n_kv, bytes] (uint8).

        With `cache_view` q and k lie as a cache has them, heads of one token side by side, and are permuted. The graph
        runs `runs` times: a GPU may record it and then play it back.
        """
        n_head, n_q, d = q.shape
        n_head_kv, n_kv, _ = k.shape
        block, size = gguf.GGML_QUANT_SIZES[k_kind]
        assert k.shape[2] == d // block * size
        room = 16 * self.ggml_tensor_overhead() + self.ggml_graph_overhead()
        ctx = self.ggml_init(InitParams(room, None, True))
        buffer = None
        try:
            if cache_view:
                tq = self.ggml_new_tensor_3d(ctx, Kind.F32, d, n_head, n_q)
                tk = self.ggml_new_tensor_3d(ctx, k_kind, d, n_head_kv, n_kv)
                q, k = q.swapaxes(0, 1), k.swapaxes(0, 1)
            else:
                tq = self.ggml_new_tensor_3d(ctx, Kind.F32, d, n_q, n_head)
                tk = self.ggml_new_tensor_3d(ctx, k_kind, d, n_kv, n_head_kv)
            tm = self.ggml_new_tensor_2d(ctx, Kind.F16 if mask.dtype == np.float16 else Kind.F32, n_kv, n_q)
            ti = self.ggml_new_tensor_1d(ctx, Kind.I32, len(ids))
            vq, vk = tq, tk
            if cache_view:
                vq, vk = (self.ggml_permute(ctx, t, 0, 2, 1, 3) for t in (tq, tk))
            out = self.ggml_attn_span(ctx, vq, vk, tm, ti, scale, 1 if reduce == "max" else 0)
            graph = self.ggml_new_graph(ctx)
            self.ggml_build_forward_expand(graph, out)
            if not self.ggml_backend_supports_op(self.backend, out):
                raise NotImplementedError(f"no attn_span for {k_kind.name}")
            buffer = self.ggml_backend_alloc_ctx_tensors(ctx, self.backend)
            for t, data in ((tq, q), (tk, k), (tm, mask), (ti, ids.astype(np.int32))):
                raw = np.ascontiguousarray(data)
                assert raw.nbytes == self.ggml_nbytes(t)
                self.ggml_backend_tensor_set(t, raw.ctypes.data, 0, raw.nbytes)
            for _ in range(runs):
                if self.ggml_backend_graph_compute(self.backend, graph):
                    raise RuntimeError("graph failed")
            got = np.empty(len(ids), np.float32)
            self.ggml_backend_tensor_get(out, got.ctypes.data, 0, got.nbytes)
            return got
        finally:
            if buffer:
                self.ggml_backend_buffer_free(buffer)
            self.ggml_free(ctx)


class Cpu(Backend):
    """The CPU backend."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        super().__init__(folder, 0)
        self.set_threads(threads)

    def set_threads(self, n: int) -> None:
        """Threads of the next graphs."""
        reg = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(self.backend))
        address = self.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
        C.CFUNCTYPE(None, _P, C.c_int)(address)(self.backend, n)
