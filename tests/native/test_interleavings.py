"""Random interleavings of everything that changes a cache, against a plain model of its occupancy.

After each operation every layer of every sequence holds the model's positions, and logits are finite. Now and then the
values in the cells are read from a saved state: once written, they never change, wherever they are moved.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Image, Model
from occupancy import Occupancy
from oracle import schedule

from st3_edge.bench.shapes import Shape

SHAPE = Shape(5, 128, 2, 1, 64, n_vocab=272)  # heads of 64: upstream cannot shift other quantized keys
N_OPERATIONS = 900  # of each case: more than 10,000 in all
N_UBATCH = 48
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
            here = m.logical(seq)
            assert self.ctx.positions(seq) == (min(here, default=-1), max(here, default=-1)), f"sequence {seq}"

    def check_values(self, seq: int) -> None:
        """Values in the cells of a sequence are those that were first seen in them, and the report counts cells."""
        m = self.model
        values = saved_values(self.ctx.save(seq), len(m.schedule.cuts))
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


def saved_values(raw: bytes, n_cuts: int) -> list[dict[int, bytes]]:
    """For each stage, the rows of V at each position, from a saved sequence (the format is in st3-snapshot.cpp)."""
    at = 8 + 24  # llama.cpp's header, and ours

    def take(form: str) -> tuple:
        nonlocal at
        out = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return out

    n_layer, n_stage, _, type_v = take("4I")
    cuts = take(f"{n_cuts}i")
    take(f"{2 * n_layer}I")
    _, n_images = take("iI")
    for _ in range(n_images):
        _, n, *_ = take("i5I")
        take(f"2Q{n}i")
        take(f"{take('I')[0]}I")
        take(f"{take('I')[0] * n}f")  # scores
        take(f"{take('I')[0] * n}f")  # weights
    row = SHAPE.head * SHAPE.n_head_kv
    row = {1: 2 * row, 8: row // 32 * 34}[type_v]
    out = []
    for stage in range(n_stage):
        positions = []
        for _ in range(take("I")[0]):
            pos, *_, n_owners = take("5iI")
            positions.append(pos)
            take(f"{n_owners}i")
        layers = np.diff([0, *(c + 1 for c in cuts), n_layer])[stage]
        values = [b""] * len(positions)
        for _ in range(layers):
            at += row * len(positions)  # K
            for i in range(len(positions)):
                values[i] += raw[at : at + row]
                at += row
        out.append(dict(zip(positions, values, strict=True)))
    assert at == len(raw)
    return out


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
            "shift": 6,
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
        if len(self.log) % 20 == 0:
            pair.check_values(self.seq)

    def note(self, what: object) -> None:
        """More about the operation, for the message of a failure."""
        self.log[-1] += f" {what}"

    # --- operations ---

    def decode(self, pair: Pair, code: int, new: dict[int, int], room: bool | None = None) -> bool:
        """Whether a decode that returned this code went through, as the model says it must."""
        pair.model.shifted = False
        room = pair.model.fits(new) if room is None else room
        self.note(f"{new} -> {code}")
        assert code in ((0, 2) if self.aborting and room else (0,) if room else (1,)), f"code {code}, room {room}"
        return code == 0

    aborting = False

    def _finite(self, pair: Pair) -> None:
        assert np.isfinite(pair.ctx.logits()).all()

    def step(self, pair: Pair) -> None:
        seq, m = self.seq, pair.model
        code = pair.ctx.decode(self.tokens(1), m.end(seq), seq=seq)
        m.anneal(seq, pair.held)
        if self.decode(pair, code, {seq: 1}):
            m.add(seq, 1, generated=True, asks=True, held=pair.held)
            self._finite(pair)

    def together(self, pair: Pair) -> None:
        m = pair.model
        seqs = [s for s in range(m.n_seq) if self.rng.random() < 0.7] or [self.seq]
        code = pair.ctx.decode_rows([(self.tokens(1)[0], m.end(s), [s]) for s in seqs])
        for s in seqs:
            m.anneal(s, pair.held)
        if self.decode(pair, code, dict.fromkeys(seqs, 1)):
            for s in seqs:
                m.add(s, 1, generated=True, asks=True, held=pair.held)
            self._finite(pair)

    def text(self, pair: Pair, asks: bool | None = None) -> bool:
        seq, m, n = self.seq, pair.model, int(self.rng.integers(2, 9))
        asks = bool(self.rng.random() < 0.8) if asks is None else asks
        code = pair.ctx.decode(self.tokens(n), m.end(seq), "last" if asks else "none", seq=seq)
        if not self.decode(pair, code, {seq: n}):
            return False
        m.add(seq, n, generated=False, asks=asks, held=pair.held)
        if asks:
            self._finite(pair)
        return True

    def picture(self, pair: Pair) -> None:
        seq, m = self.seq, pair.model
        if not self.text(pair, asks=False):  # so that it does not go on with an image before
            return
        nx, ny = (int(n) for n in self.rng.integers(2, 6, 2))
        side = int((nx * ny) ** 0.5)
        grid = (side, side) if side**2 == nx * ny else (nx * ny, 1)
        parts = [nx * ny] if self.rng.random() < 0.7 else [2, nx * ny - 2]
        for i, n in enumerate(n for n in parts if n > 0):
            code = pair.ctx.decode(EMBD[:n], m.end(seq), "none", seq=seq)
            if not self.decode(pair, code, {seq: n}):
                if i:  # what came stays, and counts as an image of its own
                    m.images[seq][-1].nx, m.images[seq][-1].ny = 2, 1
                return
            m.picture(seq, n, *grid, more=i > 0)
            pair.check()

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
        code = pair.ctx.prefill(native, p0=m.end(seq), seq=seq)
        self.note(f"{pieces} at {m.end(seq)} -> {code}")
        if not m.fits({seq: sum(sizes)}):
            assert code == -100 and "n_ctx" in pair.ctx.rt.last_error()
            return
        m.shifted = False
        assert code in ((0, 2) if self.aborting else (0,))
        if code:
            return
        history = sizes[0] if isinstance(pieces[0], int) else 0
        if sum(sizes) - history > N_UBATCH:
            for p in pieces[:-1]:
                if isinstance(p, int):
                    m.add(seq, p, generated=False, asks=False, held=pair.held)
                else:
                    m.picture(seq, p[0] * p[1], *p)
            m.add(seq, sizes[-1], generated=False, asks=True, held=pair.held)
        else:
            m.pruned(seq, pieces, pair.held)
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
        assert pair.ctx.seq_rm(seq, p0, p1)
        m.rm(seq, p0, p1)

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

    def shift(self, pair: Pair) -> None:
        m, seq = pair.model, self.seq
        draw, end = self.rng.random(), m.end(seq)
        if draw < 0.6:  # a context shift
            p0, n = int(self.rng.integers(0, end + 1)), int(self.rng.integers(1, 30))
            assert pair.ctx.seq_rm(seq, p0, p0 + n)
            m.rm(seq, p0, p0 + n)
            p0, p1, by = p0 + n, -1, -n
        elif draw < 0.8:  # room in the middle
            p0, p1, by = self.spot(pair), -1, int(self.rng.integers(1, 20))
        else:  # all of it, perhaps beyond 0
            p0, p1, by = self.spot(pair), self.spot(pair), int(self.rng.integers(-20, 20))
        self.note(f"[{p0}, {p1}) by {by}")
        if m.shift(seq, p0, p1, by):
            pair.ctx.seq_add(seq, p0, p1, by)
        else:
            self.note("not done")

    def save(self, pair: Pair) -> None:
        seq = None if self.rng.random() < 0.3 else self.seq
        self.note(f"as {len(self.states) % 4}")
        state = (seq, pair.ctx.save(seq), pair.model.save(seq), pair.model.shifted)
        self.states = [*self.states[-3:], state]

    def restore(self, pair: Pair) -> None:
        if not self.states:
            return
        seq, raw, saved, shifted = self.states[int(self.rng.integers(len(self.states)))]
        to = None if seq is None else self.seq
        n = pair.ctx.restore(raw, to)
        self.note(f"a state of {'all' if seq is None else seq} -> {n}")
        if n == 0:  # no room; or keys that wait for being turned cannot be moved
            assert pair.model.shifted or not pair.model.fits_saved(saved, to)
            return
        assert n == len(raw)
        pair.model.restore(saved, to)
        pair.model.shifted |= shifted

    def clear(self, pair: Pair) -> None:
        pair.ctx.clear()
        pair.model.clear()
        pair.model.shifted = False


@pytest.mark.parametrize(("name", "n_seq", "unified", "kv"), CASES)
def test_occupancy(rt, random_gguf, tally, name: str, n_seq: int, unified: bool, kv: str) -> None:
    """Breaks if any of it leaks a cell, leaves a stale one, moves a value, or forgets where an image is."""
    keys = {"st3.start": 1, "st3.anneal_tokens": 10, "st3.anneal_floor": 0.25, **KEYS[name]}
    s = schedule.resolve(SHAPE.n_layer, **{k.removeprefix("st3."): v for k, v in keys.items()})
    n_ctx = N_CTX if unified else N_CTX * n_seq
    how = {"n_ctx": n_ctx, "n_ubatch": N_UBATCH, "n_batch": n_ctx, "n_seq": n_seq, "unified": unified, "kv": kv}
    with Model(rt, random_gguf(SHAPE), keys) as model, Context(model, **how) as a, Context(model, **how) as b:
        row = {"F16": 64, "Q8_0": 34}[kv] * SHAPE.head // 32 * SHAPE.n_head_kv
        most = 2 * row * n_ctx * SHAPE.n_layer
        pairs = [Pair(c, Occupancy(s, n_seq, unified, N_CTX), most) for c in (a, b)]
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
