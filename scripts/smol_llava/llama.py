"""SmolLM2-135M-Instruct in plain torch, dequantized from its file.

Parameter names are Hugging Face's. The decoder is frozen; a LoRA adds trainable updates beside its matrices.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from embedded import gguf_writer, modeling
from smol import reader
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, FFN, THETA = 576, 30, 9, 3, 64, 1536, 100000.0


def weights(file: Path) -> dict[str, Tensor]:
    """Dequantized weights, float32, by their Hugging Face names without `language_model.`."""
    out = {}
    for t in reader(file).tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", t.name):
            w = gguf_writer.unpermute(w, HEADS if match[1] == "q" else KV_HEADS)
        out[gguf_writer.hf_name(t.name).removeprefix("language_model.")] = torch.from_numpy(np.array(w, np.float32))
    return out


class Linear(nn.Linear):
    """A frozen matrix, without bias, and where `rank` > 0 a trainable update B·A beside it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns, bias=False)
        self.weight.requires_grad_(False)
        self.rank = 0

    def widen(self, rank: int) -> None:
        """Add the update; it starts at zero."""
        self.rank = rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.rank:
            y = y + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return y


class Attention(nn.Module):
    """Grouped-query attention; the first rows are causal among themselves, the rest see what their mask allows."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = Linear(WIDTH, KV_HEADS * HEAD), Linear(WIDTH, KV_HEADS * HEAD)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        b, t, w = x.shape
        n = first.shape[-1]
        q, k, v = (f(x).view(b, t, -1, HEAD).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = modeling.rotate(q, cos, sin), modeling.rotate(k, cos, sin)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        ends = (0, n // 2, n)  # two causal halves: the upper one's keys are only half
        rows = [
            modeling.attend(q[:, :, a:e], k[:, :, :e], v[:, :, :e], first[..., a:e, :e])
            for a, e in itertools.pairwise(ends)
            if a < e
        ]
        rows += [modeling.attend(q[:, :, n:], k, v, rest)] if n < t else []
        return self.o_proj(torch.cat(rows, 2).transpose(1, 2).reshape(b, t, w))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(WIDTH, FFN), Linear(WIDTH, FFN), Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A LLaMA block."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = modeling.RMSNorm(WIDTH), modeling.RMSNorm(WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, first, rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model; output matrix and embedding are one."""

    def __init__(self, state: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        m = self.model = nn.Module()
        m.embed_tokens = nn.Embedding(49152, WIDTH)
        m.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        m.norm = modeling.RMSNorm(WIDTH)
        if state is not None:
            self.load_state_dict(state)
        self.requires_grad_(False)

    def widen(self, rank: int) -> None:
        """Put a LoRA of that rank beside every matrix of the layers."""
        for m in self.modules():
            if isinstance(m, Linear):
                m.widen(rank)

    def hidden(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        """Embeddings [B, N + T, 576] to normed outputs of the T rows behind the first N.

        cos, sin [B or 1, 1, N + T, 32]; first [N, N] (or broadcast to it) and rest [B or 1, 1, T, N + T] are
        additive masks.
        """
        for layer in self.model.layers:
            x = layer(x, cos, sin, first, rest)
        return self.model.norm(x[:, first.shape[-1] :])

    def logits(self, h: Tensor) -> Tensor:
        """Float32 logits of normed rows."""
        return F.linear(h, self.model.embed_tokens.weight.to(h.dtype)).float()
