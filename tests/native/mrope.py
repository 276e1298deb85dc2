"""Tiny random models of other architectures, and a context that lets the oracle name tokens with M-RoPE by row.

The oracle, and the conversations beside it, know a token by the number of its row in the sequence; in the cache the
tokens of an image share a position.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from annealing import Conversation
from cases import SCORES
from native_runtime import Context, Image, Model
from oracle import llama as oracle
from oracle import schedule

from st3_edge.commands.bench import random_model
from st3_edge.commands.bench.random_model import Tensor
from st3_edge.commands.bench.shapes import Shape


@dataclass(frozen=True)
class Family:
    """An architecture and a tiny shape of it. metadata: further keys, without the architecture's name."""

    arch: str
    shape: Shape
    sections: tuple[int, int, int, int] | None = None
    n_deepstack: int = 0
    n_expert: int = 0
    metadata: tuple[tuple[str, int | float], ...] = ()

    @property
    def n_embd_inp(self) -> int:
        """Width of an embedding with what deepstack adds."""
        return self.shape.n_embd * (1 + self.n_deepstack)


FAMILIES = {
    "qwen2vl": Family("qwen2vl", Shape(8, 128, 4, 2, 192, n_vocab=320), (8, 4, 4, 0)),
    "qwen3vl": Family("qwen3vl", Shape(8, 128, 4, 2, 192, n_vocab=320, tied=True), (6, 5, 5, 0), n_deepstack=3),
    "qwen3vlmoe": Family("qwen3vlmoe", Shape(6, 128, 2, 1, 96, n_vocab=320), (12, 10, 10, 0), 2, n_expert=4),
}


def tensors(f: Family) -> Iterator[Tensor]:
    """Every tensor of a decoder."""
    for t in random_model.text_tensors(f.shape):
        layer, _, name = t.name.removesuffix(".weight").rpartition(".")
        if f.n_expert and name in ("ffn_gate", "ffn_up", "ffn_down"):
            yield Tensor(f"{layer}.{name}_exps.weight", (f.n_expert, *t.dims), t.std)
            continue
        yield t
        if name in ("attn_q", "attn_k", "attn_v") and f.arch == "qwen2vl":
            yield Tensor(f"{layer}.{name}.bias", t.dims[:1], 0.3)
        if f.arch == "gemma3" and name == "attn_norm":
            for post in ("post_attention_norm", "post_ffw_norm"):
                yield Tensor(f"{layer}.{post}.weight", t.dims, 0.1, 0.6)
        if name in ("attn_q", "attn_k") and f.arch != "qwen2vl":
            yield Tensor(f"{layer}.{name}_norm.weight", (f.shape.head,), 0.1, 1.2)
        if name == "ffn_norm" and f.n_expert:
            yield Tensor(f"{layer}.ffn_gate_inp.weight", (f.n_expert, f.shape.n_embd), 2 * f.shape.n_embd**-0.5)


def write(path: Path, f: Family, seed: int) -> Path:
    """Writes a random model in F32."""
    s, w = f.shape, gguf.GGUFWriter(path, f.arch)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(s.rope_base)
    for key, value in f.metadata:
        (w.add_uint32 if isinstance(value, int) else w.add_float32)(f"{f.arch}.{key}", value)
    if f.sections:
        w.add_array(f"{f.arch}.rope.dimension_sections", list(f.sections))
    if f.n_deepstack:
        w.add_uint32(f"{f.arch}.n_deepstack_layers", f.n_deepstack)
    if f.n_expert:
        w.add_expert_count(f.n_expert)
        w.add_expert_used_count(2)
        w.add_expert_feed_forward_length(s.n_ff)
    tokens, scores, types = random_model.vocabulary(s.n_vocab)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    rng = np.random.default_rng(seed)
    for t in tensors(f):
        w.add_tensor(t.name, (t.mean + t.std * rng.standard_normal(t.dims)).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def resolve(f: Family, keys: dict) -> schedule.Schedule:
    return schedule.resolve(f.shape.n_layer, **{k.removeprefix("st3."): v for k, v in keys.items()})


def drawn_keys(rng: np.random.Generator, number: int) -> dict:
    """A schedule to prune by."""
    return {
        "st3.preset": "st3",
        "st3.keep": float(rng.integers(16, 60)) / 64,
        "st3.start": int(rng.integers(1, 4)),
        "st3.stride": int(rng.integers(1, 4)),
        "st3.score": SCORES[number % len(SCORES)],
        "st3.merge": bool(rng.random() < 0.5),
        "st3.rank": str(rng.choice(["score", "distance"])),
    }


def words(f: Family, rng: np.random.Generator, n: int) -> list[int]:
    return [int(t) for t in rng.integers(3, f.shape.n_vocab, n)]


def converse(
    f: Family, talk: Conversation, rng: np.random.Generator, first: list[oracle.Piece], second: list[oracle.Piece]
) -> None:
    """A prompt, an answer, a question that follows, a second prompt with images, and an image cut down afterwards."""
    ctx = talk.ctx
    talk.prefill(first)
    assert ctx.report()["mode"] == "pruned-prefill" and ctx.report()["reason"] is None
    for _ in range(8):
        talk.step(int(rng.integers(3, 300)))
    talk.text(words(f, rng, 4))
    talk.prefill(second)
    for _ in range(6):
        talk.step(int(rng.integers(3, 300)))
    talk.picture(picture(f, rng, 6, 8))
    talk.text(words(f, rng, 9))
    assert ctx.report()["mode"] == "evict-only"
    for _ in range(6):
        talk.step(int(rng.integers(3, 300)))
    talk.close()


def side_by_side(
    f: Family, talks: list[Conversation], prompts: list[list[oracle.Piece]], rng: np.random.Generator
) -> None:
    """Two sequences of one context: prompts one after the other, tokens in one batch and in turns."""
    talks[0].prefill(prompts[0])
    for _ in range(3):
        talks[0].step(int(rng.integers(3, 300)))
    talks[1].prefill(prompts[1])
    for i in range(10):
        tokens = [int(t) for t in rng.integers(3, 300, 2)]
        if i % 3 == 2:
            for talk, token in zip(talks[::-1], tokens[::-1], strict=True):
                talk.step(token)
            continue
        ends = [getattr(talk.ctx, "end", talk.at) for talk in talks]
        rows = [(token, end, [talk.seq]) for token, end, talk in zip(tokens, ends, talks, strict=True)]
        assert talks[0].ctx.decode_rows(rows) == 0
        for row, (talk, token) in enumerate(zip(talks, tokens, strict=True)):
            if isinstance(talk.ctx, RowContext):
                talk.ctx.add([[token]])
            talk.follow("step", token, check_logits=False)
            assert oracle.nmse(talk.ctx.logits(row), talk.result.logits) <= talk.most_error[talk.kv], f"sequence {row}"
    assert [im.t for talk in talks for im in talk.result.images] == [13] * 2 + [10] * 2
    for talk in talks:
        talk.close()


def picture(f: Family, rng: np.random.Generator, nx: int, ny: int) -> oracle.Image:
    """Random embeddings of an image."""
    return oracle.Image(rng.standard_normal((nx * ny, f.n_embd_inp)).astype(np.float32), nx, ny)


class RowContext(Context):
    """A context whose positions, as its callers see them, are numbers of rows of one sequence. One batch is one image
    at most, and none is split."""

    def __init__(self, model: Model, **how: object) -> None:
        super().__init__(model, **how)
        self.places: list[tuple[int, int, int, int]] = []  # of each row: t, y, x and a fourth number
        self.visual: list[int] = []  # rows of visual tokens
        self.end = 0  # the next position
        self.grid = 0, 0  # of the next image

    def beside(self) -> RowContext:
        """The same context as another sequence sees it."""
        other = copy.copy(self)
        other.places, other.visual, other.end = [], [], 0
        return other

    def add(self, pieces: Sequence[Sequence[int] | Image | oracle.Image]) -> None:
        """Notes the places of pieces that are decoded."""
        for piece in pieces:
            if isinstance(piece, Image | oracle.Image):
                nx, ny = piece.nx or len(piece.embd), piece.ny or 1
                self.visual += range(len(self.places), len(self.places) + nx * ny)
                self.places += [(self.end, self.end + i // nx, self.end + i % nx, 0) for i in range(nx * ny)]
                self.end += max(nx, ny)
            else:
                self.places += [(p, p, p, 0) for p in range(self.end, self.end + len(piece))]
                self.end += len(piece)

    def _forget(self, n: int) -> None:
        """Rows from n on are no more."""
        self.end = self.places[n][0] if n < len(self.places) else self.end
        del self.places[n:]
        self.visual = [row for row in self.visual if row < n]

    def prefill(self, pieces: Sequence[Sequence[int] | Image], p0: int = 0, seq: int = 0) -> int:
        """st3_prefill from row p0 on."""
        assert p0 == len(self.places)
        code = super().prefill(pieces, self.end, seq)
        if not code:
            self.add(pieces)
        return code

    def announce(self, n: int, nx: int = 0, ny: int = 0) -> None:
        """st3_announce_image without the grid, which the places say."""
        self.grid = nx, ny
        super().announce(n)

    def decode(self, rows: Sequence[int] | np.ndarray, p0: int, outputs: str = "last", seq: int = 0) -> int:
        """llama_decode of token ids, or of embeddings [n, width] with the grid last announced, from row p0 on."""
        assert p0 == len(self.places)
        if not isinstance(rows, np.ndarray):
            code = super().decode(rows, self.end, outputs, seq)
            if not code:
                self.add([rows])
            return code
        self.add([Image(rows, *self.grid)])
        code = self.decode_at(rows, self.places[p0:], outputs, seq)
        if code:
            self._forget(p0)
        return code

    def decode_at(self, embd: np.ndarray, places: Sequence[Sequence[int]], outputs: str = "none", seq: int = 0) -> int:
        """llama_decode of embeddings [n, width] at places [n][4]."""
        L, n = self.rt.llama, len(embd)
        batch = L.llama_batch_init(4 * n, embd.shape[1], 1)
        try:
            batch.n_tokens = n
            data = np.ascontiguousarray(embd, np.float32)
            ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
            for i in range(n):
                for section in range(4):
                    batch.pos[section * n + i] = int(places[i][section])
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = outputs == "last" and i == n - 1
            return L.llama_decode(self.ptr, batch)
        finally:
            L.llama_batch_free(batch)

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        """llama_memory_seq_rm of the rows from p0 to the end."""
        assert p1 == -1
        done = super().seq_rm(seq, self.places[p0][0] if p0 < len(self.places) else self.end, -1)
        if done:
            self._forget(p0)
        return done

    def held(self, layer: int, seq: int = 0) -> np.ndarray:
        """The rows that a layer holds: text, which must be complete, and what st3_visual names."""
        visual = np.array(self.visual, np.int64)
        n = self.rt.lib.st3_visual(self.ptr, seq, layer, None, 0)
        ids = (ctypes.c_int32 * max(1, n))()
        assert self.rt.lib.st3_visual(self.ptr, seq, layer, ids, n) == n
        stay = visual[np.array(ids[:n], np.int64)]
        rows = np.sort(np.append(np.setdiff1d(np.arange(len(self.places)), visual), stay))
        positions = super().held(layer, seq)
        assert np.array_equal(positions, [self.places[row][0] for row in rows]), f"layer {layer}: {positions}"
        return rows
