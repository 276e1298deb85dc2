"""A conversation with native code and the oracle's beside it.

Native code goes first; the oracle then follows the tokens that it holds, and says for each choice what it would have
chosen itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from cases import SEED
from native_runtime import Context, Image
from oracle import gemma3, mrope
from oracle import llama as oracle
from oracle.schedule import Schedule

NEAR_TIE = 1e-4
# NMSE of logits by the cache's type, some four times the worst seen. It is more if a step does not see a kept cell.
MOST_ERROR = {"F16": 5e-6, "Q8_0": 6e-5}
MOST_ERROR_LONG = {"F16": 2e-4, "Q8_0": 6e-5}  # of 600 cells and more: an F16 cache has its values summed in F16
MOST_ERROR_BYTES = {"F16": 6e-4}  # where weights are quantized: what they are multiplied by is rounded to a byte
# Share of the choices that may be excused, by how far logits may be off: some twice the most seen.
EXCUSED = ((1e-5, 0.05), (1e-4, 0.1), (np.inf, 0.3))
AGAIN = 12  # runs with noise, at most
OPEN = "conversations that were not closed"  # a word of the tally


@lru_cache(maxsize=8)
def of_file(path: Path) -> oracle.Decoder:
    """The oracle of a file."""
    return next((m for m in (mrope, gemma3) if m.is_for(path)), oracle).Decoder(path)


def decoder(source: Path | oracle.Decoder) -> oracle.Decoder:
    """The oracle of a file, or itself."""
    return source if isinstance(source, oracle.Decoder) else of_file(source)


def native(pieces: list[oracle.Piece]) -> list:
    """The oracle's pieces as the runtime's."""
    return [Image(p.embd, p.nx, p.ny) if isinstance(p, oracle.Image) else p for p in pieces]


@dataclass(frozen=True)
class Turn:
    """What was decoded ("prefill", "text", "picture", "step", or "silent": text without an output), the positions that
    each stage held afterwards with their weights, and where tokens were merged the owners after each cut."""

    kind: str
    what: object
    held: list[np.ndarray] | None = None
    owners: list[np.ndarray] | None = None
    weights: list[np.ndarray] | None = None
    scoring: int | None = None  # rows of the last ubatch of several


@dataclass
class Conversation:
    """A native sequence and the oracle's. `tally` counts choices and doubts under `name`.

    Every method decodes one batch and asserts: all layers of a stage hold the same, text is complete, counts are the
    schedule's, logits are the oracle's. A choice that the oracle does not share is a doubt, which `close` settles:
    a test that does not call it fails (the fixture `tally`).
    """

    ctx: Context
    path: Path | oracle.Decoder
    schedule: Schedule
    kv: str
    tally: dict[str, int]
    name: str = "annealing"
    seq: int = 0
    turns: list[Turn] = field(default_factory=list)
    doubts: dict[tuple[int, int], tuple[float, oracle.Cut]] = field(default_factory=dict)  # turn, stage: margin, choice
    choices: int = 0  # that could have been others
    worst: float = 0.0
    most_error: dict[str, float] = field(default_factory=lambda: MOST_ERROR)

    def __post_init__(self) -> None:
        self.result = decoder(self.path).begin(self.schedule)
        self.tally[OPEN] = self.tally.get(OPEN, 0) + 1

    @property
    def at(self) -> int:
        """The next position."""
        return self.result.n_pos

    def prefill(self, pieces: list[oracle.Piece]) -> None:
        """A pruned prompt."""
        assert self.ctx.prefill(native(pieces), p0=self.at, seq=self.seq) == 0, self.ctx.rt.last_error()
        self.follow("prefill", pieces)

    def text(self, tokens: list[int]) -> None:
        """A batch of several tokens, the last one with logits: a question."""
        assert self.ctx.decode(tokens, self.at, seq=self.seq) == 0
        self.follow("text", tokens)

    def picture(self, image: oracle.Image, announce: int | None = None) -> None:
        """A batch of embeddings that is computed at once, since an output is asked for. announce: tokens of the image
        whose first part it is; 0: it goes on with one."""
        if announce is None:
            self.ctx.announce(len(image.embd), image.nx, image.ny)
        elif announce:
            self.ctx.announce(announce)
        assert self.ctx.decode(image.embd, self.at, outputs="last", seq=self.seq) == 0
        self.follow("picture", image)

    def step(self, token: int) -> None:
        """A generated token."""
        assert self.ctx.decode([token], self.at, seq=self.seq) == 0
        self.follow("step", token)

    def before(self, kind: str, what: object) -> None:
        """Let the oracle follow what native code decoded, and more behind it: there is nothing left to compare."""
        self.turns.append(Turn(kind, what))
        run(decoder(self.path), self.result, self.turns[-1], self.kv)

    def follow(self, kind: str, what: object, check_logits: bool | None = None, scoring: int | None = None) -> None:
        """Let the oracle follow a batch that native code has decoded already. scoring: rows of its last ubatch."""
        stages = [self.result.members(s)[0] for s in range(len(self.schedule.cuts) + 1)]
        images = kind == "prefill" and any(isinstance(piece, oracle.Image) for piece in what)
        owners = self.ctx.owners(len(self.schedule.cuts)) if images and self.schedule.merge else None
        weights = [self.ctx.weights(layer, self.seq) for layer in stages]
        held = [self.ctx.held(layer, self.seq) for layer in stages]
        self.turns.append(Turn(kind, what, held, owners, weights, scoring))
        for stage, cut in run(decoder(self.path), self.result, self.turns[-1], self.kv).items():
            if len(cut.kept) < len(cut.left):
                self.choices += 1
                self.count("choices")
            margin = cut.margin(self._got(self.result, stage, cut, self.turns[-1]))
            assert margin < np.inf, f"{kind} {len(self.turns)}, stage {stage}: {self._difference(stage, cut)}"
            if margin > 0:
                self.doubts[len(self.turns) - 1, stage] = margin, cut
            check_owners(cut, self.tally, weights[stage])
        for i, layer in enumerate(self.result.layers):
            held = self.ctx.held(i, self.seq)
            assert np.array_equal(held, np.sort(layer.pos)), f"{kind} {len(self.turns)}, layer {i}: {held}"
            weights = self.ctx.weights(i, self.seq)
            assert np.array_equal(weights, layer.weight[np.argsort(layer.pos)]), f"{kind} {len(self.turns)}, layer {i}"
            for im in self.result.images if self.schedule.merge else []:
                stands_for = layer.weight[np.isin(layer.visual, im.ids)].sum()
                assert stands_for in (0, im.n), f"{kind} {len(self.turns)}, layer {i}: {stands_for} of {im.n}"
        if kind != "picture" if check_logits is None else check_logits:
            error = oracle.nmse(self.ctx.logits(), self.result.logits)
            self.worst = max(self.worst, error)
            assert error <= self.most_error[self.kv], f"{kind} {len(self.turns)}: NMSE {error:.1e}"

    @staticmethod
    def _got(result: oracle.Result, stage: int, cut: oracle.Cut, turn: Turn) -> np.ndarray:
        images = [im for im in result.images if np.isin(im.ids, cut.left).any()]
        return result.visual(turn.held[stage], images)

    def _difference(self, stage: int, cut: oracle.Cut) -> str:
        got = self._got(self.result, stage, cut, self.turns[-1])
        return f"{len(cut.left)} before, kept {got.tolist()}, oracle {cut.kept.tolist()}"

    def count(self, word: str, n: int = 1) -> None:
        """Add to the tally."""
        key = f"{self.name} {word}"
        self.tally[key] = self.tally.get(key, 0) + n

    def close(self) -> None:
        """Settle the doubts: each must be a near-tie, or be decided by what a cache's type rounds.

        A quantized cache turns the last bit of a number into a step of its code; an F16 cache has values summed in F16,
        in the order of its cells. So the oracle computes again, as inexactly as floats may (`Decoder.noise`), and says
        how far that moves the scores in question: a gap of at most twice that is no difference, and counted apart.
        Of many choices few may be excused in either way.
        """
        self.tally[OPEN] -= 1
        self.count("conversations")
        worst = f"{self.name} {self.kv} worst logits NMSE x 1e-9"
        self.tally[worst] = max(self.tally.get(worst, 0), round(self.worst * 1e9))
        doubts = {at: cut for at, (margin, cut) in self.doubts.items() if margin >= NEAR_TIE}
        self.count("near-ties", len(self.doubts) - len(doubts))
        self.count("choices decided by rounding", len(doubts))
        for n in range(AGAIN if doubts else 0):
            self._settle_by_rounding(doubts, np.random.default_rng([SEED, n]))
        left = {at: self.doubts[at][0] for at in doubts}
        assert not left, f"(turn, stage): margin of choices that the oracle does not share: {left}"
        most = max(1, self.choices * next(share for error, share in EXCUSED if self.most_error[self.kv] < error))
        assert len(self.doubts) <= most, f"{len(self.doubts)} of {self.choices} choices are excused"

    def _settle_by_rounding(self, doubts: dict[tuple[int, int], oracle.Cut], rng: np.random.Generator) -> None:
        dec = decoder(self.path)
        result, dec.noise = dec.begin(self.schedule), rng
        try:
            for i, turn in enumerate(self.turns[: 1 + max((turn for turn, _ in doubts), default=-1)]):
                for stage, cut in run(dec, result, turn, self.kv).items():
                    first = doubts.get((i, stage))
                    if first and first.is_rounding(cut, self._got(result, stage, first, turn)):
                        del doubts[i, stage]
        finally:
            dec.noise = None


def check_owners(cut: oracle.Cut, tally: dict[str, int], weights: np.ndarray | None = None) -> None:
    """The owners that native code chose at a cut are the oracle's, or all but as similar."""
    if cut.gap is None:
        return
    if cut.weight is not None:
        moved = int(np.abs(cut.weight - weights[: len(cut.weight)]).sum() / 2)
        assert moved <= cut.close.sum(), f"tokens that stood for {moved} have another owner"
        tally["weights moved after the compute"] = tally.get("weights moved after the compute", 0) + moved
    others = cut.gap > 0
    too_far = f"owners of {cut.left[others]}, cosines off by {cut.gap[others]}"
    assert cut.gap.max(initial=0.0) < oracle.SAME_OWNER, too_far
    for word, n in (("owners", len(others)), ("owners that all but tie", others.sum())):
        tally[word] = tally.get(word, 0) + int(n)
    worst = "worst gap of owners x 1e-9"
    tally[worst] = max(tally.get(worst, 0), round(1e9 * cut.gap.max(initial=0.0)))


def run(dec: oracle.Decoder, result: oracle.Result, turn: Turn, kv: str) -> dict[int, oracle.Cut]:
    """Let the oracle follow a turn; returns the choice that it had in each stage."""
    if turn.kind == "step":
        dec.step(result, turn.what, kv, turn.held, turn.weights)
        return dict(enumerate(result.steps))
    if turn.kind == "picture":
        dec.picture(result, turn.what, kv)
    elif turn.kind in ("text", "silent"):
        dec.text(result, turn.what, kv, turn.held, turn.weights, turn.kind == "text", turn.scoring)
    else:
        dec.prefill(turn.what, kv=kv, follow=turn.held, result=result, owners=turn.owners)
    return dict(enumerate(result.cuts, 1))
