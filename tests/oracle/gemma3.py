"""Gemma 3: layers with a sliding window between others, images whose tokens see each other, tokens that are scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import llama, rounding
from .attention import probabilities
from .llama import Array, Image, Layer, Piece


class Windows:
    """A decoder whose layers see no further than `window` positions where `slides` says so, and whose images' tokens
    see each other. `_at`: the layer at work."""

    window: int
    slides: list[bool]
    _at = 0
    _firsts: tuple[int, ...] = ()  # of each image, its first token

    def _batch(self, result: llama.Result, *args: object, **kwargs: object) -> None:
        self._firsts = tuple(im.first for im in result.images)
        super()._batch(result, *args, **kwargs)

    def _attention(self, q: Array, layer: Layer) -> Array:
        """As the base's, but tokens of an image of the batch see each other, and windows slide."""
        n, n_kv = q.shape[1], layer.k.shape[1]
        image = np.where(layer.visual < 0, -1, np.searchsorted(self._firsts, layer.visual, side="right"))
        row, cell = np.arange(n_kv - n, n_kv)[:, None], np.arange(n_kv)[None, :]
        ahead = (cell > row) & ~((image[row] >= 0) & (image[row] == image[cell]))
        far = layer.pos[row] - layer.pos[cell] >= self.window if self.slides[self._at] else np.zeros((1, 1), bool)
        counts = rounding.stored(np.log(layer.weight), self.mask)
        return probabilities(q, layer.k, np.where(ahead | far, -np.inf, counts), self.scale)


class Decoder(Windows, llama.Decoder):
    """The model of a GGUF file of the `gemma3` architecture."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

        def key(name: str) -> float:
            return float(self._reader.get_field(f"gemma3.{name}").contents())

        self.window = int(key("attention.sliding_window"))
        pattern = int(key("attention.sliding_window_pattern"))
        self.slides = [i % pattern < pattern - 1 for i in range(self.n_layer)]
        self._freqs = self.freqs, key("rope.freq_base_swa") ** (-np.arange(0, self.head, 2) / self.head)

    def embed(self, pieces: list[Piece]) -> Array:
        """The rows: of tokens as long as upstream makes them, of images as they are."""
        table = self.w("token_embd.weight") * np.sqrt(self.n_embd)
        return np.concatenate([p.embd.astype(np.float64) if isinstance(p, Image) else table[p] for p in pieces])

    def _heads(self, x: Array, name: str, pos: Array | None) -> Array:
        y = (x @ self.w(name).T).reshape(len(x), -1, self.head).swapaxes(0, 1)
        if pos is None:
            return y
        y = self._norm(y, name.replace(".weight", "_norm.weight"))
        angle = pos[:, None] * self._freqs[self.slides[self._at]]
        if self.noise is not None:
            angle = angle * (1 + self.noise.uniform(-1, 1, angle.shape) * 2**-24)
        c, s = np.cos(angle), np.sin(angle)
        low, high = np.split(y, 2, -1)
        return np.concatenate([low * c - high * s, low * s + high * c], -1)

    def _layer(self, i: int, *args: object) -> tuple[Array, Array, Layer]:
        self._at = i
        return super()._layer(i, *args)

    def _joined(self, i: int, heads: Array) -> Array:
        return self._norm(super()._joined(i, heads), f"blk.{i}.post_attention_norm.weight")

    def _ffn(self, i: int, y: Array) -> Array:
        gate = y @ self.w(f"blk.{i}.ffn_gate.weight").T
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gelu * (y @ self.w(f"blk.{i}.ffn_up.weight").T)) @ self.w(f"blk.{i}.ffn_down.weight").T
        return self._norm(out, f"blk.{i}.post_ffw_norm.weight")


def is_for(path: Path) -> bool:
    """Whether a file is of this architecture."""
    return llama.gguf.GGUFReader(path).get_field("general.architecture").contents() == "gemma3"
