"""Which cells a context has in use: a plain model of it, with no keys, values, scores or graphs.

A cell is an object: a position and the sequences that see it. Images are lists of positions, one for each token, which
count whether a layer holds the token or not (None once it was taken out of the sequence). Where a choice hangs on
attention, the model takes native code's, provided that it is a possible one.

Rows may wait (st3-wait.h): a `Prompt` has no cells. What is computed "as it came" leaves its images to be cut down by
the next text that asks for an output.

A reading, where llama.cpp leaves room:
- With a cache for each sequence (not unified), seq_keep leaves the other sequences alone, and seq_cp takes whole
  sequences only, in place of what was there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

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


class NoRoom(Exception):
    """A batch finds no cells: llama_decode returns 1."""


@dataclass
class Prompt:
    """Rows at consecutive positions: text, or (an image's number among them). grids: of these."""

    at: int
    rows: list[int | None] = field(default_factory=list)  # None: text
    grids: list[tuple[int, int]] = field(default_factory=list)
    keep: bool = True

    @property
    def end(self) -> int:
        """The position that follows."""
        return self.at + len(self.rows)

    @property
    def lead(self) -> int:
        """Rows before the first image."""
        return next((i for i, row in enumerate(self.rows) if row is not None), len(self.rows))

    def pieces(self) -> list[int | tuple[int, int]]:
        """Lengths of texts, grids of images."""
        out: list[int | tuple[int, int]] = []
        for row, same in itertools.groupby(self.rows):
            n = len(list(same))
            out.append(n if row is None else self.grids[row] if math.prod(self.grids[row]) == n else (n, 1))
        return out

    def part(self, begin: int, end: int) -> Prompt:
        """Rows [begin, end)."""
        return Prompt(self.at + begin, self.rows[begin:end], self.grids, self.keep)


class Occupancy:
    """The cells of n_seq sequences, n_ctx for each stream of them; n_batch: most rows of a pruned prompt."""

    def __init__(self, schedule: Schedule, n_seq: int, unified: bool, n_ctx: int, n_batch: int) -> None:
        self.schedule, self.n_seq, self.unified, self.n_ctx, self.n_batch = schedule, n_seq, unified, n_ctx, n_batch
        self.n_stage = len(schedule.cuts) + 1
        self.clear()

    # --- what there is ---

    def clear(self) -> None:
        """Nothing is in use."""
        self.stages: list[list[Cell]] = [[] for _ in range(self.n_stage)]
        self.images: list[list[Picture]] = [[] for _ in range(self.n_seq)]
        self.waiting: list[Prompt | None] = [None] * self.n_seq
        self.asked: list[list[Prompt]] = [[] for _ in range(self.n_seq)]

    def positions(self, seq: int, stage: int) -> list[int]:
        """Positions of a sequence that a stage holds."""
        return sorted(c.pos for c in self.stages[stage] if seq in c.seqs)

    def logical(self, seq: int) -> set[int]:
        """All positions that the sequence counts, dropped ones and waiting ones too."""
        out = {c.pos for stage in self.stages for c in stage if seq in c.seqs}
        prompt = self.waiting[seq]
        return out.union(range(prompt.at, prompt.end) if prompt else (), *(im.live() for im in self.images[seq]))

    def end(self, seq: int) -> int:
        """Where a sequence goes on."""
        return max(self.logical(seq), default=-1) + 1

    def used(self, seq: int) -> int:
        """Cells in use where a sequence's cells are, in the fullest stage."""
        return max(sum(self.unified or seq in c.seqs for c in stage) for stage in self.stages)

    def n_waiting(self, seq: int) -> int:
        """Rows that wait in a sequence."""
        prompt = self.waiting[seq]
        return len(prompt.rows) if prompt else 0

    def fits(self, new: dict[int, int]) -> bool:
        """Whether there is room for so many cells more of each sequence."""
        if self.unified:
            return self.used(0) + sum(new.values()) <= self.n_ctx
        return all(self.used(seq) + n <= self.n_ctx for seq, n in new.items())

    def _need(self, new: dict[int, int]) -> None:
        if not self.fits(new):
            raise NoRoom

    def _need_waiting(self, seq: int, n: int) -> None:
        """Room for rows that are to wait, beside all that do."""
        beside = range(self.n_seq) if self.unified else [seq]
        if self.used(seq) + sum(map(self.n_waiting, beside)) + n > self.n_ctx:
            raise NoRoom

    # --- llama_decode: each raises NoRoom where it returns 1, with what it had computed before ---

    def flush(self, seq: int, n: int | None = None) -> None:
        """The first n rows that wait (None: all) are computed as they came."""
        prompt = self.waiting[seq]
        if not prompt:
            return
        n = len(prompt.rows) if n is None else n
        self._need({seq: n})
        self.waiting[seq] = None
        for piece in prompt.part(0, n).pieces():
            if isinstance(piece, int):
                self._append(seq, piece)
            else:
                self.picture(seq, piece[0] * piece[1], *piece)
        if n < len(prompt.rows):
            self.waiting[seq] = prompt.part(n, len(prompt.rows))

    def give_picture(self, seq: int, n: int, of: int, came: int, grid: tuple[int, int], keep: bool = True) -> None:
        """n embeddings of an announced image of `of`, after `came` others."""
        prompt, left = self.waiting[seq], of - came
        lead = prompt.lead if prompt else 0
        goes_on = prompt is not None and prompt.rows[-1] is not None
        beside = any(im.waits for im in self.images[seq])
        if self.n_waiting(seq) - lead + left > self.n_batch or (came and not goes_on) or beside:
            self.flush(seq)
            self._need({seq: n})
            more = came > 0 and bool(self.images[seq]) and self.images[seq][-1].waits
            self.picture(seq, n, n, 1, more)
            last = self.images[seq][-1]
            last.nx, last.ny = grid if len(last.pos) == of else (len(last.pos), 1)
            return
        if self.n_waiting(seq) + left > self.n_batch and lead:
            self.flush(seq, lead)
        self._need_waiting(seq, n)
        prompt = self.waiting[seq] or Prompt(self.end(seq))
        if not came:
            prompt = replace(prompt, grids=[*prompt.grids, grid], keep=prompt.keep and keep)
        number = prompt.rows[-1] if came else len(prompt.grids) - 1
        self.waiting[seq] = replace(prompt, rows=prompt.rows + [number] * n)

    def give_text(self, news: dict[int, int], asks: bool, held: Held) -> None:
        """So many tokens of each sequence; `asks`: the last one of each asks for an output."""
        ask, hold, rest = [], [], []
        for seq, n in sorted(news.items()):
            prompt = self.waiting[seq]
            image = prompt is not None and prompt.lead < len(prompt.rows)
            if image and len(prompt.rows) - prompt.lead + n <= self.n_batch:
                if len(prompt.rows) + n > self.n_batch:
                    self.flush(seq, prompt.lead)
                (ask if asks else hold).append(seq)
                continue
            self.flush(seq)
            waits = not image and not asks and len(news) == 1 and n < self.n_batch
            (hold if waits and not any(im.waits for im in self.images[seq]) else rest).append(seq)
        for seq in hold:
            self._need_waiting(seq, news[seq])
        needs = {seq: self._rows(self.waiting[seq], news[seq]) for seq in ask}
        self._need_rows(needs)
        for seq in rest:
            if news[seq] == 1 and asks:
                self.anneal(seq, held)
            needs[seq] = [news[seq]] * self.n_stage
        self._need_rows(needs)
        for seq in ask:
            prompt = self.waiting[seq]
            self.waiting[seq] = None
            prompt = replace(prompt, rows=prompt.rows + [None] * news[seq])
            self.pruned(seq, prompt.pieces(), held)
            if prompt.keep:
                self.asked[seq].append(prompt)
        for seq in rest:
            self.add(seq, news[seq], generated=news[seq] == 1 and asks, asks=asks, held=held)
        for seq in hold:
            prompt = self.waiting[seq] or Prompt(self.end(seq))
            self.waiting[seq] = replace(prompt, rows=prompt.rows + [None] * news[seq])

    def _rows(self, prompt: Prompt, n: int) -> list[int]:
        """Rows that each stage computes of a pruned prompt and n tokens of text."""
        out = [n] * self.n_stage
        for piece in prompt.pieces():
            sizes = [piece] * self.n_stage
            if not isinstance(piece, int):
                sizes = [math.prod(piece), *self.schedule.counts(math.prod(piece))]
            out = [a + b for a, b in zip(out, sizes, strict=True)]
        return out

    def _need_rows(self, needs: dict[int, list[int]]) -> None:
        for stage, cells in enumerate(self.stages):
            for seq in [None] if self.unified else needs:
                new = sum(rows[stage] for s, rows in needs.items() if seq in (None, s))
                if sum(seq is None or seq in c.seqs for c in cells) + new > self.n_ctx:
                    raise NoRoom

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

    def rm(self, seq: int, p0: int, p1: int) -> bool:
        """seq_rm; sequence -1 is all of them. Returns False where one of them is left as it was."""
        if seq < 0:
            done = [self.rm(s, p0, p1) for s in range(self.n_seq)]
            return all(done)
        p0, p1 = self._range(p0, p1)
        prompt = self.waiting[seq]
        if prompt and p0 < p1 and prompt.at <= p1 < prompt.end:
            try:
                self.flush(seq)
            except NoRoom:
                return False
        if p0 < p1:
            p0 = self._ask_again(seq, p0, p1)
        for stage in range(self.n_stage):
            self._leave(stage, lambda c: p0 <= c.pos < p1, {seq})
        self._move(seq, lambda p: None if p0 <= p < p1 else p)
        return True

    def _ask_again(self, seq: int, p0: int, p1: int) -> int:
        """What becomes of prompts when positions go. Returns where what is to go begins."""
        asked, prompt = self.asked[seq], self.waiting[seq]
        if p1 < self.end(seq):
            while asked and asked[-1].end >= p0:
                asked.pop()
            return p0
        if prompt and p0 < prompt.end:
            self.waiting[seq] = prompt.part(0, p0 - prompt.at) if p0 > prompt.at else None
        while asked and asked[-1].at >= p0:
            asked.pop()
        if asked and asked[-1].end > p0:
            rest = asked[-1].part(0, p0 - asked[-1].at)
            asked.pop()
            if rest.lead < len(rest.rows):
                self.waiting[seq] = rest
                return rest.at
        return p0

    def _move(self, seq: int, to: Callable[[int], int | None]) -> None:
        for im in self.images[seq]:
            im.pos = [p if p is None else to(p) for p in im.pos]
        self.images[seq] = [im for im in self.images[seq] if im.live()]

    def cp(self, src: int, dst: int, p0: int, p1: int) -> bool:
        """seq_cp; returns False where it is refused."""
        p0, p1 = self._range(p0, p1)
        if src == dst:
            return True
        here = self.logical(src)
        whole = p0 <= min(here, default=0) and p1 > max(here, default=-1)
        if not self.unified and not whole:
            return False
        whole = whole and (not self.unified or not self.logical(dst))
        text = self.waiting[src] is not None and not self.waiting[src].grids
        try:
            if text or not whole:
                self.flush(src)
            if not whole:
                self.flush(dst)
        except NoRoom:
            return False
        if not self.unified:
            self.rm(dst, 0, -1)
        self.waiting[dst] = copy.deepcopy(self.waiting[src]) if whole else None
        self.asked[dst] = list(self.asked[src]) if whole else []
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

    # --- states ---

    def save(self, seq: int | None) -> tuple:
        """What a saved state holds: cells, images, and prompts that wait and that were asked, by sequence."""
        if seq is None:
            return copy.deepcopy((self.stages, self.images, self.waiting, self.asked))
        cells = [[Cell(c.pos, {seq}, c.value) for c in stage if seq in c.seqs] for stage in self.stages]
        return cells, *copy.deepcopy(([self.images[seq]], [self.waiting[seq]], [self.asked[seq]]))

    def fits_saved(self, saved: tuple, seq: int) -> bool:
        """Whether a sequence's saved state finds room."""
        for stage, new in zip(self.stages, saved[0], strict=True):
            stay = sum(c.seqs != {seq} and (self.unified or seq in c.seqs) for c in stage)
            if stay + len(new) > self.n_ctx:
                return False
        return True

    def restore(self, saved: tuple, seq: int | None) -> None:
        """Put a saved state in place of what there is."""
        cells, images, waiting, asked = copy.deepcopy(saved)
        if seq is None:
            self.stages, self.images, self.waiting, self.asked = cells, images, waiting, asked
            return
        self.rm(seq, 0, -1)
        for stage, new in zip(self.stages, cells, strict=True):
            stage += [Cell(c.pos, {seq}, c.value) for c in new]
        self.images[seq], self.waiting[seq], self.asked[seq] = images[0], waiting[0], asked[0]
