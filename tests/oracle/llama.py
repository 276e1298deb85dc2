"""A LLaMA decoder in double precision, read from a GGUF, with pruned prefill and decode.

A prompt is a list of pieces: token ids (text) or an `Image` of embeddings. One residual row is one prompt
position; a cut drops rows, and what is left keeps its order and its rotary position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

from . import rounding
from .attention import probabilities
from .schedule import Schedule, best

Array = np.ndarray
TEXT_ROWS = 512  # at most so many rows of text score
TILE_ROWS = 64  # a CPU prefill of fewer rows than this rounds its queries to the cache's type


@dataclass(frozen=True)
class Image:
    """Embeddings [n, width] of one image, and its patch grid."""

    embd: Array
    nx: int
    ny: int


Piece = list[int] | Image


@dataclass
class Layer:
    """What a layer remembers: rotated keys, values [n_head_kv, n, head], as the cache's type holds them."""

    k: Array
    v: Array


@dataclass
class Cut:
    """A cut as the oracle sees it: what was there, how it ranked, and what it would keep.

    `left` are visual indices (over all images in order) before the cut, `score` and `rank` belong to them,
    `image` says whose they are, `kept` is the oracle's choice.
    """

    left: Array
    image: Array
    score: Array
    rank: Array
    kept: Array

    def margin(self, other: Array) -> float:
        """How clear a difference to another choice is: 0 where equal, else the largest relative gap in score.

        Counts per image that differ, or tokens that were not there, give infinity.
        """
        mine, theirs = np.isin(self.left, self.kept), np.isin(self.left, other)
        if len(np.unique(other)) != len(other) or theirs.sum() != len(other):
            return np.inf
        worst = 0.0
        for i in np.unique(self.image):
            lost = self.rank[(self.image == i) & mine & ~theirs]
            won = self.rank[(self.image == i) & theirs & ~mine]
            if len(lost) != len(won):
                return np.inf
            if len(lost):
                size = np.abs(self.score[self.image == i]).max()
                base = max(min(abs(lost.max()), size), np.finfo(float).tiny)
                worst = max(worst, float((lost.max() - won.min()) / base))
        return worst


@dataclass
class Result:
    """Logits of the last position, the cuts, and the caches for `Decoder.step`."""

    logits: Array
    cuts: list[Cut] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    n_pos: int = 0


class Decoder:
    """The model of a GGUF file of the `llama` architecture."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def key(name: str, default: float | None = None) -> float:
            f = reader.get_field(f"llama.{name}")
            if f is None and default is None:
                raise KeyError(name)
            return default if f is None else f.contents()

        self.n_layer = int(key("block_count"))
        self.n_embd = int(key("embedding_length"))
        self.n_head = int(key("attention.head_count"))
        self.n_head_kv = int(key("attention.head_count_kv", self.n_head))
        self.head = self.n_embd // self.n_head
        self.eps = float(key("attention.layer_norm_rms_epsilon"))
        base = float(key("rope.freq_base", 10000.0))
        n_rot = int(key("rope.dimension_count", self.head))
        if n_rot != self.head:
            raise ValueError("only whole heads are rotated here")
        self.freqs = base ** (-np.arange(0, self.head, 2) / self.head)
        self._tensors = {t.name: t for t in reader.tensors}
        self._reader = reader
        if "rope_freqs.weight" in self._tensors:
            self.freqs = self.freqs / self.w("rope_freqs.weight")

    @lru_cache(maxsize=512)  # noqa: B019  (a decoder lives as long as the tests that use it)
    def w(self, name: str) -> Array:
        """A tensor as float64, rows first."""
        t = self._tensors[name]
        flat = gguf.quants.dequantize(t.data, t.tensor_type)
        return flat.reshape([int(n) for n in reversed(t.shape)]).astype(np.float64)

    def embed(self, pieces: list[Piece]) -> Array:
        """The residual stream's first rows."""
        table = self.w("token_embd.weight")
        return np.concatenate([p.embd.astype(np.float64) if isinstance(p, Image) else table[p] for p in pieces])

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w(name)

    def _heads(self, x: Array, name: str, pos: Array | None) -> Array:
        y = (x @ self.w(name).T).reshape(len(x), -1, self.head).swapaxes(0, 1)
        if pos is None:
            return y
        angle = pos[:, None] * self.freqs
        c, s = np.cos(angle), np.sin(angle)
        even, odd = y[..., 0::2], y[..., 1::2]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(y.shape)

    def _layer(self, i: int, x: Array, pos: Array, past: Layer | None, kv: str) -> tuple[Array, Array, Layer, Array]:
        """Run a layer; returns its output, its (unrounded) queries, its cache and the mask."""
        quantized = kv not in ("F32", "F16")
        turn_k = rounding.rotation_size(self.head, True) if quantized else 0
        turn_v = rounding.rotation_size(self.head, False) if quantized else 0
        y = self._norm(x, f"blk.{i}.attn_norm.weight")
        q = rounding.rotate(self._heads(y, f"blk.{i}.attn_q.weight", pos), turn_k)
        k = rounding.stored(rounding.rotate(self._heads(y, f"blk.{i}.attn_k.weight", pos), turn_k), kv)
        v = rounding.stored(rounding.rotate(self._heads(y, f"blk.{i}.attn_v.weight", None), turn_v), kv)
        if past:
            k, v = np.concatenate([past.k, k], 1), np.concatenate([past.v, v], 1)
        n, n_kv = len(x), k.shape[1]
        mask = np.where(np.arange(n_kv)[None, :] > np.arange(n_kv - n, n_kv)[:, None], -np.inf, 0.0)
        asked = rounding.stored(q, kv) if quantized or n < TILE_ROWS else q
        p = probabilities(asked, k, mask, self.head**-0.5)
        out = rounding.rotate(p @ np.repeat(v, self.n_head // self.n_head_kv, 0), turn_v)
        x = x + out.swapaxes(0, 1).reshape(n, -1) @ self.w(f"blk.{i}.attn_output.weight").T
        y = self._norm(x, f"blk.{i}.ffn_norm.weight")
        gate = y @ self.w(f"blk.{i}.ffn_gate.weight").T
        up = y @ self.w(f"blk.{i}.ffn_up.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w(f"blk.{i}.ffn_down.weight").T
        return x, q, Layer(k, v), mask

    def _logits(self, row: Array) -> Array:
        name = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        return self.w(name) @ self._norm(row, "output_norm.weight")

    def prefill(
        self,
        pieces: list[Piece],
        schedule: Schedule | None = None,
        kv: str = "F32",
        follow: list[Array] | None = None,
    ) -> Result:
        """Prefill from position 0 on.

        With `follow` the rows kept at each cut are these, and not the oracle's own (which every `Cut` still
        tells): so each cut is judged from the state that the code under test was in.
        """
        x = self.embed(pieces)
        pos = np.arange(len(x))
        sizes = [len(p.embd) if isinstance(p, Image) else 0 for p in pieces]
        images = [p for p in pieces if isinstance(p, Image)]
        image = np.concatenate(
            [
                np.full(n or len(p), sum(s > 0 for s in sizes[:at]) if n else -1)
                for at, (p, n) in enumerate(zip(pieces, sizes, strict=True))
            ]
        )
        visual = np.where(image >= 0, np.cumsum(image >= 0) - 1, -1)
        first = np.concatenate([[0], np.cumsum([len(im.embd) for im in images])])
        result = Result(np.zeros(0), n_pos=len(x))
        counts = [schedule.counts(len(im.embd)) for im in images] if schedule else []
        sums = {t: np.zeros(first[-1]) for t in schedule.terms} if schedule else {}
        for i in range(self.n_layer):
            x, q, layer, mask = self._layer(i, x, pos, None, kv)
            result.layers.append(layer)
            if not images or not schedule or i > max(schedule.cuts, default=-1):
                continue
            rows_seen = visual >= 0
            at = visual[rows_seen]
            n_text = len(x) - 1 - int(np.flatnonzero(rows_seen)[-1]) if rows_seen.any() else 1
            now = {}
            for term in schedule.terms:
                rows = 1 if term.queries == "last" else min(n_text, TEXT_ROWS)
                p = probabilities(q[:, -rows:], layer.k, mask[-rows:], self.head**-0.5)[:, :, rows_seen]
                now[term] = np.zeros(first[-1])
                now[term][at] = p.mean((0, 1)) if term.reduce == "mean" else p.max((0, 1))
                sums[term] += now[term]
            if i not in schedule.cuts:
                continue
            n_cut = schedule.cuts.index(i)
            score = np.mean([sums[t][at] / (i + 1) if t.summed else now[t][at] for t in schedule.terms], axis=0)
            bias = np.concatenate(
                [
                    schedule.bias(im.nx or len(im.embd), im.ny or 1, c[n_cut])
                    for im, c in zip(images, counts, strict=True)
                ]
            )[at]
            rank = schedule.weight * score + bias
            whose = image[rows_seen]
            own = np.concatenate([at[whose == j][best(rank[whose == j], c[n_cut])] for j, c in enumerate(counts)])
            result.cuts.append(Cut(at, whose, score, rank, own))
            stay = own if follow is None else np.asarray(follow[n_cut])
            rows = ~rows_seen | np.isin(visual, stay)
            x, pos, image, visual = x[rows], pos[rows], image[rows], visual[rows]
        result.logits = self._logits(x[-1])
        return result

    def step(self, result: Result, token: int, kv: str = "F32") -> Array:
        """Append one generated token (in place) and return the next logits.

        Its position is the unpruned one; in each layer it sees what that layer kept.
        """
        x = self.w("token_embd.weight")[[token]]
        pos = np.array([result.n_pos])
        for i in range(self.n_layer):
            x, _, result.layers[i], _ = self._layer(i, x, pos, result.layers[i], kv)
        result.n_pos += 1
        result.logits = self._logits(x[-1])
        return result.logits


def nmse(got: Array, want: Array) -> float:
    """Squared error over squared size."""
    return float(np.square(got - want).sum() / np.square(want).sum())
