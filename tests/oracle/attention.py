"""The span-attention op: attention probabilities at chosen cells, reduced over heads and query rows."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def probabilities(q: Array, k: Array, mask: Array | None, scale: float) -> Array:
    """Softmax attention [n_head, n_q, n_kv] of q [n_head, n_q, d] and k [n_head_kv, n_kv, d].

    Consecutive query heads share a key head. `mask` [n_q, n_kv] is added; a row that sees nothing is zeros.
    """
    group = q.shape[0] // k.shape[0]
    s = q.astype(np.float64) @ np.repeat(k.astype(np.float64), group, 0).swapaxes(1, 2) * scale
    if mask is not None:
        s = s + mask.astype(np.float64)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0.0))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total > 0, total, 1.0)


def attn_span(q: Array, k: Array, mask: Array | None, ids: Array, scale: float, reduce: str) -> Array:
    """What `ggml_attn_span` returns: [n_span] means or maxima over heads and query rows."""
    p = probabilities(q, k, mask, scale)[:, :, ids]
    return p.mean((0, 1)) if reduce == "mean" else p.max((0, 1))
