"""Write a `llama` GGUF with seeded random weights: real shapes for timing, tiny ones for tests.

python scripts/random_model.py llava-1.5-7b OUT.gguf [--type Q4_0] [--seed 1]

Quantized weights are drawn as random blocks with sane scales, tensor by tensor, and streamed to disk.
Such a model says nothing sensible, but costs what a trained one of its shape costs.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `n_visual` is what its vision tower gives for one picture."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 4096
    rope_base: float = 10000.0
    n_visual: int = 576
    tied: bool = False
    qk_gain: float = 1.2  # standard deviation of the elements of q and k: how peaked attention is

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.n_embd // self.n_head


SHAPES = {
    "llava-1.5-7b": Shape(32, 4096, 32, 32, 11008),
    "llava-1.5-13b": Shape(40, 5120, 40, 40, 13824),
    "llava-1.6-7b": Shape(32, 4096, 32, 32, 11008, n_visual=2880),
    "mistral-7b": Shape(32, 4096, 32, 8, 14336, n_ctx=32768, rope_base=1e6, n_visual=2880),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, n_ctx=2048),
}
FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
Rng = np.random.Generator


def _bytes(rng: Rng, rows: int, n: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(rows * n), np.uint8).reshape(rows, n)


def _scales(rng: Rng, rows: int, scale: float) -> np.ndarray:
    """Block scales around `scale` as F16 bytes [rows, 2]; of either sign, so that lopsided codes average out."""
    drawn = scale * rng.uniform(0.8, 1.2, rows) * rng.choice((-1.0, 1.0), rows)
    return drawn.astype(np.float16).view(np.uint8).reshape(rows, 2)


def _q8_0(rng: Rng, n: int, std: float) -> np.ndarray:
    return np.concatenate([_scales(rng, n // 32, std / 73.9), _bytes(rng, n // 32, 32)], 1)


def _q4_0(rng: Rng, n: int, std: float) -> np.ndarray:
    return np.concatenate([_scales(rng, n // 32, std / 4.61), _bytes(rng, n // 32, 16)], 1)


def _q4_k(rng: Rng, n: int, std: float) -> np.ndarray:
    d = _scales(rng, n // 256, std / 257.0)
    dmin = (d.view(np.float16) * np.float16(7.5)).view(np.uint8)  # the mean of the 4-bit codes: no bias
    return np.concatenate([d, dmin, _bytes(rng, n // 256, 12 + 128)], 1)


def _plain(dtype: type) -> Callable[[Rng, int, float], np.ndarray]:
    return lambda rng, n, std: (std * rng.standard_normal(n, np.float32)).astype(dtype)


BLOCKS: dict[Kind, Callable[[Rng, int, float], np.ndarray]] = {
    Kind.F32: _plain(np.float32),
    Kind.F16: _plain(np.float16),
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_K: _q4_k,
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape (rows first) and standard deviation of every tensor; vectors are 1 + 0.1 noise instead."""
    s, in_std, kv = shape, shape.n_embd**-0.5, shape.head * shape.n_head_kv
    calm = (2 * s.n_layer) ** -0.5  # the residual stream stays of one size
    yield "token_embd.weight", (s.n_vocab, s.n_embd), 1.0
    yield "output_norm.weight", (s.n_embd,), 0.1
    if not s.tied:
        yield "output.weight", (s.n_vocab, s.n_embd), 2 * in_std
    for i in range(s.n_layer):
        yield f"blk.{i}.attn_norm.weight", (s.n_embd,), 0.1
        yield f"blk.{i}.attn_q.weight", (s.n_embd, s.n_embd), s.qk_gain * in_std
        yield f"blk.{i}.attn_k.weight", (kv, s.n_embd), s.qk_gain * in_std
        yield f"blk.{i}.attn_v.weight", (kv, s.n_embd), in_std
        yield f"blk.{i}.attn_output.weight", (s.n_embd, s.n_embd), 2 * calm * in_std
        yield f"blk.{i}.ffn_norm.weight", (s.n_embd,), 0.1
        yield f"blk.{i}.ffn_gate.weight", (s.n_ff, s.n_embd), in_std
        yield f"blk.{i}.ffn_up.weight", (s.n_ff, s.n_embd), in_std
        yield f"blk.{i}.ffn_down.weight", (s.n_embd, s.n_ff), 2 * calm * s.n_ff**-0.5


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


def kind_of(name: str, dims: tuple[int, ...], file_type: str) -> Kind:
    """The type that a tensor gets in a file of that type. Vectors are F32."""
    kind = Kind.F32 if len(dims) < 2 else Kind[file_type]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if dims[-1] % block:
        raise ValueError(f"{name}: rows of {dims[-1]} do not divide into {file_type} blocks of {block}")
    return kind


def write(
    path: Path,
    shape: Shape,
    file_type: str = "Q4_0",
    seed: int = 1,
    metadata: dict[str, str | int | float] | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write the file. `metadata` adds keys (int as u32, float as f32); `progress` is told the share done."""
    w = gguf.GGUFWriter(path, "llama")
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
        elif isinstance(value, int):
            (w.add_uint32 if value >= 0 else w.add_int32)(key, value)
        else:
            w.add_float32(key, value)
    plan = [(name, dims, std, kind_of(name, dims, file_type)) for name, dims, std in tensors(shape)]
    sizes = []
    for name, dims, _, kind in plan:
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        sizes.append(int(np.prod(dims)) // block * n_bytes)
        w.add_tensor_info(name, dims, np.dtype(np.float32), sizes[-1], raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    done = 0
    for (name, dims, std, kind), size in zip(plan, sizes, strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        data = BLOCKS[kind](rng, int(np.prod(dims)), std)
        if len(dims) < 2:
            data = 1 + data
        w.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
        done += size
        if progress:
            progress(done / sum(sizes))
    w.close()


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_0", choices=sorted(FILE_TYPES))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    print(f"{args.shape} {args.type} seed {args.seed}", flush=True)
    write(
        args.out,
        SHAPES[args.shape],
        args.type,
        args.seed,
        progress=lambda x: print(f"\r{x:4.0%}", end="", flush=True),
    )
    print(f"\r{args.out}: {args.out.stat().st_size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
