"""Time the span-attention op on a GPU beside the time that reading K once takes at the device's own copy bandwidth.

python scripts/bench_attn_span.py [--cpu] [--json OUT]

Each graph holds as many ops, each on keys of its own, as it takes to leave the caches behind; it runs several times and
the fastest counts. So a time includes the launch, as a decode step does, and nothing is found in a cache that a decode
step would not find there. The bandwidth is that of a large copy in the same library, bytes read and written.
The libraries are $ST3_LIB_DIR's, else the package's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests" / "native", ROOT / "scripts"):
    sys.path.insert(0, str(folder))

import measuring  # noqa: E402
import native_runtime  # noqa: E402
import numpy as np  # noqa: E402
from ggml_graph import Backend, InitParams  # noqa: E402
from gguf import GGML_QUANT_SIZES  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402

from st3_edge.native.machine import provenance  # noqa: E402

CPU, GPU = 0, 1
COLD = 512 << 20  # bytes of keys in a graph, beyond any cache
COPIES = 8  # in a graph: the launch must not be what is timed
MAX = 1  # GGML_ATTN_SPAN_MAX
MAX_OPS = 1024
RUNS = 20
D = 128
# what a 7B LLaVA's decoder asks: (name, rows, heads, KV heads, cells, cells asked for)
SHAPES = (
    ("decode step, 32 heads", 1, 32, 32, 640, 576),
    ("decode step, 32 on 8 heads", 1, 32, 8, 640, 576),
    ("decode step, long context", 1, 32, 32, 4096, 576),
    ("decode step, longest context", 1, 32, 32, 32768, 576),
    ("prefill, 64 rows of text", 64, 32, 32, 640, 576),
    ("prefill, 64 rows on 8 heads", 64, 32, 8, 640, 576),
)
KINDS = ("F16", "BF16", "Q8_0", "Q4_0")


def seconds(b: Backend, ctx: int, graph: int, fill: list[tuple[int, np.ndarray]]) -> float:
    """The fastest of RUNS runs of a graph, once its tensors have memory and these hold data."""
    buffer = b.ggml_backend_alloc_ctx_tensors(ctx, b.backend)
    if not buffer:
        raise SystemExit("the device's memory is too small")
    try:
        for tensor, data in fill:
            b.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        best = float("inf")
        for _ in range(RUNS):
            start = time.perf_counter()
            if b.ggml_backend_graph_compute(b.backend, graph):
                raise SystemExit("the graph failed")
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        b.ggml_backend_buffer_free(buffer)


def context(b: Backend, n_tensors: int) -> tuple[int, int]:
    """Room for tensors without data, and an empty graph."""
    room = n_tensors * b.ggml_tensor_overhead() + b.ggml_graph_overhead_custom(2 * n_tensors, False)
    ctx = b.ggml_init(InitParams(room, None, True))
    return ctx, b.ggml_new_graph_custom(ctx, 2 * n_tensors, False)


def copy_bandwidth(b: Backend) -> float:
    """Bytes a second, read and written, of a copy of COLD bytes."""
    ctx, graph = context(b, 4 * COPIES)
    source, *targets = (b.ggml_new_tensor_1d(ctx, Kind.F32, COLD // 4) for _ in range(1 + COPIES))
    for target in targets:
        b.ggml_build_forward_expand(graph, b.ggml_cpy(ctx, source, target))
    took = seconds(b, ctx, graph, [])
    b.ggml_free(ctx)
    return 2 * COLD * COPIES / took


def measure(b: Backend, kind: Kind, rows: int, heads: int, heads_kv: int, cells: int, span: int) -> tuple[float, int]:
    """Seconds of one op, and the bytes of its keys."""
    block, size = GGML_QUANT_SIZES[kind]
    n_bytes = cells * heads_kv * D // block * size
    n_ops = min(MAX_OPS, -(-COLD // n_bytes))
    rng = np.random.default_rng(1)
    ctx, graph = context(b, 4 * n_ops + 8)
    q = b.ggml_new_tensor_3d(ctx, Kind.F32, D, rows, heads)
    mask = b.ggml_new_tensor_2d(ctx, Kind.F16, cells, rows)
    ids = b.ggml_new_tensor_1d(ctx, Kind.I32, span)
    fill = [
        (q, rng.standard_normal((heads, rows, D), np.float32)),
        (mask, np.zeros((rows, cells), np.float16)),
        (ids, np.sort(rng.choice(cells, span, replace=False)).astype(np.int32)),
    ]
    keys = rng.integers(0, 0x40, n_bytes, np.uint8)  # numbers below two, whatever the type
    for _ in range(n_ops):
        k = b.ggml_new_tensor_3d(ctx, kind, D, heads_kv, cells)
        fill.append((k, keys))
        out = b.ggml_attn_span(ctx, q, b.ggml_permute(ctx, k, 0, 2, 1, 3), mask, ids, D**-0.5, MAX)
        b.ggml_build_forward_expand(graph, out)
    took = seconds(b, ctx, graph, fill) / n_ops
    b.ggml_free(ctx)
    return took, n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU instead: to try this script out")
    parser.add_argument("--json", type=measuring.result_file, help="write the figures here as well")
    args = parser.parse_args()
    folder = native_runtime.built()
    try:
        b = Backend(folder, CPU if args.cpu else GPU)
    except LookupError:
        raise SystemExit(f"no GPU for the libraries in {folder}") from None
    bandwidth = copy_bandwidth(b)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(f"{'shape':<30}{'K':>6}{'microseconds':>14}{'floor':>8}{'share':>7}")
    results = []
    for name, *shape in SHAPES:
        for kind in KINDS:
            took, n_bytes = measure(b, Kind[kind], *shape)
            floor = n_bytes / bandwidth
            print(f"{name:<30}{kind:>6}{took * 1e6:>14.1f}{floor * 1e6:>8.1f}{floor / took:>7.0%}", flush=True)
            results.append({"shape": name, "k": kind, "seconds": took, "floor": floor, "k_bytes": n_bytes})
    if args.json:
        measuring.write_json(args.json, {"copy_bytes_per_second": bandwidth, "results": results, **provenance()})


if __name__ == "__main__":
    measuring.run(main)
