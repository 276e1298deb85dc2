"""From raw times and bytes to figures: medians, ratios pair by pair, and what the schedule would allow.

A ratio is above 1 where ST³ is better: stock's by ST³'s for times and bytes, ST³'s by stock's for speeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LENGTHS = (16, 64, 128, 256)
_GAIN_FROM = 1.01  # below, the share of the gain says more about noise

_BEFORE = {"first_token_ms": "first token", "encode_ms": "vision encode", "prefill_ms": "prefill"}
_AFTER = {
    "answer_ms": "whole answer",
    "peak_rss_bytes": "peak memory",
    "kv_allocated_bytes": "KV allocated, prompt",
    "kv_live_bytes": "KV in use, prompt",
    "kv_allocated_end_bytes": "KV allocated, end",
    "kv_live_end_bytes": "KV in use, end",
}


@dataclass(frozen=True)
class Work:
    """What the schedule makes of one request. visual, text: tokens of the prompt; per_layer, held: visual tokens that
    each layer holds after prefill and at the end; live: KV bytes in use after each generated token; weights: bytes of
    them that a token reads; pruned: whether tokens were dropped while the prompt was read, and not only after it."""

    visual: int
    text: int
    per_layer: Sequence[int]
    held: Sequence[int]
    live: Sequence[int]
    weights: int
    pruned: bool = True

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.visual + self.text

    def token_layers(self, visual: Sequence[int], other: int) -> float:
        """(all visual and `other` tokens in each layer) by (`visual` of them and `other` ones)."""
        return len(visual) * (self.visual + other) / (sum(visual) + len(visual) * other)


def lengths(generate: int) -> list[int]:
    """The answer's lengths at which the speed is measured."""
    return [n for n in LENGTHS if n < generate] + [generate]


def metrics(raw: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run; without "encode_ms" where nothing was encoded."""
    steps = raw["steps_ms"]
    speeds = {f"decode_{n}_tps": 1e3 * n / sum(steps[:n]) for n in lengths(len(steps))}
    found = {**raw, **speeds, "answer_ms": raw["first_token_ms"] + sum(steps)}
    return {name: found[name] for name in (*_BEFORE, *speeds, *_AFTER) if name in found}


def summary(pairs: Sequence[Mapping[str, Mapping[str, float]]], work: Work) -> dict[str, dict[str, Any]]:
    """For each metric of `pairs` ({"stock": metrics, "st3": metrics}): [median, min, max] of both sides, `ratio`: the
    median of `ratio_pairs`, `ideal`: the ratio that the schedule allows, `share`: ratio / ideal, and `gain_share`:
    (ratio - 1) / (ideal - 1), None where the ideal is close to 1."""
    if not pairs:
        return {}
    names = list(pairs[0]["stock"])
    values = {name: {side: [pair[side][name] for pair in pairs] for side in ("stock", "st3")} for name in names}
    ideal = ideals({name: statistics.median(values[name]["stock"]) for name in names}, work)
    out = {}
    for name, of_side in values.items():
        ratios = [
            b / a if name.endswith("_tps") else a / b for a, b in zip(of_side["stock"], of_side["st3"], strict=True)
        ]
        ratio = statistics.median(ratios)
        gain = (ratio - 1) / (ideal[name] - 1) if ideal[name] >= _GAIN_FROM else None
        out[name] = {
            **{side: [statistics.median(v), min(v), max(v)] for side, v in of_side.items()},
            "ratio": ratio,
            "ratio_pairs": ratios,
            "ideal": ideal[name],
            "share": ratio / ideal[name],
            "gain_share": gain,
        }
    return out


def first_requests(first: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line about the first requests of processes, of each side."""
    stock, st3 = (statistics.median(run["first_token_ms"] for run in first[side]) for side in ("stock", "st3"))
    name = "first_token_ms"
    return f"the first request of a process: first token {_with_unit(name, stock)}, ST3 {_with_unit(name, st3)}"


def ideals(stock: Mapping[str, float], work: Work) -> dict[str, float]:
    """The ratio that the schedule allows for each metric, given stock's medians.

    The prefill's is by token-layers, the KV cache's by the tokens that layers hold, a decoded token's by the bytes of
    weights and KV that it reads. What the schedule leaves alone (encoding, the rest of a request) takes as long as
    stock's.
    """
    cell = stock["kv_live_bytes"] / work.prompt
    generate = len(work.live)

    def decode(n: int) -> float:
        full = sum(cell * (work.prompt + 1 + i) for i in range(n))
        return (n * work.weights + full) / (n * work.weights + sum(work.live[:n]))

    kv = work.token_layers(work.per_layer, work.text)
    prefill = kv if work.pruned else 1.0
    kv_end = work.token_layers(work.held, work.text + generate)
    first = stock["first_token_ms"] - stock["prefill_ms"] * (1 - 1 / prefill)
    rest = stock["answer_ms"] - stock["first_token_ms"]
    dropped = cell * (work.prompt + generate) - work.live[-1]
    return {
        "encode_ms": 1.0,
        "prefill_ms": prefill,
        "first_token_ms": stock["first_token_ms"] / first,
        **{f"decode_{n}_tps": decode(n) for n in lengths(generate)},
        "answer_ms": stock["answer_ms"] / (first + rest / decode(generate)),
        "peak_rss_bytes": stock["peak_rss_bytes"] / (stock["peak_rss_bytes"] - dropped),
        "kv_allocated_bytes": kv,
        "kv_live_bytes": kv,
        "kv_allocated_end_bytes": kv_end,
        "kv_live_end_bytes": kv_end,
    }


def table(found: Mapping[str, Mapping[str, Any]], against: str) -> list[str]:
    """The summary as lines for a person: medians, ratios with their range, ideal and share. `against`: the other side's
    name ("stock" or "off")."""
    head = f"{'':21}{against:>12}{'ST3':>12}  {'times as good (pairs)':24}{'ideal':>7}{'reached':>9}"
    lines = [head]
    for name, row in found.items():
        stock, st3 = (_with_unit(name, row[side][0]) for side in ("stock", "st3"))
        ratios = f"{row['ratio']:.3f} ({min(row['ratio_pairs']):.3f} to {max(row['ratio_pairs']):.3f})"
        lines.append(f"{label(name):21}{stock:>12}{st3:>12}  {ratios:24}{row['ideal']:7.3f}{row['share']:9.1%}")
    return lines


def label(name: str) -> str:
    """A metric's name for a person."""
    return (_BEFORE | _AFTER).get(name) or f"decode, {name.split('_')[1]} tokens"


def _with_unit(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if name.endswith("_tps"):
        return f"{value:.2f} t/s"
    return f"{value / 1e3:.2f} s" if value >= 1e3 else f"{value:.1f} ms"
