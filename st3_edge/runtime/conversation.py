"""What the KV cache holds of a conversation, how much of it a new prompt can use, and the pictures seen lately.

A prompt, and what the cache holds, is a list of units: text tokens by id, images by the content of their pixels.
Nothing here needs a library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ..native.st3 import Piece, Text, Visual


@dataclass(frozen=True)
class Image:
    """An image in a prompt: the digest of its pixels (`RGB.digest`), which of the picture's chunks it is (0 for
    LLaVA-1.5, whose pictures are one), its visual tokens, and how many positions they take if not as many (M-RoPE: the
    longer side of the patch grid)."""

    digest: str
    part: int
    n: int
    n_pos: int | None = None

    @property
    def n_positions(self) -> int:
        return self.n if self.n_pos is None else self.n_pos


Unit = int | Image


@dataclass(frozen=True)
class Span:
    """Units [first, end) of a prefill that dropped visual tokens; `first` is its first image. What was kept was chosen
    by the text up to `end`, so a prompt that differs before it cannot use these images."""

    first: int
    end: int


def n_tokens(units: Sequence[Unit]) -> int:
    """The cells of the KV cache that units take."""
    return sum(unit.n if isinstance(unit, Image) else 1 for unit in units)


def n_positions(units: Sequence[Unit]) -> int:
    """The positions of a sequence that units take."""
    return sum(unit.n_positions if isinstance(unit, Image) else 1 for unit in units)


def pieces_of(units: Sequence[Unit], visual: Sequence[Visual]) -> list[Piece]:
    """Units as `st3.prefill` takes them: runs of text, and between them images, of which `visual` has one for each
    among the units. Tiles of one picture with nothing between are one image, as they are for mtmd's helper (st3.h,
    st3_announce_image)."""
    pieces: list[Piece] = []
    text: list[int] = []
    before: Unit | None = None
    seen = iter(visual)
    for unit in (*units, None):
        if isinstance(unit, int):
            text.append(unit)
        elif text:
            pieces.append(Text(np.array(text, np.int32)))
            text = []
        if isinstance(unit, Image):
            last = pieces[-1] if isinstance(before, Image) and before.digest == unit.digest else None
            piece = next(seen)
            joins = isinstance(before, Image) and before.part + 1 == unit.part and not piece.non_causal
            if isinstance(last, Visual) and joins:
                pieces[-1] = last.above(piece)
            else:
                pieces.append(piece)
        before = unit
    return pieces


def common_prefix(cached: Sequence[Unit], prompt: Sequence[Unit]) -> int:
    """How many units both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(cached, prompt, strict=False)) if a != b), min(len(cached), len(prompt))
    )


def reusable(cached: Sequence[Unit], prompt: Sequence[Unit], spans: Sequence[Span], *, revisit: str) -> int:
    """How many units of `prompt` need no prefill; less than all of them, because the last one gives the logits. No span
    is used in part: a question that is asked again prunes its images again.

    revisit   "never": images stay as the first question that saw them left them; "turn": `prompt` is asked of the whole
              pictures, so nothing from the first image on is used
    """
    usable = min(common_prefix(cached, prompt), len(prompt) - 1)
    for span in spans:
        if span.end > usable or revisit == "turn":
            usable = min(usable, span.first)
    return usable


class Record(NamedTuple):
    """One value, so that an interrupt finds all of it old or all of it new."""

    units: tuple[Unit, ...] = ()
    spans: tuple[Span, ...] = ()
    n_positions: int = 0


class Conversation:
    """What sequence 0 holds, on record.

    `remove(p0)` frees the sequence's positions from p0 on; it returns False where the memory can forget whole
    sequences only. Whatever is interrupted, the sequence never holds less than the record says, and what it holds
    beyond is removed before it is used again.
    """

    def __init__(self, remove: Callable[[int], bool]) -> None:
        self.record = Record()
        self._remove = remove

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.record.units

    @property
    def n_positions(self) -> int:
        return self.record.n_positions

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache that all of it takes where no visual token left."""
        return n_tokens(self.units)

    @property
    def n_visual(self) -> int:
        """Visual tokens given, over all images held."""
        return sum(unit.n for unit in self.units if isinstance(unit, Image))

    def cut(self, n: int) -> int:
        """Keeps the first `n` units, and of the sequence what the record says. Returns how many are left: `n`, or 0
        where the memory cannot forget a part."""
        units = self.units[:n]
        self.record = Record(units, tuple(s for s in self.record.spans if s.end <= n), n_positions(units))
        if not self._remove(self.n_positions):
            self.record = Record()
            self._remove(0)
        return len(self.units)

    @contextmanager
    def adding(self, units: Sequence[Unit], pruned: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Around the native call that adds `units` to the sequence: if it fails, nothing of them stays.

        `pruned`: asked afterwards whether visual tokens are dropped.
        """
        held = self.record
        begin = len(held.units)
        try:
            yield
            first = next((begin + i for i, unit in enumerate(units) if isinstance(unit, Image)), None)
            spans = held.spans
            if first is not None and pruned():
                spans += (Span(first, begin + len(units)),)
            self.record = Record((*held.units, *units), spans, held.n_positions + n_positions(units))
        except BaseException:
            self.cut(begin)
            raise

    def replace(self, record: Record, load: Callable[[], bool]) -> bool:
        """Makes the sequence what `record` says, by `load`. Where that fails (False, or an exception) it is empty."""
        self.cut(0)
        try:
            loaded = load()
            if loaded:
                self.record = record
        finally:
            if self.record is not record:
                self.cut(0)
        return loaded


class Store(Protocol):
    """What keeps visual tokens beyond the process."""

    def get(self, image: Image) -> Visual | None: ...

    def put(self, image: Image, visual: Visual) -> None: ...


class Embeddings:
    """Visual tokens by image. Those used longest ago are forgotten when all take more than `max_bytes`; `store`, if
    there is one, has them longer."""

    def __init__(self, max_bytes: int, store: Store | None = None) -> None:
        self._max_bytes, self._store = max_bytes, store
        self._held: OrderedDict[Image, Visual] = OrderedDict()

    def get(self, image: Image) -> Visual | None:
        visual = self._held.get(image)
        if visual is not None:
            self._held.move_to_end(image)
        elif self._store and (visual := self._store.get(image)):
            self._hold(image, visual)
        return visual

    def put(self, image: Image, visual: Visual) -> None:
        if self._store:
            self._store.put(image, visual)
        self._hold(image, visual)

    def _hold(self, image: Image, visual: Visual) -> None:
        self._held[image] = visual
        self._held.move_to_end(image)
        n_bytes = sum(v.embd.nbytes for v in self._held.values())
        while n_bytes > self._max_bytes:
            _, oldest = self._held.popitem(last=False)
            n_bytes -= oldest.embd.nbytes
