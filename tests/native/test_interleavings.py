"""Random interleavings of everything that changes a cache, against a plain model of its occupancy.

After each operation every layer of every sequence holds the model's positions, with weights that sum up to each image's
tokens, and logits are finite. Now and then a saved state is read: values in the cells, once written, never change,
wherever they are moved; and what left has no weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import saved
from cases import SEED
from native_runtime import Context, Image, Model
from occupancy import NoRoom, Occupancy
from oracle import schedule

from st3_edge.commands.bench.shapes import Shape

SHAPE = Shape(5, 128, 2, 1, 64, n_vocab=272)
N_OPERATIONS = int(os.environ.get("ST3_TEST_INTERLEAVINGS", "250"))  # of each case; 900: more than 12,000 in all
N_BATCH = 48
N_CTX = 256
KEYS: dict[str, dict[str, str | int | float]] = {
    "random": {"st3.preset": "random", "st3.keep": 0.6, "st3.stride": 2, "st3.anneal": "linear", "st3.seed": 9},
    "downsample": {"st3.preset": "downsample", "st3.keep": 0.5, "st3.stride": 1, "st3.anneal": "cosine"},
    "scored": {"st3.preset": "st3", "st3.keep": 0.7, "st3.score": "text-max-sum+last-mean", "st3.coverage": 0.25},
    "alone": {"st3.preset": "st3", "st3.keep": 1.0, "st3.anneal": "exponential", "st3.anneal_interval": 3},
}
SEQUENCES = [(1, False), (4, False), (4, True)]
CASES = [(keys, *sequences, kv) for keys in KEYS for sequences in SEQUENCES for kv in ("F16",)] + [
    ("random", 4, True, "Q8_0"),
    ("scored", 4, False, "Q8_0"),
]
RNG = np.random.default_rng([SEED, 40])
EMBD = RNG.standard_normal((64, SHAPE.n_embd)).astype(np.float32)


@dataclass
class Pair:
    """A context and its model."""

    ctx: Context
    model: Occupancy
    most: int = 0

    def held(self, seq: int, stage: int) -> list[int]:
        """Positions that native code holds in a stage."""
        return self.ctx.held([*self.model.schedule.cuts, SHAPE.n_layer - 1][stage], seq).tolist()

    def check(self) -> None:
        """Every layer of every sequence."""
        m, cuts = self.model, self.model.schedule.cuts
        for seq in range(m.n_seq):
            want = [m.positions(seq, stage) for stage in range(m.n_stage)]
            for layer in range(SHAPE.n_layer):
                got = self.ctx.held(layer, seq).tolist()
                assert got == want[sum(c < layer for c in cuts)], f"sequence {seq}, layer {layer}"
            self.check_weights(seq, want)
            here = m.logical(seq)
            assert self.ctx.report(seq)["waiting"] == m.n_waiting(seq), f"sequence {seq}"
            assert self.ctx.positions(seq) == (min(here, default=-1), max(here, default=-1)), f"sequence {seq}"

    def check_weights(self, seq: int, held: list[list[int]]) -> None:
        """What each stage holds of an image of which nothing was taken away stands for all of it, or is nothing."""
        m = self.model
        for stage, last in enumerate([*m.schedule.cuts, SHAPE.n_layer - 1]):
            weights = self.ctx.weights(last, seq)
            assert np.isfinite(weights).all() and (weights >= 1).all(), f"sequence {seq}, stage {stage}: {weights}"
            for im in m.images[seq] if m.schedule.merge else []:
                theirs = weights[np.isin(held[stage], list(im.live()))].sum()
                whole = None not in im.pos
                assert not whole or theirs in (0, len(im.pos)), f"sequence {seq}, stage {stage}: {theirs} of {im.pos}"

    def check_saved(self, seq: int) -> None:
        """Values in the cells of a sequence are those that were first seen in them, the report counts cells, and of an
        image those tokens alone that a stage holds have weights there."""
        m = self.model
        body = saved.Body(saved.take_apart(self.ctx.save(seq))[1])
        values = body.values
        for im in body.images:
            assert len(im["weights"]) in (0, m.n_stage) and len(im["weights"]) <= m.n_stage * m.schedule.merge
            for stage, weights in enumerate(im["weights"]):
                where = f"sequence {seq}, stage {stage}: {weights}"
                assert np.isfinite(weights).all() and (weights >= 0).all(), where
                if -1 not in im["pos"]:
                    there = np.isin(im["pos"], list(values[stage]))
                    assert ((weights > 0) == there).all() and weights.sum() in (0, len(weights)), where
        for stage, cells in enumerate(m.stages):
            mine = {c.pos: c for c in cells if seq in c.seqs}
            assert mine.keys() == values[stage].keys()
            for pos, cell in mine.items():
                assert cell.value in (None, values[stage][pos]), f"sequence {seq}, stage {stage}, position {pos}"
                cell.value = values[stage][pos]
        report = self.ctx.report()["kv_bytes"]
        layers = np.diff([0, *(c + 1 for c in m.schedule.cuts), SHAPE.n_layer])
        cell = self.most // (SHAPE.n_layer * N_CTX * (1 if m.unified else m.n_seq))
        assert report["live"] == cell * sum(len(s) * n for s, n in zip(m.stages, layers, strict=True))
        assert report["live"] <= report["allocated"] <= self.most + 4096 * SHAPE.n_layer


@dataclass
class Session:
    """Two contexts of one model, what was saved of them, and a line for each operation."""

    pairs: list[Pair]
    rng: np.random.Generator
    states: list[tuple] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = {
            "step": 30,
            "together": 8,
            "text": 8,
            "picture": 6,
            "prompt": 12,
            "abort": 6,
            "remove": 8,
            "copy": 6,
            "keep": 1,
            "save": 5,
            "restore": 5,
            "clear": 0.5,
        }
        self.names = list(weights)
        self.odds = np.array(list(weights.values())) / sum(weights.values())

    def pick(self, *choices: object) -> object:
        """One of them."""
        return choices[int(self.rng.integers(len(choices)))]

    def tokens(self, n: int) -> list[int]:
        """Random text."""
        return [int(t) for t in self.rng.integers(3, SHAPE.n_vocab, n)]

    def run(self) -> None:
        """One operation, and the checks."""
        pair = self.pairs[int(self.rng.integers(len(self.pairs)))]
        self.seq = int(self.rng.integers(pair.model.n_seq))
        name = str(self.rng.choice(self.names, p=self.odds))
        self.log.append(f"{self.pairs.index(pair)}.{self.seq} {name}")
        getattr(self, name)(pair)
        pair.check()
        if len(self.log) % 10 == 0:
            pair.check_saved(self.seq)

    def note(self, what: object) -> None:
        """More about the operation, for the message of a failure."""
        self.log[-1] += f" {what}"

    # --- operations ---

    aborting = False

    def follow(self, pair: Pair, code: int, seqs: Iterable[int], give: Callable[[Occupancy], None]) -> bool:
        """Lets the model do what native code answered with `code`; returns whether it went through."""
        m = pair.model
        self.note(f"-> {code}")
        if code == 2 and self.aborting:
            self.aborted(pair, seqs)
            return False
        try:
            give(m)
        except NoRoom:
            assert code == 1, f"code {code}, and there is no room"
            return False
        assert code == 0, f"code {code}, and there is room"
        return True

    def aborted(self, pair: Pair, seqs: Iterable[int]) -> None:
        """Of a batch that was aborted, what was computed before stays: rows that waited, and tokens that left."""
        m = pair.model
        for seq in seqs:
            done = m.n_waiting(seq) - pair.ctx.report(seq)["waiting"]
            if done:
                assert done in (m.waiting[seq].lead, m.n_waiting(seq))
                m.flush(seq, done)
            if any(m.positions(seq, s) != pair.held(seq, s) for s in range(m.n_stage)):
                m.anneal(seq, pair.held)

    def _finite(self, pair: Pair) -> None:
        assert np.isfinite(pair.ctx.logits()).all()

    def step(self, pair: Pair) -> None:
        seq = self.seq
        code = pair.ctx.decode(self.tokens(1), pair.model.end(seq), seq=seq)
        if self.follow(pair, code, [seq], lambda m: m.give_text({seq: 1}, True, pair.held)):
            self._finite(pair)

    def together(self, pair: Pair) -> None:
        seqs = [s for s in range(pair.model.n_seq) if self.rng.random() < 0.7] or [self.seq]
        code = pair.ctx.decode_rows([(self.tokens(1)[0], pair.model.end(s), [s]) for s in seqs])
        self.note(seqs)
        if self.follow(pair, code, seqs, lambda m: m.give_text(dict.fromkeys(seqs, 1), True, pair.held)):
            assert all(np.isfinite(pair.ctx.logits(i)).all() for i in range(len(seqs)))

    def text(self, pair: Pair) -> None:
        seq, n, asks = self.seq, int(self.rng.integers(1, 9)), bool(self.rng.random() < 0.6)
        code = pair.ctx.decode(self.tokens(n), pair.model.end(seq), "last" if asks else "none", seq=seq)
        self.note(f"{n}{' asks' * asks}")
        if self.follow(pair, code, [seq], lambda m: m.give_text({seq: n}, asks, pair.held)) and asks:
            self._finite(pair)

    def picture(self, pair: Pair) -> None:
        seq = self.seq
        nx, ny = (int(n) for n in self.rng.integers(1, 8, 2))
        parts = [nx * ny] if self.rng.random() < 0.7 else [1, nx * ny - 1]
        self.note(f"{nx} x {ny}, {parts}")
        pair.ctx.announce(nx * ny, nx, ny)
        came = 0
        for n in (min(N_BATCH, p - i) for p in parts for i in range(0, p, N_BATCH)):
            code = pair.ctx.decode(EMBD[:n], pair.model.end(seq), "none", seq=seq)
            give = partial(Occupancy.give_picture, seq=seq, n=n, of=nx * ny, came=came, grid=(nx, ny))
            if not self.follow(pair, code, [seq], give):
                return
            pair.check()
            came += n

    def prompt(self, pair: Pair) -> None:
        seq, m = self.seq, pair.model
        pieces: list[int | tuple[int, int]] = []
        if self.rng.random() < 0.6:
            pieces.append(int(self.rng.integers(2, 40 if self.rng.random() < 0.3 else 5)))
        for _ in range(1 + (self.rng.random() < 0.3)):
            most = 8 if self.rng.random() < 0.15 else 5
            pieces.append((int(self.rng.integers(1, most)), int(self.rng.integers(2, most))))
            if self.rng.random() < 0.4:
                pieces.append(int(self.rng.integers(2, 4)))
        pieces.append(int(self.rng.integers(2, 9)))
        sizes = [p if isinstance(p, int) else p[0] * p[1] for p in pieces]
        native = [self.tokens(p) if isinstance(p, int) else Image(EMBD[: p[0] * p[1]], *p) for p in pieces]
        p0 = m.end(seq)
        code = pair.ctx.prefill(native, p0=p0, seq=seq)
        self.note(f"{pieces} at {p0} -> {code}")
        if not m.fits({seq: sum(sizes) + m.n_waiting(seq)}):
            assert code == -100 and "n_ctx" in pair.ctx.rt.last_error()
            return
        if code == 2 and self.aborting:
            self.aborted(pair, [seq])
            return
        try:
            for i, piece in enumerate(pieces):
                if isinstance(piece, int):
                    m.give_text({seq: piece}, i + 1 == len(pieces), pair.held)
                    continue
                for came in range(0, sizes[i], N_BATCH):
                    m.give_picture(seq, min(N_BATCH, sizes[i] - came), sizes[i], came, piece, keep=False)
        except NoRoom:
            assert code == 1
            m.rm(seq, p0, -1)
            return
        assert code == 0
        self._finite(pair)

    def abort(self, pair: Pair) -> None:
        after, calls = int(self.rng.integers(0, 60)), iter(range(10**9))
        self.note(f"after {after}")
        pair.ctx.abort_when(lambda: next(calls) >= after)
        self.aborting = True
        try:
            self.pick(self.step, self.step, self.text, self.prompt, self.picture, self.together)(pair)
        finally:
            self.aborting = False
            pair.ctx.abort_when(None)

    def spot(self, pair: Pair) -> int:
        """A position, sometimes an impossible one."""
        end = pair.model.end(self.seq)
        return int(self.pick(-1, -5, 0, end, end + 3, *self.rng.integers(0, end + 1, 8)))

    def remove(self, pair: Pair) -> None:
        m, seq = pair.model, self.seq
        draw = self.rng.random()
        p0, p1 = (
            (-1, -1) if draw < 0.15 else (self.spot(pair), -1) if draw < 0.4 else (self.spot(pair), self.spot(pair))
        )
        seq = -1 if self.rng.random() < 0.03 else seq
        self.note(f"sequence {seq} [{p0}, {p1})")
        assert pair.ctx.seq_rm(seq, p0, p1) == m.rm(seq, p0, p1)

    def copy(self, pair: Pair) -> None:
        m, dst = pair.model, int(self.rng.integers(pair.model.n_seq))
        p0, p1 = (-1, -1) if self.rng.random() < 0.6 else (self.spot(pair), self.spot(pair))
        if m.unified and dst != self.seq:  # elsewise a sequence would have tokens twice
            assert pair.ctx.seq_rm(dst, p0, p1)
            m.rm(dst, p0, p1)
        self.note(f"to {dst} [{p0}, {p1})")
        pair.ctx.rt.log.clear()
        pair.ctx.seq_cp(self.seq, dst, p0, p1)
        done = m.cp(self.seq, dst, p0, p1)
        assert done == (not any("seq_cp" in line for line in pair.ctx.rt.log))

    def keep(self, pair: Pair) -> None:
        pair.ctx.seq_keep(self.seq)
        pair.model.keep(self.seq)

    def save(self, pair: Pair) -> None:
        seq = None if self.rng.random() < 0.3 else self.seq
        self.note(f"as {len(self.states) % 4}")
        state = (seq, pair.ctx.save(seq), pair.model.save(seq))
        self.states = [*self.states[-3:], state]

    def restore(self, pair: Pair) -> None:
        if not self.states:
            return
        seq, raw, saved = self.states[int(self.rng.integers(len(self.states)))]
        to = None if seq is None else self.seq
        n = pair.ctx.restore(raw, to)
        self.note(f"a state of {'all' if seq is None else seq} -> {n}")
        if n == 0:
            assert not pair.model.fits_saved(saved, to)
            return
        assert n == len(raw)
        pair.model.restore(saved, to)

    def clear(self, pair: Pair) -> None:
        pair.ctx.clear()
        pair.model.clear()


@pytest.mark.parametrize(("name", "n_seq", "unified", "kv"), CASES)
def test_occupancy(rt, random_gguf, tally, name: str, n_seq: int, unified: bool, kv: str) -> None:
    """Breaks if any of it leaks a cell, leaves a stale one, moves a value, or forgets where an image is."""
    keys = {"st3.start": 1, "st3.anneal_tokens": 10, "st3.anneal_floor": 0.25, **KEYS[name]}
    s = schedule.resolve(SHAPE.n_layer, **{k.removeprefix("st3."): v for k, v in keys.items()})
    n_ctx = N_CTX if unified else N_CTX * n_seq
    how = {"n_ctx": n_ctx, "n_ubatch": N_BATCH, "n_batch": N_BATCH, "n_seq": n_seq, "unified": unified, "kv": kv}
    with Model(rt, random_gguf(SHAPE), keys) as model, Context(model, **how) as a, Context(model, **how) as b:
        row = {"F16": 64, "Q8_0": 34}[kv] * SHAPE.head // 32 * SHAPE.n_head_kv
        most = 2 * row * n_ctx * SHAPE.n_layer
        pairs = [Pair(c, Occupancy(s, n_seq, unified, N_CTX, N_BATCH), most) for c in (a, b)]
        rng = np.random.default_rng([SEED, 41, CASES.index((name, n_seq, unified, kv))])
        session = Session(pairs, rng)
        try:
            for _ in range(N_OPERATIONS):
                session.run()
        except AssertionError as e:
            raise AssertionError(f"operation {len(session.log)}: {e}; the last ones: {session.log[-12:]}") from e
        tally["interleaved operations"] = tally.get("interleaved operations", 0) + len(session.log)
        with Context(model, **how) as fresh:
            assert fresh.decode([5], 0) == 0
            least = fresh.report()["kv_bytes"]
        for pair in pairs:
            pair.ctx.clear()
            assert pair.ctx.report()["kv_bytes"]["live"] == 0
            assert pair.ctx.decode([5], 0) == 0
            assert pair.ctx.report()["kv_bytes"]["live"] == least["live"]
            assert pair.ctx.report()["kv_bytes"]["allocated"] <= 2 * least["allocated"], "shrunk when much too large"
