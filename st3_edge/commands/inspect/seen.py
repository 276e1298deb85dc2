"""What was seen of the pictures, layer by layer and token by token, in the numbers that page and figure show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ImageError, ModelError
from ...prompts.images import RGB
from ...report import Report, Trace
from ...runtime.vision import Tile
from .patches import View, views

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Picture:
    """A picture of the question: its name and size in pixels, its visual tokens, and its views; the `tokens` of these
    count over all pictures, from `first` on."""

    name: str
    width: int
    height: int
    first: int
    n: int
    views: list[View]


@dataclass(frozen=True)
class Seen:
    """A question about pictures, and the report of its answer, which has a trace. `unknown`: why it is not known where
    the visual tokens lie; then the pictures have no views."""

    question: str
    pictures: list[Picture]
    report: Report
    model: str
    unknown: str | None = None

    @property
    def trace(self) -> Trace:
        """The report's."""
        assert self.report.trace is not None
        return self.report.trace

    @property
    def given(self) -> int:
        """Visual tokens of all pictures."""
        return sum(self.trace.images)

    @property
    def n_steps(self) -> int:
        """How many times a token of the answer was chosen; once where there is none."""
        return max(1, len(self.trace.pieces))

    @property
    def stages(self) -> list[range]:
        """The layers of each stage."""
        return self.report.stages

    @functools.cached_property
    def left(self) -> npt.NDArray[np.int64]:
        """After how many tokens of the answer each visual token left each stage, int64 [stages][given]; `n_steps` where
        it was held to the end."""
        left = np.array(self.trace.left, np.int64).reshape(len(self.stages), self.given)
        return np.where(left < 0, self.n_steps, np.minimum(left, self.n_steps))

    @functools.cached_property
    def owners(self) -> npt.NDArray[np.int64] | None:
        """Which visual token stands for each in each stage when the answer begins, int64 [stages][given], -1 for none;
        None where nothing was merged."""
        owners = [list(range(self.given)), *self.trace.owners]
        merged = 1 < len(owners) == len(self.stages) and all(len(of) == self.given for of in owners)
        return np.array(owners, np.int64) if merged else None

    @functools.cached_property
    def patches(self) -> dict[int, npt.NDArray[np.uint8]]:
        """The pixels of each visual token's patch, uint8 [patch][patch][3]."""
        return {
            int(token): view.pixels[y * view.patch : (y + 1) * view.patch, x * view.patch : (x + 1) * view.patch]
            for picture in self.pictures
            for view in picture.views
            for (y, x), token in np.ndenumerate(view.tokens)
        }

    def held(self, step: int) -> Mask:
        """Which visual tokens each stage held when the answer's token `step` (from 0) was chosen, bool
        [stages][given]."""
        mask: Mask = self.left > step
        return mask

    def shares(self, step: int) -> npt.NDArray[np.float64]:
        """The share of the layers that held each visual token then, float64 [given]."""
        return np.average(self.held(step), axis=0, weights=[len(stage) for stage in self.stages])

    def share(self, step: int) -> float:
        """Mean over layers of visual tokens held then / given; 1 where none was given."""
        return float(self.shares(step).mean()) if self.given else 1.0

    @property
    def notice(self) -> str | None:
        """What to say where the prompt was not pruned while it was read; None where it was."""
        report = self.report
        why = report.mode + (f": {report.reason}" if report.reason else "")
        if report.mode == "off":
            return f"Not pruned ({why}). Every layer held all visual tokens."
        if report.mode == "evict-only":
            return (
                f"Not pruned while the prompt was read ({why}). Every layer read all visual tokens; what is shown is "
                "what stayed in the KV cache afterwards."
            )
        return None

    def facts(self) -> list[tuple[str, str]]:
        """What was done, as terms and what to say of them."""
        report = self.report
        schedule, anneal, kv = report.schedule, report.schedule.anneal, report.kv_bytes_end
        if report.mode == "off":
            return [("Visual tokens", f"{self.given:,}"), ("Model", self.model)]
        cuts = ", ".join(map(str, schedule.cuts)) or "none"
        over = f"{anneal.curve}, to {anneal.floor:g} of what prefill kept, over {anneal.tokens} tokens"
        return [
            ("Schedule", f"preset {schedule.preset}, cut after layer {cuts}"),
            ("Rank", f"{schedule.rank} {schedule.score or 'none'}, coverage {schedule.coverage:g}"),
            ("Merging", "kept tokens stand for the others" if schedule.merge else "none"),
            ("Annealing", "none" if anneal.curve == "none" else over),
            (
                "Visual tokens",
                f"{self.given:,} given; held, mean over layers: {self.share(0):.0%} when the answer began, "
                f"{self.share(self.n_steps - 1):.0%} at its last token",
            ),
            ("KV cache", f"{kv.live / 1e6:.1f} MB in use at the end, {kv.full / 1e6:.1f} MB without pruning"),
            ("Model", self.model),
        ]


def see(
    question: str,
    sources: Sequence[str],
    pictures: Sequence[RGB],
    tiles: Callable[[RGB], Sequence[Tile]],
    report: Report,
    model: str,
    projector: str,
) -> Seen:
    """Puts together what was asked and what came of it. `sources`: the pictures as they were named; `tiles`: says
    what the vision encoder sees of one; `model`: the text model's path; `projector`: the vision half's."""
    shown, n, unknown = list[Picture](), 0, None
    for source, picture in zip(sources, pictures, strict=True):
        of_picture: Sequence[Tile] = []
        placed: list[View] = []
        try:
            of_picture = tiles(picture)
            placed = [replace(v, tokens=v.tokens + n) for v in views(picture, of_picture, projector)]
        except (ModelError, ImageError) as e:
            unknown = str(e)
        n_picture = sum(tile.n for tile in of_picture)
        shown.append(Picture(_name(source), picture.width, picture.height, n, n_picture, placed))
        n += n_picture
    seen = Seen(question, shown, report, Path(model).name)
    if n != seen.given and not unknown:
        unknown = f"the pictures have {n} visual tokens, and the conversation {seen.given}"
    if unknown:
        seen = replace(seen, pictures=[replace(picture, views=[]) for picture in shown], unknown=unknown)
    return seen


def _name(source: str) -> str:
    return "picture" if source[:5].lower() == "data:" else Path(source).name
