"""A LLaMA decoder in double precision, read from a GGUF, with pruned prefill, decode and annealing.

A prompt is a list of pieces: token ids (text) or an `Image` of embeddings. One residual row is one prompt
position; a cut drops rows, and what is left keeps its order and its rotary position. Visual tokens are named by their
index over all images of a conversation in order.

`follow` holds, for each stage, the positions that the code under test has there after a batch. Then these stay, and not
the oracle's own choice (which every `Cut` still tells): so each cut and each step is judged from the state that the
code was in. `owners` likewise: for each cut, the index of the token that stands for each visual token of the prompt.
`weights`: for each stage, the weights at the positions of `follow`, where tokens left after the compute.

Readings, where the method leaves room:
- A batch makes one record for every image whose prefill it is or comes after, in every stage; the scoring rows of
  `text` are the batch's rows after its last image (all of them where it has none).
- An image that came by an ordinary batch waits for its question, and has no records and no t until then. Such a batch
  itself records nothing: nobody asks or answers in it.
- An image of an ordinary batch has no grid: a square where its length is one, else one row.
- A record is of one stage: with `-sum` a term is averaged over its layers, else it is the last one's (as at a cut).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

from . import rounding
from .attention import probabilities
from .conversation import Array, Cut, Image, Layer, Piece, Result, Seen
from .schedule import Schedule, Term, best

SAME_OWNER = 1e-3  # difference of two cosines that rounding explains
TEXT_ROWS = 512  # at most so many rows of text score
TILE_ROWS = 64  # a CPU prefill of fewer rows than this rounds its queries to the cache's type


class Decoder:
    """The model of a GGUF file of the `llama` architecture, and what others derive from."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        arch = reader.get_field("general.architecture").contents()

        def key(name: str, default: float | None = None) -> float:
            f = reader.get_field(f"{arch}.{name}")
            if f is None and default is None:
                raise KeyError(name)
            return default if f is None else f.contents()

        self.n_layer = int(key("block_count"))
        self.n_embd = int(key("embedding_length"))
        self.n_head = int(key("attention.head_count"))
        self.n_head_kv = int(key("attention.head_count_kv", self.n_head))
        self.head = self.n_embd // self.n_head
        self.scale = self.head**-0.5
        self.mask = "F16"  # the type of a mask of flash attention; without that it is F32
        self.eps = float(key("attention.layer_norm_rms_epsilon"))
        base = float(key("rope.freq_base", 10000.0))
        n_rot = int(key("rope.dimension_count", self.head))
        if n_rot != self.head:
            raise ValueError("only whole heads are rotated here")
        self.freqs = base ** (-np.arange(0, self.head, 2) / self.head)
        # set: computes as inexactly as floats may: each layer's input off by a relative 1e-6, rotary angles by half a
        # unit in the last place (1e-4 at position 1000), F16 values summed in F16 in any order
        self.noise: np.random.Generator | None = None
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

    def seen_by(self, i: int, x: Array) -> Array:
        """What the attention of layer i sees of rows x."""
        return self._norm(x, f"blk.{i}.attn_norm.weight")

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w(name)

    def _heads(self, x: Array, name: str, pos: Array | None) -> Array:
        y = (x @ self.w(name).T).reshape(len(x), -1, self.head).swapaxes(0, 1)
        if pos is None:
            return y
        angle = pos[:, None] * self.freqs
        if self.noise is not None:
            angle = angle * (1 + self.noise.uniform(-1, 1, angle.shape) * 2**-24)
        c, s = np.cos(angle), np.sin(angle)
        even, odd = y[..., 0::2], y[..., 1::2]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(y.shape)

    def _layer(
        self, i: int, x: Array, pos: Array, past: Layer, visual: Array, weight: Array, kv: str
    ) -> tuple[Array, Array, Layer]:
        """Run a layer; returns its output, its (unrounded) queries and its cache."""
        quantized = kv not in ("F32", "F16", "BF16")
        turn_k = rounding.rotation_size(self.head, True) if quantized else 0
        turn_v = rounding.rotation_size(self.head, False) if quantized else 0
        if self.noise is not None:
            x = x * (1 + 1e-6 * self.noise.standard_normal(x.shape))
        y = self.seen_by(i, x)
        q = rounding.rotate(self._heads(y, f"blk.{i}.attn_q.weight", pos), turn_k)
        k = rounding.stored(rounding.rotate(self._heads(y, f"blk.{i}.attn_k.weight", pos), turn_k), kv)
        v = rounding.stored(rounding.rotate(self._heads(y, f"blk.{i}.attn_v.weight", None), turn_v), kv)
        k, v = np.concatenate([past.k, k], 1), np.concatenate([past.v, v], 1)
        now = Layer(k, v, np.append(past.pos, pos), np.append(past.visual, visual), np.append(past.weight, weight))
        asked = rounding.multiplied(q, kv) if quantized or len(x) < TILE_ROWS else q
        p, of_head = self._attention(asked, now), np.repeat(now.v, self.n_head // self.n_head_kv, 0)
        if self.noise is not None and kv == "F16" and len(x) < TILE_ROWS:
            out = rounding.sum_in_f16(p, of_head, self.noise.permutation(of_head.shape[1]))
        else:
            out = rounding.rotate(p @ of_head, turn_v)
        x = x + self._joined(i, out.swapaxes(0, 1).reshape(len(x), -1))
        return x + self._ffn(i, self._norm(x, f"blk.{i}.ffn_norm.weight")), q, now

    def _joined(self, i: int, heads: Array) -> Array:
        """What the heads [n, n_head * head] of a layer's attention add to the rows."""
        return heads @ self.w(f"blk.{i}.attn_output.weight").T

    def _ffn(self, i: int, y: Array) -> Array:
        gate = y @ self.w(f"blk.{i}.ffn_gate.weight").T
        up = y @ self.w(f"blk.{i}.ffn_up.weight").T
        return (gate / (1 + np.exp(-gate)) * up) @ self.w(f"blk.{i}.ffn_down.weight").T

    def _attention(self, q: Array, layer: Layer) -> Array:
        """Causal probabilities [n_head, n_q, n] of queries that belong to the newest cells."""
        n, n_kv = q.shape[1], layer.k.shape[1]
        counts = rounding.stored(np.log(layer.weight), self.mask)
        mask = np.where(np.arange(n_kv)[None, :] > np.arange(n_kv - n, n_kv)[:, None], -np.inf, counts)
        return probabilities(q, layer.k, mask, self.scale)

    def attention(self, pieces: list[Piece]) -> Iterator[Array]:
        """For each layer in order, the probabilities [n_head, n_text, n] of the text rows behind the last image."""
        x, n = self.embed(pieces), sum(len(p.embd) if isinstance(p, Image) else len(p) for p in pieces)
        pos, none = np.arange(n), np.zeros((self.n_head_kv, 0, self.head))
        for i in range(self.n_layer):
            past = Layer(none, none, pos[:0], pos[:0], pos[:0])
            x, q, layer = self._layer(i, x, pos, past, np.full(n, -1), np.ones(n), "F32")
            yield self._attention(q[:, -len(pieces[-1]) :], layer)

    def _received(self, term: Term, q: Array, layer: Layer, n_text: int, n_visual: int) -> Array:
        """What a term makes of the attention that each visual token of the layer gets: [n_visual], 0 where dropped."""
        rows = 1 if term.queries == "last" else min(n_text, TEXT_ROWS)
        p = self._attention(q[:, -rows:], layer)[:, :, layer.visual >= 0]
        out = np.zeros(n_visual)
        out[layer.visual[layer.visual >= 0]] = p.mean((0, 1)) if term.reduce == "mean" else p.max((0, 1))
        return out

    def _logits(self, row: Array) -> Array:
        name = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        return self.w(name) @ self._norm(row, "output_norm.weight")

    def _batch(
        self,
        result: Result,
        x: Array,
        visual: Array,
        kv: str,
        asked: list[Seen],
        follow: list[Array] | None = None,
        owners: list[Array] | None = None,
        weights: list[Array] | None = None,
        scoring: int | None = None,
    ) -> None:
        """Run rows [n, width], named by `visual`, through all layers: logits, caches, records.

        `asked` are the images whose prefill this batch is. Where it holds them the cuts drop rows between layers, else
        they take cells when all layers have run. `scoring`: so many of the last rows score, where that is fewer.
        """
        schedule, pos = result.schedule, np.arange(result.n_pos, result.n_pos + len(x))
        cuts = schedule.cuts if schedule else ()
        pruned = bool(asked) and asked[0].first in visual
        n_text = len(x) - 1 - int(np.flatnonzero(visual >= 0)[-1]) if (visual >= 0).any() else len(x)
        n_text = min(n_text, scoring or n_text)
        terms = {*(schedule.terms if asked else ()), *schedule.record_terms} if schedule and result.images else set()
        received: dict[Term, list[Array]] = {t: [] for t in terms}
        each: dict[Term, list[Array]] = {t: [] for t in terms}  # of the tokens that one stands for
        weight = np.ones(len(x))
        result.n_pos += len(x)
        result.cuts = []
        for i in range(self.n_layer):
            x, q, layer = self._layer(i, x, pos, result.layers[i], visual, weight, kv)
            result.layers[i] = layer
            for t in terms:
                received[t].append(self._received(t, q, layer, n_text, result.n_visual))
                each[t].append(received[t][-1] / layer_weights(layer, result.n_visual))
            if pruned and i in cuts:
                toward = self.seen_by(i + 1, x)
                toward = toward / np.sqrt((toward * toward).sum(-1, keepdims=True))
                stay = self._cut(result, i, asked, each, follow, (visual, toward))
                if schedule.merge:
                    x, weight = self._merge(
                        result.cuts[-1],
                        asked,
                        stay,
                        x,
                        weight,
                        (visual, toward),
                        owners[len(result.cuts) - 1] if owners else None,
                    )
                rows = (visual < 0) | np.isin(visual, stay)
                x, pos, visual, weight = x[rows], pos[rows], visual[rows], weight[rows]
        result.logits = self._logits(x[-1])
        if not pruned and asked:
            count = np.ones(result.n_visual)
            for n_cut, i in enumerate(cuts):
                stay = self._cut(result, i, asked, received, follow)
                theirs = weights and weights[n_cut + 1]
                count = self._leave(result, result.cuts[-1], n_cut + 1, asked, stay, count, theirs)
        for im in asked:
            im.start(result)
        for im in result.images if asked or visual.max(initial=-1) < 0 else []:
            if not im.waits and schedule and schedule.anneal != "none":
                im.records += 1
                for stage, total in enumerate(im.total):
                    for t in schedule.record_terms:
                        layers = result.members(stage) if t.summed else result.members(stage)[-1:]
                        total += np.mean([received[t][i] for i in layers], 0)[im.ids] / len(schedule.record_terms)

    def _cut(
        self,
        result: Result,
        i: int,
        asked: list[Seen],
        received: dict[Term, list[Array]],
        follow: list[Array] | None,
        rows: tuple[Array, Array] | None = None,
    ) -> Array:
        """The cut after layer i: adds it to the result, and returns what stays of the images.

        `rows`: the visual indices [n] of the rows there are, and the next layer's view of each [n, width], of length 1.
        """
        schedule, n_cut = result.schedule, len(result.cuts)
        assert schedule is not None
        score = np.zeros(result.n_visual)
        for t in schedule.terms:
            score += (np.mean(received[t][: i + 1], axis=0) if t.summed else received[t][i]) / len(schedule.terms)
        if n_cut == 0:
            left = np.concatenate([im.ids for im in asked])
        else:
            left = result.cuts[-1].kept if follow is None else result.visual(follow[n_cut], asked)
        if schedule.distance and rows is not None:
            score = by_distance(score, left, asked, *rows)
        cut = self._choose(schedule, asked, left, score, [schedule.counts(im.n)[n_cut] for im in asked])
        result.cuts.append(cut)
        return cut.kept if follow is None else result.visual(follow[n_cut + 1], asked)

    def _merge(
        self,
        cut: Cut,
        asked: list[Seen],
        stay: Array,
        x: Array,
        weight: Array,
        rows: tuple[Array, Array],
        follow: Array | None,
    ) -> tuple[Array, Array]:
        """Rows and their weights where those that stay stand for those that do not.

        `follow`: of each of the prompt's visual tokens, the owner to take. Notes the choice in the cut.
        """
        visual, toward = rows
        x, weight = x.copy(), weight.copy()
        before, of_row = weight.copy(), {int(v): r for r, v in enumerate(visual) if v >= 0}
        cut.owner, cut.gap, cut.close = np.full(len(cut.left), -1), np.zeros(len(cut.left)), np.zeros(0)
        for i, im in enumerate(asked):
            mine, kept = cut.left[cut.image == i], stay[np.isin(stay, im.ids)]
            if not len(kept):
                continue
            at, to = np.array([of_row[v] for v in mine]), np.array([of_row[v] for v in kept])
            cosine = toward[at] @ toward[to].T
            own = np.searchsorted(kept, mine).clip(max=len(kept) - 1)
            is_kept = kept[own] == mine
            best_of = np.where(is_kept, own, cosine.argmax(1))
            taken = best_of if follow is None else np.searchsorted(kept, asked[0].first + follow[mine - asked[0].first])
            here = cut.image == i
            cut.owner[here] = kept[best_of]
            cut.gap[here] = cosine[np.arange(len(mine)), best_of] - cosine[np.arange(len(mine)), taken]
            cut.gap[here] = np.where(is_kept & (taken != own), np.inf, cut.gap[here])
            first, second = np.sort(cosine, 1)[:, :-3:-1].T if len(kept) > 1 else (1, -1)
            cut.close = np.append(cut.close, before[at][~is_kept & (first - second < SAME_OWNER)])
            old = x[at].copy()
            for k, row in enumerate(to):
                share = np.where(taken == k, before[at], 0.0)
                weight[row] = share.sum()
                x[row] = share @ old / share.sum()
        return x, weight

    def _leave(
        self,
        result: Result,
        cut: Cut,
        stage: int,
        images: list[Seen],
        stay: Array,
        count: Array,
        weights: Array | None,
    ) -> Array:
        """Of these images leave `stay` alone in a stage, whose tokens stand for those most like them by their values.

        `count` [n_visual] are the weights before, what is returned those to go on with: `weights`, if these are given.
        """
        layer, count = result.layers[result.members(stage)[0]], count.copy()
        if result.schedule and result.schedule.merge:
            there = np.isin(layer.visual, cut.left)
            toward = layer.v[:, there].swapaxes(0, 1).reshape(there.sum(), -1)
            toward = toward / np.sqrt((toward * toward).sum(-1, keepdims=True))
            visual = layer.visual[there]
            _, count[visual] = self._merge(cut, images, stay, toward, count[visual], (visual, toward), None)
        result.keep(stage, images, stay)
        for member in result.members(stage):
            layer, theirs = result.layers[member], np.concatenate([im.ids for im in images])
            here = np.isin(layer.visual, theirs)
            layer.weight[here] = count[layer.visual[here]]
            cut.weight = layer.weight.copy()
            if weights is not None:
                layer.weight[:] = weights[: len(layer.weight)]
                count[layer.visual[here]] = layer.weight[here]
        return count

    def _choose(
        self,
        schedule: Schedule,
        images: list[Seen],
        left: Array,
        score: Array,
        counts: list[int],
        annealing: bool = False,
    ) -> Cut:
        """Rank the tokens `left` of these images (score [n_visual]) and keep the best, counts[i] of images[i]."""
        by_chance = schedule.anneal_random if annealing else schedule.random
        rank, owner, own = np.zeros(len(score)), np.full(len(score), -1), []
        for i, (im, n) in enumerate(zip(images, counts, strict=True)):
            mine = left[np.isin(left, im.ids)]
            bias = schedule.bias(im.nx, im.ny, n, im.number, by_chance)
            rank[mine] = (0 if by_chance else score[mine]) + bias[mine - im.first]
            owner[mine] = i
            own.append(mine[best(rank[mine], n)])
        left = left[owner[left] >= 0]
        return Cut(left, owner[left], score[left], rank[left], np.concatenate([np.zeros(0, np.int64), *own]))

    def begin(self, schedule: Schedule | None = None) -> Result:
        """An empty conversation."""
        none = np.zeros((self.n_head_kv, 0, self.head))
        layers = [Layer(none, none, *np.zeros((2, 0), np.int64), np.zeros(0)) for _ in range(self.n_layer)]
        return Result(np.zeros(0), layers=layers, schedule=schedule)

    def prefill(
        self,
        pieces: list[Piece],
        schedule: Schedule | None = None,
        kv: str = "F32",
        follow: list[Array] | None = None,
        result: Result | None = None,
        owners: list[Array] | None = None,
    ) -> Result:
        """Prefill in one batch, pruned if there is a schedule: from position 0, or going on from `result`."""
        result = self.begin(schedule) if result is None else result
        names, asked, at = [], [], result.n_pos
        for p in pieces:
            n = len(p.embd) if isinstance(p, Image) else len(p)
            if isinstance(p, Image):
                asked.append(result.add(at, n, p.nx or n, p.ny or 1))
            names.append(asked[-1].ids if isinstance(p, Image) else np.full(n, -1))
            at += n
        self._batch(result, self.embed(pieces), np.concatenate(names), kv, asked, follow, owners)
        result.continues = False
        return result

    def picture(self, result: Result, image: Image, kv: str = "F32") -> None:
        """An ordinary batch of embeddings: an image that waits for its question, or more of the one just before.

        `image` has the grid of all that came so far, or none.
        """
        n = len(image.embd)
        if result.continues:
            last = result.images[-1]
            last.n += n
        else:
            last = result.add(result.n_pos, n, 0, 0)
        side = math.isqrt(last.n)
        likely = (side, side) if side**2 == last.n else (last.n, 1)
        last.nx, last.ny = (image.nx, image.ny) if image.nx * image.ny == last.n else likely
        self._batch(result, self.embed([image]), last.ids[-len(image.embd) :], kv, [])
        result.continues = True

    def text(
        self,
        result: Result,
        tokens: list[int],
        kv: str = "F32",
        follow: list[Array] | None = None,
        weights: list[Array] | None = None,
        asks: bool = True,
        scoring: int | None = None,
    ) -> Array:
        """A batch of tokens whose last row is an output: the question of images that wait. Returns its logits.

        These images are cut down by the rule of the cuts in prefill, once all layers have run. `asks`: false for text
        without an output. `scoring`: rows of the last ubatch, where there are several: no others score.
        """
        waiting = [im for im in result.images if im.waits] if result.schedule and asks else []
        none = np.full(len(tokens), -1)
        self._batch(result, self.embed([tokens]), none, kv, waiting, follow, weights=weights, scoring=scoring)
        result.continues = False
        return result.logits

    def step(
        self,
        result: Result,
        token: int,
        kv: str = "F32",
        follow: list[Array] | None = None,
        weights: list[Array] | None = None,
    ) -> Array:
        """Append one generated token (in place) and return the next logits.

        Before it, each image that had its question is annealed: where tokens are merged, those that leave hand their
        weights on. The token's position is the unpruned one; in each layer it sees what that layer kept.
        """
        schedule, result.steps = result.schedule, []
        images = [im for im in result.images if not im.waits] if schedule else []
        for stage in range(result.stage(self.n_layer - 1) + 1 if images else 0):
            left, score, counts = result.held(stage), np.zeros(result.n_visual), []
            for im in images:
                score[im.ids] = im.total[stage] / max(1, im.records)
                due = schedule.target_before(im.n, im.n0[stage], im.t + 1)
                counts.append(int(np.isin(left, im.ids).sum()) if due is None else due)
            cut = self._choose(schedule, images, left, score, counts, annealing=True)
            result.steps.append(cut)
            stay = cut.kept if follow is None else result.visual(follow[stage], images)
            count = layer_weights(result.layers[result.members(stage)[0]], result.n_visual)
            self._leave(result, cut, stage, images, stay, count, weights and weights[stage])
        self._batch(result, self.embed([[token]]), np.array([-1]), kv, [])
        result.continues = False
        for im in images:
            im.t += 1
        return result.logits


def layer_weights(layer: Layer, n_visual: int) -> Array:
    """The weight in a layer of each visual token [n_visual]; 1 where it is not there."""
    out = np.ones(n_visual)
    out[layer.visual[layer.visual >= 0]] = layer.weight[layer.visual >= 0]
    return out


def by_distance(score: Array, left: Array, images: list[Seen], visual: Array, toward: Array) -> Array:
    """Scores [n_visual], each times 1 - the largest cosine to a token of its image with a higher score, if above 0."""
    score, row = score.copy(), {int(v): r for r, v in enumerate(visual) if v >= 0}
    for im in images:
        mine = left[np.isin(left, im.ids)]
        y = toward[[row[v] for v in mine]]
        higher = score[mine][None, :] > score[mine][:, None]
        score[mine] *= 1 - np.where(higher, y @ y.T, 0.0).max(1, initial=0.0)
    return score


def nmse(got: Array, want: Array) -> float:
    """Squared error over squared size."""
    return float(np.square(got - want).sum() / np.square(want).sum())
