"""What storing a number in a KV cache does to it, in double precision."""

from __future__ import annotations

import gguf
import numpy as np

Array = np.ndarray


def stored(x: Array, kind: str) -> Array:
    """x after being written to and read from a cache of that type (`F32`, `F16`, `Q8_0`, ...)."""
    if kind == "F32":
        return x.astype(np.float32).astype(np.float64)
    if kind == "F16":
        return x.astype(np.float32).astype(np.float16).astype(np.float64)
    t = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(np.ascontiguousarray(x, np.float32), t)
    return gguf.quants.dequantize(packed, t).reshape(x.shape).astype(np.float64)


def multiplied(x: Array, kind: str) -> Array:
    """x as a CPU rounds what it multiplies rows of that type by: to bytes, where these have fewer bits."""
    return stored(x, "Q8_0" if kind.startswith(("Q4", "Q5")) else kind)


def hadamard(n: int) -> Array:
    """The normalized Walsh-Hadamard matrix of a power of two; it is its own inverse."""
    out = np.ones((1, 1))
    while len(out) < n:
        out = np.block([[out, out], [out, -out]])
    return out / np.sqrt(n)


def rotation_size(head: int, largest: bool) -> int:
    """Block size of the rotation before a quantized cache (0: none). K takes the largest, V takes 64."""
    if head % 64:
        return 0
    size = 64
    while largest and head % (2 * size) == 0:
        size *= 2
    return size


def rotate(x: Array, size: int) -> Array:
    """Rotate the last axis in blocks of that size; 0 leaves it alone."""
    if not size:
        return x
    return (x.reshape(*x.shape[:-1], -1, size) @ hadamard(size)).reshape(x.shape)


def sum_in_f16(p: Array, v: Array, order: Array) -> Array:
    """p [h, q, n] @ v [h, n, d] as the CPU sums F16 values for few queries: cell by cell, in F16."""
    out = np.zeros((*p.shape[:2], v.shape[2]), np.float16)
    for cell in order:
        out = (out + p[:, :, cell, None] * v[:, None, cell]).astype(np.float16)
    return out.astype(np.float64)
