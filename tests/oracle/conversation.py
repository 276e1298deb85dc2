"""What a conversation of the oracle (llama.py) is made of: its images, layers and cuts, and what it has come to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .schedule import Schedule

Array = np.ndarray


@dataclass(frozen=True)
class Image:
    """Embeddings [n, width] of one image, and its patch grid."""

    embd: Array
    nx: int
    ny: int


Piece = list[int] | Image


@dataclass
class Layer:
    """What a layer remembers: rotated keys, values [n_head_kv, n, head] as the cache's type holds them.

    `pos` [n] are their positions, `visual` [n] names the visual tokens; -1 is text. `weight` [n]: how many tokens each
    stands for.
    """

    k: Array
    v: Array
    pos: Array
    visual: Array
    weight: Array

    def only(self, cells: Array) -> Layer:
        """The layer with these cells (a mask [n]) alone."""
        return Layer(self.k[:, cells], self.v[:, cells], self.pos[cells], self.visual[cells], self.weight[cells])


@dataclass
class Cut:
    """A cut as the oracle sees it: what was there, how it ranked, and what it would keep.

    `left` are visual indices before the cut, `score` and `rank` belong to them, `image` says whose they are, `kept` is
    the oracle's choice. A step's removal is a cut in this sense too, one for each stage.

    Where tokens are merged, `owner` is the oracle's choice of an owner for each of `left` among those that stayed, and
    `gap` by how much its cosine is larger than that of the owner which was followed. `close` are the weights of those
    that left and have two owners to choose from that rounding does not tell apart.
    """

    left: Array
    image: Array
    score: Array
    rank: Array
    kept: Array
    owner: Array | None = None
    gap: Array | None = None
    close: Array | None = None
    weight: Array | None = None  # of the stage's cells, where tokens left after the compute

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

    def is_rounding(self, again: Cut, other: Array) -> bool:
        """Whether the same choice in a run with noise moves the ranks in question by half of `margin` or more."""
        return self.margin(other) <= 2 * self._moved(again, other)

    def _moved(self, again: Cut, other: Array) -> float:
        """How far the ranks of tokens that only one of `kept` and `other` has differ in two runs, as `margin` does."""
        worst = 0.0
        for i in np.unique(self.image):
            disputed = (self.image == i) & (np.isin(self.left, self.kept) ^ np.isin(self.left, other))
            if disputed.any():
                size = np.abs(self.score[self.image == i]).max()
                base = max(min(np.abs(self.rank[disputed]).max(), size), np.finfo(float).tiny)
                worst = max(worst, float(np.abs(self.rank - again.rank)[disputed].max() / base))
        return worst


@dataclass
class Seen:
    """An image in a conversation: tokens [first, first + n) at positions [p0, p0 + n), `number` in the sequence.

    `n0`, `total` are of each stage: tokens held after prefill, and the sum of the records [n]. `t` counts generated
    tokens; `waits` says that no question has seen it yet.
    """

    first: int
    n: int
    nx: int
    ny: int
    p0: int
    number: int
    waits: bool = True
    t: int = 0
    records: int = 0
    n0: list[int] = field(default_factory=list)
    total: list[Array] = field(default_factory=list)

    @property
    def ids(self) -> Array:
        """Its visual indices."""
        return np.arange(self.first, self.first + self.n)

    def start(self, result: Result) -> None:
        """Its prefill is over: from here on it is annealed."""
        n_stages = result.stage(len(result.layers) - 1) + 1
        self.waits = False
        self.n0 = [int(np.isin(result.held(s), self.ids).sum()) for s in range(n_stages)]
        self.total = [np.zeros(self.n) for _ in range(n_stages)]


@dataclass
class Result:
    """A conversation: logits of the last position, caches, images, and the cuts of the last prefill or question.

    `steps` are the removals of the last generated token, one `Cut` for each stage.
    """

    logits: Array
    cuts: list[Cut] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    n_pos: int = 0
    schedule: Schedule | None = None
    images: list[Seen] = field(default_factory=list)
    steps: list[Cut] = field(default_factory=list)
    continues: bool = False  # the last batch ended in an image

    @property
    def n_visual(self) -> int:
        """Visual tokens of all images."""
        return sum(im.n for im in self.images)

    def stage(self, layer: int) -> int:
        """The stage that a layer belongs to."""
        return sum(cut < layer for cut in self.schedule.cuts) if self.schedule else 0

    def members(self, stage: int) -> list[int]:
        """The layers of a stage."""
        return [i for i in range(len(self.layers)) if self.stage(i) == stage]

    def held(self, stage: int) -> Array:
        """Visual indices that a stage holds, ascending."""
        at = self.layers[self.members(stage)[0]].visual
        return at[at >= 0]

    def visual(self, positions: Array, images: list[Seen] | None = None) -> Array:
        """The visual indices, of these images alone, among positions."""
        out = [np.zeros(0, np.int64)]
        for im in self.images if images is None else images:
            out.append(im.first + positions[(positions >= im.p0) & (positions < im.p0 + im.n)] - im.p0)
        return np.concatenate(out)

    def add(self, p0: int, n: int, nx: int, ny: int) -> Seen:
        """One more image at the end."""
        number = self.images[-1].number + 1 if self.images else 0
        self.images.append(Seen(self.n_visual, n, nx, ny, p0, number))
        return self.images[-1]

    def keep(self, stage: int, images: list[Seen], stay: Array) -> None:
        """Of these images, leave `stay` alone in a stage."""
        theirs = np.concatenate([np.zeros(0, np.int64), *[im.ids for im in images]])
        for i in self.members(stage):
            at = self.layers[i].visual
            self.layers[i] = self.layers[i].only(~np.isin(at, theirs) | np.isin(at, stay))
