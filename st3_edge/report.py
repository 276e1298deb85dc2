"""What a call did, as numbers. `Report.to_dict()` is the object that `st3-edge ask --json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """preset; cuts: layers after which visual tokens were dropped; counts: for each cut, the tokens that each image
    kept; budget: mean over layers of kept / given."""

    preset: str
    cuts: list[int]
    counts: list[list[int]]
    budget: float


@dataclass(frozen=True)
class VisualTokens:
    """given: visual tokens of the prompt; per_layer: how many each decoder layer holds after prefill."""

    given: int
    per_layer: list[int]


@dataclass(frozen=True)
class KVBytes:
    """Bytes of the KV cache after prefill. live: cells in use; full: what stock would have in use."""

    allocated: int
    live: int
    full: int


@dataclass(frozen=True)
class Flops:
    """Operations of the decoder's prefill, a multiply and an add counted as 2; prefill_full: without pruning."""

    prefill: int
    prefill_full: int


@dataclass
class Milliseconds:
    """Wall time. load: both model files; encode: the vision tower, all pictures; prefill: the prompt through the
    decoder; decode: from the first sampled token to the last."""

    load: float
    encode: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class Trace:
    """prompt_tokens: ids, -1 once for each image; first_logits_top: the ten largest logits after prefill as
    [id, logit]; kept: for each cut, the visual indices kept, over all images in order."""

    prompt_tokens: list[int]
    first_logits_top: list[list[float]]
    kept: list[list[int]]


@dataclass
class Report:
    """answer and finish_reason ("stop" or "length") grow with a streamed answer; n_generated: tokens of the answer;
    mode: "pruned-prefill", "evict-only" or "off"; reason: why not pruned, or None."""

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
    trace: Trace | None = None

    @classmethod
    def from_native(cls, native: dict[str, Any], ms: Milliseconds, trace: Trace | None = None) -> Report:
        """A report with no answer yet, from the object of `st3_report` (native/st3.h)."""
        return cls(
            answer="",
            finish_reason="length",
            n_generated=0,
            mode=native["mode"],
            reason=native["reason"],
            schedule=Schedule(native["preset"], native["cuts"], native["counts"], float(native["budget"])),
            visual_tokens=VisualTokens(native["given"], native["per_layer"]),
            kv_bytes=KVBytes(**native["kv_bytes"]),
            flops=Flops(**native["flops"]),
            ms=ms,
            trace=trace,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; the trace's fields, where there is one, beside the others."""
        plain = asdict(self)
        trace = plain.pop("trace")
        return {**plain, **(trace or {})}
