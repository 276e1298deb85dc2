"""GGUF files with seeded random weights: real shapes for timing, tiny ones for tests.

Quantized weights are drawn as random blocks with sane scales, tensor by tensor, and streamed to disk.
Such a model says nothing sensible, but costs what a trained one of its shape costs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from .shapes import Shape, Tower

try:
    import gguf
except ImportError as e:
    raise ModelError("random weights are written by the package gguf: pip install gguf") from e

Kind = gguf.GGMLQuantizationType
FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
Rng = np.random.Generator
Data = npt.NDArray[Any]
Progress = Callable[[float], None]


class Tensor(NamedTuple):
    """Dimensions (rows first), and the normal distribution that the elements are drawn from."""

    name: str
    dims: tuple[int, ...]
    std: float
    mean: float = 0.0


def _bytes(rng: Rng, rows: int, n: int) -> Data:
    return np.frombuffer(rng.bytes(rows * n), np.uint8).reshape(rows, n)


def _scales(rng: Rng, rows: int, scale: float) -> Data:
    """Block scales around `scale` as F16 bytes [rows, 2]; of either sign, so that lopsided codes average out."""
    drawn = scale * rng.uniform(0.8, 1.2, rows) * rng.choice((-1.0, 1.0), rows)
    scales: Data = drawn.astype(np.float16).view(np.uint8).reshape(rows, 2)
    return scales


def _q8_0(rng: Rng, n: int, std: float) -> Data:
    return np.concatenate([_scales(rng, n // 32, std / 73.9), _bytes(rng, n // 32, 32)], 1)


def _q4_0(rng: Rng, n: int, std: float) -> Data:
    return np.concatenate([_scales(rng, n // 32, std / 4.61), _bytes(rng, n // 32, 16)], 1)


def _q4_k(rng: Rng, n: int, std: float) -> Data:
    d = _scales(rng, n // 256, std / 257.0)
    dmin: Data = (d.view(np.float16) * np.float16(7.5)).view(np.uint8)  # the mean of the 4-bit codes: no bias
    return np.concatenate([d, dmin, _bytes(rng, n // 256, 12 + 128)], 1)


def _plain(dtype: type) -> Callable[[Rng, int, float], Data]:
    return lambda rng, n, std: (std * rng.standard_normal(n, np.float32)).astype(dtype)


BLOCKS: dict[Any, Callable[[Rng, int, float], Data]] = {
    Kind.F32: _plain(np.float32),
    Kind.F16: _plain(np.float16),
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_K: _q4_k,
}


def text_tensors(shape: Shape) -> Iterator[Tensor]:
    """Every tensor of a decoder: llama's, the biases of qwen2 and qwen2vl, the norms of qwen3vl and gemma3."""
    s, in_std, kv, q = shape, shape.n_embd**-0.5, shape.head * shape.n_head_kv, shape.head * shape.n_head
    calm = (2 * s.n_layer) ** -0.5  # the residual stream stays of one size
    yield Tensor("token_embd.weight", (s.n_vocab, s.n_embd), 1.0)
    yield Tensor("output_norm.weight", (s.n_embd,), 0.1, 1.0)
    if not s.tied:
        yield Tensor("output.weight", (s.n_vocab, s.n_embd), 2 * in_std)
    for i in range(s.n_layer):
        yield Tensor(f"blk.{i}.attn_norm.weight", (s.n_embd,), 0.1, 1.0)
        yield Tensor(f"blk.{i}.attn_q.weight", (q, s.n_embd), s.qk_gain * in_std)
        yield Tensor(f"blk.{i}.attn_k.weight", (kv, s.n_embd), s.qk_gain * in_std)
        yield Tensor(f"blk.{i}.attn_v.weight", (kv, s.n_embd), in_std)
        for name, n in (("q", q), ("k", kv), ("v", kv)) if s.arch in ("qwen2", "qwen2vl") else ():
            yield Tensor(f"blk.{i}.attn_{name}.bias", (n,), 0.1)
        for name in ("q", "k") if s.arch in ("qwen3vl", "gemma3") else ():
            yield Tensor(f"blk.{i}.attn_{name}_norm.weight", (s.head,), 0.1, s.qk_gain)
        for name in ("post_attention", "post_ffw") if s.arch == "gemma3" else ():
            yield Tensor(f"blk.{i}.{name}_norm.weight", (s.n_embd,), 0.1, 2 * calm)
        yield Tensor(f"blk.{i}.attn_output.weight", (s.n_embd, q), 2 * calm * q**-0.5)
        yield Tensor(f"blk.{i}.ffn_norm.weight", (s.n_embd,), 0.1, 1.0)
        yield Tensor(f"blk.{i}.ffn_gate.weight", (s.n_ff, s.n_embd), in_std)
        yield Tensor(f"blk.{i}.ffn_up.weight", (s.n_ff, s.n_embd), in_std)
        yield Tensor(f"blk.{i}.ffn_down.weight", (s.n_embd, s.n_ff), 2 * calm * s.n_ff**-0.5)


def vision_tensors(tower: Tower, width: int, class_token: bool = True) -> Iterator[Tensor]:
    """Every tensor of a vision encoder, and of its projector to a decoder that is `width` wide."""
    t, in_std, calm = tower, tower.n_embd**-0.5, (2 * tower.n_layer) ** -0.5
    if class_token:
        yield Tensor("v.class_embd", (t.n_embd,), 0.1)
    yield Tensor("v.patch_embd.weight", (t.n_embd, 3, t.patch_size, t.patch_size), (3 * t.patch_size**2) ** -0.5)
    yield Tensor("v.position_embd.weight", (t.n_visual + class_token, t.n_embd), 0.1)
    yield from _affine("v.pre_ln", (t.n_embd,), 0.1, 1.0)
    for i in range(t.n_layer):
        for name in ("ln1", "ln2"):
            yield from _affine(f"v.blk.{i}.{name}", (t.n_embd,), 0.1, 1.0)
        for name in ("attn_q", "attn_k", "attn_v"):
            yield from _affine(f"v.blk.{i}.{name}", (t.n_embd, t.n_embd), in_std)
        yield from _affine(f"v.blk.{i}.attn_out", (t.n_embd, t.n_embd), calm * in_std)
        yield from _affine(f"v.blk.{i}.ffn_up", (t.n_ff, t.n_embd), in_std)
        yield from _affine(f"v.blk.{i}.ffn_down", (t.n_embd, t.n_ff), calm * t.n_ff**-0.5)
    yield from _affine("mm.0", (width, t.n_embd), in_std)
    yield from _affine("mm.2", (width, width), width**-0.5)


def _affine(name: str, dims: tuple[int, ...], std: float, mean: float = 0.0) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", dims, std, mean)
    yield Tensor(f"{name}.bias", dims[:1], 0.1)


def vocabulary(n: int) -> tuple[list[str], list[float], list[int]]:
    """The smallest SentencePiece-like vocabulary that llama.cpp accepts: specials, bytes, then words."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    if n < len(tokens) + 1:
        raise ValueError(f"a vocabulary needs at least {len(tokens) + 1} entries, not {n}")
    types = [int(kinds.UNKNOWN), int(kinds.CONTROL), int(kinds.CONTROL), *[int(kinds.BYTE)] * 256]
    tokens += [f"\u2581t{i}" for i in range(n - len(tokens))]
    types += [int(kinds.NORMAL)] * (n - len(types))
    return tokens, [-float(i) for i in range(n)], types


def write_text(
    path: Path,
    shape: Shape,
    file_type: str = "Q4_0",
    seed: int = 1,
    metadata: Mapping[str, str | int | float] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a text model. `metadata` adds keys (int as u32, float as f32); `progress` gets the share done.

    Raises ValueError where the shape's rows do not divide into blocks of that type.
    """
    w = gguf.GGUFWriter(path, shape.arch)
    w.add_name("random weights")
    w.add_file_type(FILE_TYPES[file_type])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(shape.n_ctx)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layer)
    w.add_feed_forward_length(shape.n_ff)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv(shape.n_head_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(shape.head)
    w.add_key_length(shape.head)
    w.add_value_length(shape.head)
    if shape.sections:
        w.add_rope_dimension_sections(shape.sections)
    if shape.n_deepstack:
        w.add_num_deepstack_layers(shape.n_deepstack)
    if shape.window:
        w.add_sliding_window(shape.window)
    w.add_rope_freq_base(shape.rope_base)
    w.add_vocab_size(shape.n_vocab)
    tokens, scores, types = vocabulary(shape.n_vocab)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            w.add_key_value(key, value, gguf.GGUFValueType.STRING)  # add_string leaves empty ones out
        elif isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            (w.add_uint32 if value >= 0 else w.add_int32)(key, value)
        else:
            w.add_float32(key, value)
    matrices = gguf.GGMLQuantizationType[file_type]
    _write(w, ((t, Kind.F32 if len(t.dims) < 2 else matrices) for t in text_tensors(shape)), seed, progress)


def write_vision(
    path: Path,
    tower: Tower,
    width: int,
    seed: int = 1,
    progress: Progress | None = None,
    *,
    file_type: str = "F16",
    gelu: bool = False,
    class_token: bool = True,
) -> None:
    """Writes an mmproj of LLaVA's kind, for a decoder that is `width` wide.

    `file_type` is that of the matrices of its layers, `gelu` their activation in place of quick-GELU, and without
    `class_token` there is none. Raises ValueError as `write_text` does.
    """
    w = gguf.GGUFWriter(path, "clip")
    w.add_name("random weights")
    w.add_file_type(FILE_TYPES[file_type])
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("mlp")
    w.add_vision_use_gelu(gelu)  # neither GELU nor SiLU: quick-GELU
    w.add_vision_image_size(tower.image_size)
    w.add_vision_patch_size(tower.patch_size)
    w.add_vision_embedding_length(tower.n_embd)
    w.add_vision_feed_forward_length(tower.n_ff)
    w.add_vision_block_count(tower.n_layer)
    w.add_vision_projection_dim(width)
    w.add_vision_head_count(tower.n_head)
    w.add_vision_attention_layernorm_eps(1e-5)
    w.add_vision_image_mean([0.5] * 3)
    w.add_vision_image_std([0.25] * 3)
    # Without it stock's graph leaves out one block more than ours: vendor/README.md.
    w.add_array("clip.vision.feature_layer", [tower.n_layer])
    matrices = gguf.GGMLQuantizationType[file_type]

    def kind(tensor: Tensor) -> Any:
        if len(tensor.dims) < 2:
            return Kind.F32
        return matrices if tensor.name.startswith(("v.blk.", "mm.")) else Kind.F16

    _write(w, ((t, kind(t)) for t in vision_tensors(tower, width, class_token)), seed, progress)


def _write(w: Any, tensors: Iterable[tuple[Tensor, Any]], seed: int, progress: Progress | None) -> None:
    plan = []
    for tensor, kind in tensors:
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        if tensor.dims[-1] % block:
            raise ValueError(f"{tensor.name}: rows of {tensor.dims[-1]} do not divide into blocks of {block}")
        size = int(np.prod(tensor.dims)) // block * n_bytes
        w.add_tensor_info(tensor.name, tensor.dims, np.dtype(np.float32), size, raw_dtype=kind)
        plan.append((tensor, kind, size))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    total, done = sum(size for *_, size in plan), 0
    for tensor, kind, size in plan:
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        data = BLOCKS[kind](rng, int(np.prod(tensor.dims)), tensor.std)
        if tensor.mean:
            data = tensor.mean + data
        w.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
        done += size
        if progress:
            progress(done / total)
    w.close()
