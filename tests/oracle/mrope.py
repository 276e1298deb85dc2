"""Decoders whose tokens have several positions each: Qwen2-VL's, and Qwen3-VL's with deepstack, dense or of experts.

To the oracle of `llama.py` a position is then the number of a row, counted over all tokens of a conversation; `places`
[row] has what the rotary embedding reads: t, y, x and a fourth number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import llama
from .llama import Array, Image, Layer, Piece

ARCHITECTURES = ("qwen2vl", "qwen3vl", "qwen3vlmoe")


class Decoder(llama.Decoder):
    """The model of a GGUF file of one of `ARCHITECTURES`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        arch = self._reader.get_field("general.architecture").contents()
        if arch not in ARCHITECTURES:
            raise ValueError(f"no architecture of this module: {arch}")
        field = self._reader.get_field(f"{arch}.rope.dimension_sections")
        self.sections = section_of(self.head // 2, [int(n) for n in field.contents()], arch != "qwen2vl")
        deepstack = self._reader.get_field(f"{arch}.n_deepstack_layers")
        self.n_deepstack = 0 if deepstack is None else int(deepstack.contents())
        used = self._reader.get_field(f"{arch}.expert_used_count")
        self.n_used = 0 if used is None else int(used.contents())
        if arch == "qwen2vl":
            self.eps = 0.0  # llama.cpp does not read the file's
        self.places = np.zeros((0, 4))

    def embed(self, pieces: list[Piece]) -> Array:
        """The rows, and behind each what deepstack adds to it: nothing for text."""
        parts = []
        for p in pieces:
            if isinstance(p, Image):
                parts.append(p.embd.astype(np.float64))
            else:
                rows = self.w("token_embd.weight")[p]
                parts.append(np.pad(rows, ((0, 0), (0, self.n_deepstack * self.n_embd))))
        return np.concatenate(parts)

    def _norm(self, x: Array, name: str) -> Array:
        width = len(self.w(name))
        return super()._norm(x[..., :width], name)

    def _heads(self, x: Array, name: str, pos: Array | None) -> Array:
        y = x @ self.w(name).T
        if (bias := name.replace("weight", "bias")) in self._tensors:
            y = y + self.w(bias)
        y = y.reshape(len(x), -1, self.head).swapaxes(0, 1)
        if pos is None:
            return y
        if (norm := name.replace(".weight", "_norm.weight")) in self._tensors:
            y = self._norm(y, norm)
        angle = np.asarray(self.places)[pos][:, self.sections] * self.freqs
        if self.noise is not None:
            angle = angle * (1 + self.noise.uniform(-1, 1, angle.shape) * 2**-24)
        c, s = np.cos(angle), np.sin(angle)
        low, high = np.split(y, 2, -1)
        return np.concatenate([low * c - high * s, low * s + high * c], -1)

    def _layer(
        self, i: int, x: Array, pos: Array, past: Layer, visual: Array, weight: Array, kv: str
    ) -> tuple[Array, Array, Layer]:
        x, more = x[:, : self.n_embd], x[:, self.n_embd :]
        x, q, now = super()._layer(i, x, pos, past, visual, weight, kv)
        if i < self.n_deepstack and more.size:
            x = x + more[:, i * self.n_embd : (i + 1) * self.n_embd]
        return np.concatenate([x, more], 1), q, now

    def _ffn(self, i: int, y: Array) -> Array:
        if not self.n_used:
            return super()._ffn(i, y)
        out = np.zeros_like(y)
        logits = y @ self.w(f"blk.{i}.ffn_gate_inp.weight").T
        share = np.exp(logits - logits.max(1, keepdims=True))
        for row, p in enumerate(share):
            best = np.argsort(-p, kind="stable")[: self.n_used]
            for e in best:
                gate = self.w(f"blk.{i}.ffn_gate_exps.weight")[e] @ y[row]
                up = self.w(f"blk.{i}.ffn_up_exps.weight")[e] @ y[row]
                down = self.w(f"blk.{i}.ffn_down_exps.weight")[e] @ (gate / (1 + np.exp(-gate)) * up)
                out[row] += p[e] / p[best].sum() * down
        return out


def section_of(n: int, sizes: list[int], interleaved: bool) -> Array:
    """Which of the four numbers of a place turns each of n pairs: in runs of `sizes`, or by turns."""
    if not interleaved:
        return np.repeat(np.arange(len(sizes)), sizes)[np.arange(n) % sum(sizes)]
    return np.array([k % 3 if k < 3 * sizes[k % 3] else 3 for k in range(n)])


def is_for(path: Path) -> bool:
    """Whether a file is of one of these architectures."""
    field = llama.gguf.GGUFReader(path).get_field("general.architecture")
    return field.contents() in ARCHITECTURES
