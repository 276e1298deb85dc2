"""What a call did, as numbers. `Report.to_dict()` is the object that `st3-edge ask --json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any


@dataclass(frozen=True)
class Annealing:
    """curve: of st3_edge.config.CURVES; floor: the share of its visual tokens that a stage falls to, over `tokens`
    tokens of the answer; interval: they leave every so many; score: by which they are ranked."""

    curve: str
    tokens: int
    floor: float
    interval: int
    score: str


@dataclass(frozen=True)
class Schedule:
    """preset; cuts: layers after which visual tokens were dropped; counts: for each cut, the tokens that each image
    kept; budget: mean over layers of kept / given; score, coverage, rank: by which they were ranked; merge: whether
    those kept stand for the others; anneal: what left while the answer grew."""

    preset: str
    cuts: list[int]
    counts: list[list[int]]
    budget: float
    score: str
    coverage: float
    merge: bool
    rank: str
    anneal: Annealing


@dataclass(frozen=True)
class VisualTokens:
    """given: visual tokens of all the conversation's images; per_layer: how many each decoder layer holds after
    prefill; held: how many at the end of the answer."""

    given: int
    per_layer: list[int]
    held: list[int]


@dataclass(frozen=True)
class KVBytes:
    """Bytes of the KV cache. live: cells in use; full: what stock would have in use."""

    allocated: int
    live: int
    full: int


@dataclass(frozen=True)
class Flops:
    """Operations of the decoder's prefill, of what was not reused, a multiply and an add counted as 2; prefill_full:
    without pruning."""

    prefill: int
    prefill_full: int


@dataclass
class Milliseconds:
    """Wall time. load: both model files; encode: the vision tower, pictures whose encoding was not kept (0.0: none);
    prefill: what was not reused of the prompt through the decoder; decode: from the first sampled token to the last;
    first_token: from the question to the first token of the answer, with the reading and scaling of pictures, and
    without load."""

    load: float
    encode: float
    prefill: float
    decode: float
    first_token: float = 0.0


@dataclass(frozen=True)
class Trace:
    """prompt_tokens: ids, -1 once for each image; first_logits_top: the ten largest logits after prefill as
    [id, logit]; kept: for each cut, the visual indices kept, over all images of this prefill in order; owners: for each
    cut, and each visual token of this prefill, which one stands for it (-1: none); weights: for each cut, how many
    tokens each of those kept stands for; both are [] where nothing is merged.

    pieces: the answer, token by token; images: visual tokens of each of the conversation's images, in order; left: for
    each stage, and each visual token over these images, after how many tokens of the answer it left the stage's layers
    (0: before the first; -1: they still held it when the last one was chosen)."""

    prompt_tokens: list[int]
    first_logits_top: list[list[float]]
    kept: list[list[int]]
    pieces: list[str]
    images: list[int]
    left: list[list[int]]
    owners: list[list[int]] = field(default_factory=list)
    weights: list[list[int]] = field(default_factory=list)


@dataclass
class Report:
    """answer and finish_reason ("stop" or "length") grow with a streamed answer; n_generated: tokens of the answer;
    mode: "pruned-prefill", "evict-only" or "off"; reason: why not pruned, or None; reused: positions of the prompt that
    were in the cache; kv_bytes: after prefill; kv_bytes_end: at the end of the answer, as visual_tokens.held."""

    answer: str
    finish_reason: str
    n_generated: int
    mode: str
    reason: str | None
    schedule: Schedule
    visual_tokens: VisualTokens
    kv_bytes: KVBytes
    flops: Flops
    ms: Milliseconds
    reused: int
    kv_bytes_end: KVBytes
    trace: Trace | None = None

    @property
    def stages(self) -> list[range]:
        """The decoder layers of each stage."""
        bounds = [0, *(cut + 1 for cut in self.schedule.cuts), len(self.visual_tokens.per_layer)]
        return [range(a, b) for a, b in pairwise(bounds)]

    @classmethod
    def from_native(
        cls, native: dict[str, Any], ms: Milliseconds, reused: int = 0, trace: Trace | None = None
    ) -> Report:
        """A report with no answer yet, from the object of `st3_report` (native/st3.h)."""
        return cls(
            answer="",
            finish_reason="length",
            n_generated=0,
            mode=native["mode"],
            reason=native["reason"],
            schedule=Schedule(
                preset=native["preset"],
                cuts=native["cuts"],
                counts=native["counts"],
                budget=float(native["budget"]),
                score=native["score"],
                coverage=float(native["coverage"]),
                merge=native["merge"],
                rank=native["rank"],
                anneal=Annealing(**native["anneal"]),
            ),
            visual_tokens=VisualTokens(native["given"], native["per_layer"], native["held"]),
            kv_bytes=KVBytes(**native["kv_bytes"]),
            flops=Flops(**native["flops"]),
            ms=ms,
            reused=reused,
            kv_bytes_end=KVBytes(**native["kv_bytes"]),
            trace=trace,
        )

    def end(self, native: dict[str, Any]) -> None:
        """The answer has ended; `native`: `st3_report`'s object now."""
        self.visual_tokens = replace(self.visual_tokens, held=native["held"])
        self.kv_bytes_end = KVBytes(**native["kv_bytes"])

    def summary(self) -> str:
        """One line for a person."""
        kv, ms, given = self.kv_bytes_end, self.ms, self.visual_tokens.given
        kept = {
            "pruned-prefill": f"ST3 kept {self.schedule.budget:.0%} of {given} visual tokens",
            "evict-only": f"{given} visual tokens, dropped only after the prompt was read",
            "off": f"{given} visual tokens, none dropped",
        }[self.mode]
        parts = [f"{kept} ({self.reason})" if self.reason else kept]
        parts += [f"{self.reused} position{'s' * (self.reused != 1)} of the prompt reused"] if self.reused else []
        parts.append(
            f"first token after {ms.first_token:.0f} ms (pictures {ms.encode:.0f}, prompt {ms.prefill:.0f}), "
            f"answer {ms.decode:.0f} ms"
        )
        # The first token took no decode, and the one that ended the answer did.
        n_decoded = self.n_generated - (self.finish_reason == "length")
        if self.n_generated > 1 and ms.decode > 0:
            parts[-1] += f" ({1e3 * n_decoded / ms.decode:.1f} tokens a second)"
        parts.append(f"KV cache {kv.live / 1e6:.1f} MB, {kv.full / 1e6:.1f} MB without ST3")
        return f"[{'; '.join(parts)}]"

    def __str__(self) -> str:
        """A short table for a person."""
        tokens, kv, flops, ms = self.visual_tokens, self.kv_bytes_end, self.flops, self.ms
        first, of_layers = 0, []
        for count, run in groupby(tokens.per_layer):
            last = first + len(list(run)) - 1
            of_layers.append(f"{first}-{last}: {count}" if last > first else f"{first}: {count}")
            first = last + 1
        rows = {
            "answer": f"{self.n_generated} tokens, ended by {self.finish_reason}",
            "mode": f"{self.mode}, preset {self.schedule.preset}" + (f" ({self.reason})" if self.reason else ""),
            "visual tokens": f"{tokens.given}, {self.schedule.budget:.0%} of them kept (mean over layers)"
            if tokens.given
            else "none",
            "by layer": ", ".join(of_layers),
            "prompt reused": f"{self.reused} positions",
            "prefill": f"{flops.prefill / 1e9:.1f} GFLOP of {flops.prefill_full / 1e9:.1f} without ST3",
            "KV cache": f"{kv.live / 1e6:.1f} MB of {kv.full / 1e6:.1f} without ST3",
            "first token": f"{ms.first_token:.0f} ms, of which encode {ms.encode:.0f}, prefill {ms.prefill:.0f}",
            "decode": f"{ms.decode:.0f} ms",
        }
        return "\n".join(f"{name:<13}  {what}".rstrip() for name, what in rows.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; the trace's fields, where there is one, beside the others."""
        plain = asdict(self)
        trace = plain.pop("trace")
        return {**plain, **(trace or {})}


def layers(stage: range) -> str:
    """The layers of a stage, as people say it."""
    return f"layer {stage[0]}" if len(stage) == 1 else f"layers {stage[0]}–{stage[-1]}"
