"""LLaVA's vision encoder and projector in NumPy, in double precision, from the published architecture (CLIP's ViT)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

Array = np.ndarray


def _norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def gelu(x: Array) -> Array:
    """GELU by tanh."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x)."""
    return x / (1 + np.exp(-1.702 * x))


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def encode(mmproj: Path, picture: Array) -> Array:
    """Embeddings [patches, width] of a picture, uint8 [size, size, 3] of the encoder's own size: float64, all layers
    that the file holds, weights as the file has them."""
    reader = gguf.GGUFReader(mmproj)
    key = {name.removeprefix("clip.vision."): f.contents() for name, f in reader.fields.items() if name[:5] == "clip."}
    w = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float64)
        for t in reader.tensors
    }

    def linear(name: str, x: Array) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        return _norm(x, w[f"{name}.weight"], w[f"{name}.bias"], key["attention.layer_norm_epsilon"])

    patch, heads = key["patch_size"], key["attention.head_count"]
    pixels = (picture / 255.0 - np.array(key["image_mean"])) / np.array(key["image_std"])
    side = len(picture) // patch
    patches = pixels.reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3).reshape(side * side, -1)
    x = patches @ w["v.patch_embd.weight"].reshape(-1, patches.shape[1]).T
    x = np.concatenate([w["v.class_embd"].reshape(1, -1), x]) + w["v.position_embd.weight"]
    x = norm("v.pre_ln", x)
    activate = gelu if key.get("clip.use_gelu") else quick_gelu
    for i in range(key["block_count"]):
        y = norm(f"v.blk.{i}.ln1", x)
        q, k, v = (
            linear(f"v.blk.{i}.attn_{n}", y).reshape(len(y), heads, -1).transpose(1, 0, 2) for n in ("q", "k", "v")
        )
        seen = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])) @ v
        x = x + linear(f"v.blk.{i}.attn_out", seen.transpose(1, 0, 2).reshape(len(y), -1))
        y = norm(f"v.blk.{i}.ln2", x)
        x = x + linear(f"v.blk.{i}.ffn_down", activate(linear(f"v.blk.{i}.ffn_up", y)))
    return linear("mm.2", gelu(linear("mm.0", x[1:])))
