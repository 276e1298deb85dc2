"""Which cells a context has in use: a plain model of it, with no keys, values, scores or graphs.

A cell is an object: a position and the sequences that see it. Images are lists of positions, one for each token, which
count whether a layer holds the token or not (None once it was taken out of the sequence). Where a choice hangs on
attention, the model takes native code's, provided that it is a possible one.

Readings, where llama.cpp leaves room:
- A cell that several sequences share moves for all of them; and a token of which any stage's cell moves, moves in all
  stages for every sequence that has it.
- With a cache for each sequence (not unified), seq_keep leaves the other sequences alone, and seq_cp takes whole
  sequences only, in place of what was there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from oracle.schedule import Schedule

Everywhere = 2**31 - 1
Held = Callable[[int, int], Iterable[int]]  # (sequence, stage): positions that native code holds


@dataclass(eq=False)
class Cell:
    """A cell in use; `value` is what was first seen in it (`None` before): it must stay."""

    pos: int
    seqs: set[int]
    value: bytes | None = None


@dataclass(eq=False)
class Picture:
    """An image of a sequence."""

    pos: list[int | None]
    nx: int
    ny: int
    number: int
    waits: bool = True
    t: int = 0
    n0: list[int] = field(default_factory=list)

    def live(self) -> set[int]:
        """Positions of the tokens that were not taken out."""
        return {p for p in self.pos if p is not None}


class Occupancy:
    """The cells of a context of n_seq sequences, n_ctx cells for each of its streams."""

    def __init__(self, schedule: Schedule, n_seq: int, unified: bool, n_ctx: int) -> None:
        self.schedule, self.n_seq, self.unified, self.n_ctx = schedule, n_seq, unified, n_ctx
        self.n_stage = len(schedule.cuts) + 1
        self.shifted = False  # keys wait for being turned
        self.clear()

    # --- what there is ---

    def clear(self) -> None:
        """Nothing is in use."""
        self.stages: list[list[Cell]] = [[] for _ in range(self.n_stage)]
        self.images: list[list[Picture]] = [[] for _ in range(self.n_seq)]

    def positions(self, seq: int, stage: int) -> list[int]:
        """Positions of a sequence that a stage holds."""
        return sorted(c.pos for c in self.stages[stage] if seq in c.seqs)

    def logical(self, seq: int) -> set[int]:
        """All positions that the sequence counts, dropped ones too."""
        out = {c.pos for stage in self.stages for c in stage if seq in c.seqs}
        return out.union(*(im.live() for im in self.images[seq]))

    def end(self, seq: int) -> int:
        """Where a sequence goes on."""
        return max(self.logical(seq), default=-1) + 1

    def used(self, seq: int) -> int:
        """Cells in use where a sequence's cells are, in the fullest stage."""
        return max(sum(self.unified or seq in c.seqs for c in stage) for stage in self.stages)

    def fits(self, new: dict[int, int]) -> bool:
        """Whether there is room for so many cells more of each sequence."""
        if self.unified:
            return self.used(0) + sum(new.values()) <= self.n_ctx
        return all(self.used(seq) + n <= self.n_ctx for seq, n in new.items())

    # --- batches ---

    def anneal(self, seq: int, held: Held) -> None:
        """The start of a generated token's decode."""
        for im in self.images[seq]:
            for stage in range(self.n_stage):
                due = None if im.waits else self.schedule.target_before(im.nx * im.ny, im.n0[stage], im.t + 1)
                if due is not None:
                    bias = self.schedule.bias(im.nx, im.ny, due, im.number, self.schedule.anneal_random)
                    self._choose(seq, stage, im, None, due, bias, self.schedule.anneal_random, held)

    def add(self, seq: int, n: int, generated: bool, asks: bool, held: Held) -> None:
        """n tokens of text: a generated one counts for annealing; a question cuts down images that wait."""
        self._append(seq, n)
        for im in self.images[seq]:
            if generated and not im.waits:
                im.t += 1
            if asks and im.waits:
                self._cut(seq, im, held)

    def picture(self, seq: int, n: int, nx: int, ny: int, more: bool = False) -> None:
        """Embeddings by an ordinary batch."""
        at = self._append(seq, n)
        if not more:
            self.images[seq].append(Picture([], nx, ny, self._number(seq)))
        self.images[seq][-1].pos += range(at, at + n)

    def pruned(self, seq: int, pieces: list[int | tuple[int, int]], held: Held) -> None:
        """A pruned prompt: lengths of texts, grids of images."""
        new = []
        for piece in pieces:
            if isinstance(piece, int):
                self._append(seq, piece)
            else:
                self.picture(seq, piece[0] * piece[1], *piece)
                new.append(self.images[seq][-1])
        for im in new:
            self._cut(seq, im, held)

    def _append(self, seq: int, n: int) -> int:
        at = self.end(seq)
        for stage in self.stages:
            stage += [Cell(p, {seq}) for p in range(at, at + n)]
        return at

    def _number(self, seq: int) -> int:
        return self.images[seq][-1].number + 1 if self.images[seq] else 0

    def _cut(self, seq: int, im: Picture, held: Held) -> None:
        ids = [i for i, p in enumerate(im.pos) if p is not None]
        im.n0 = [len(ids)]
        for stage, n in enumerate(self.schedule.counts(len(im.pos)), 1):
            bias = self.schedule.bias(im.nx, im.ny, n, im.number)
            ids = self._choose(seq, stage, im, ids, n, bias, self.schedule.random, held)
            im.n0.append(len(ids))
        im.waits, im.t = False, 0

    def _choose(
        self,
        seq: int,
        stage: int,
        im: Picture,
        ids: list[int] | None,
        n: int,
        bias: np.ndarray,
        by_chance: bool,
        held: Held,
    ) -> list[int]:
        """Leave n tokens of an image in a stage: of `ids`, or (None) of those that it holds. Returns which stay."""
        inside = set(self.positions(seq, stage))
        if ids is None:
            ids = [i for i, p in enumerate(im.pos) if p in inside]
        n = min(n, len(ids))
        covered = [i for i in ids if bias[i] >= 1]
        if by_chance:
            stay = sorted(sorted(ids, key=lambda i: (-bias[i], i))[:n])
        elif len(covered) == n:
            stay = covered
        elif len(ids) == n:
            stay = ids
        else:  # attention decides
            now = set(held(seq, stage))
            stay = [i for i in ids if im.pos[i] in now]
            assert len(stay) == n, f"sequence {seq}, stage {stage}: {len(stay)} of {len(ids)} tokens stay, not {n}"
            assert set(covered[:n]) <= set(stay) or len(covered) > n, "a token of the grid left before others"
        gone = {p for i, p in enumerate(im.pos) if i not in stay and p is not None}
        self._leave(stage, lambda c: seq in c.seqs and c.pos in gone, {seq})
        return stay

    def _leave(self, stage: int, which: Callable[[Cell], bool], seqs: set[int]) -> None:
        for cell in self.stages[stage]:
            if which(cell):
                cell.seqs = cell.seqs - seqs
        self.stages[stage] = [c for c in self.stages[stage] if c.seqs]

    # --- sequences ---

    @staticmethod
    def _range(p0: int, p1: int) -> tuple[int, int]:
        return max(p0, 0), Everywhere if p1 < 0 else p1

    def rm(self, seq: int, p0: int, p1: int) -> None:
        """seq_rm; sequence -1 is all of them."""
        p0, p1 = self._range(p0, p1)
        seqs = set(range(self.n_seq)) if seq < 0 else {seq}
        for stage in range(self.n_stage):
            self._leave(stage, lambda c: p0 <= c.pos < p1, seqs)
        for s in seqs:
            self._move(s, lambda p: None if p0 <= p < p1 else p)

    def _move(self, seq: int, to: Callable[[int], int | None]) -> None:
        for im in self.images[seq]:
            im.pos = [p if p is None else to(p) for p in im.pos]
        self.images[seq] = [im for im in self.images[seq] if im.live()]

    def cp(self, src: int, dst: int, p0: int, p1: int) -> bool:
        """seq_cp; returns False where it is refused."""
        p0, p1 = self._range(p0, p1)
        if src == dst:
            return True
        images = copy.deepcopy(self.images[src])
        if self.unified:
            for stage in self.stages:
                for cell in stage:
                    if src in cell.seqs and p0 <= cell.pos < p1:
                        cell.seqs = cell.seqs | {dst}
            for im in images:
                im.pos = [p if p is not None and p0 <= p < p1 else None for p in im.pos]
            self.images[dst] += [im for im in images if im.live()]
            return True
        here = self.logical(src)
        if p0 > min(here, default=0) or p1 <= max(here, default=-1):
            return False
        self.rm(dst, 0, -1)
        for stage in self.stages:
            stage += [Cell(c.pos, {dst}, c.value) for c in stage if src in c.seqs]
        self.images[dst] = images
        return True

    def keep(self, seq: int) -> None:
        """seq_keep."""
        if self.unified:
            for other in range(self.n_seq):
                if other != seq:
                    self.rm(other, 0, -1)

    def shift(self, seq: int, p0: int, p1: int, by: int) -> bool:
        """seq_add; returns False, with nothing done, where two tokens of a sequence would meet at one position."""
        p0, p1 = self._range(p0, p1)
        moves: dict[int, set[int]] = {s: set() for s in range(self.n_seq)}
        moves[seq] = {p for p in self.logical(seq) if p0 <= p < p1}
        grew = True
        while grew:
            grew = False
            for stage in self.stages:
                for cell in stage:
                    if any(cell.pos in moves[s] for s in cell.seqs):
                        for s in cell.seqs:
                            grew |= cell.pos not in moves[s]
                            moves[s].add(cell.pos)
        for s, moved in moves.items():
            if {p + by for p in moved} & (self.logical(s) - moved):
                return False
        for stage in self.stages:
            for cell in [c for c in stage if any(c.pos in moves[s] for s in c.seqs)]:
                cell.pos += by
                self.shifted = True
            stage[:] = [c for c in stage if c.pos >= 0]
        for s, moved in moves.items():
            self._move(s, lambda p, moved=moved: p if p not in moved else p + by if p + by >= 0 else None)
        return True

    # --- states ---

    def save(self, seq: int | None) -> tuple[list[list[Cell]], list[list[Picture]]]:
        """What a saved state holds."""
        if seq is None:
            return copy.deepcopy((self.stages, self.images))
        cells = [[Cell(c.pos, {seq}, c.value) for c in stage if seq in c.seqs] for stage in self.stages]
        return cells, copy.deepcopy([self.images[seq]])

    def fits_saved(self, saved: tuple[list[list[Cell]], list[list[Picture]]], seq: int) -> bool:
        """Whether a sequence's saved state finds room."""
        for stage, new in zip(self.stages, saved[0], strict=True):
            stay = sum(c.seqs != {seq} and (self.unified or seq in c.seqs) for c in stage)
            if stay + len(new) > self.n_ctx:
                return False
        return True

    def restore(self, saved: tuple[list[list[Cell]], list[list[Picture]]], seq: int | None) -> None:
        """Put a saved state in place of what there is."""
        cells, images = copy.deepcopy(saved)
        if seq is None:
            self.stages, self.images = cells, images
            return
        self.rm(seq, 0, -1)
        for stage, new in zip(self.stages, cells, strict=True):
            stage += [Cell(c.pos, {seq}, c.value) for c in new]
        self.images[seq] = images[0]
