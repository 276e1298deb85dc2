"""Measures candidates prompt by prompt, and keeps what it measured in a folder, so that nothing is measured twice."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ... import divergence
from ...config import Override
from ...errors import St3Error
from ...files.output import replacing
from .search import Candidate

Overrides = Mapping[str, Override]


@dataclass(frozen=True)
class Measured:
    """One prompt under one schedule. kl: mean over the answer's positions of KL(full || pruned), nats; n: positions;
    same: of them, where the likeliest token is the same; flops, flops_full: of the prefill, pruned and not."""

    kl: float
    n: int
    same: int
    flops: int
    flops_full: int


@dataclass(frozen=True)
class Evaluation:
    """A candidate on those of n_prompts prompts, by index, that it was measured on."""

    candidate: Candidate
    n_prompts: int
    measured: Mapping[int, Measured]

    @property
    def complete(self) -> bool:
        return len(self.measured) == self.n_prompts

    @property
    def kl(self) -> float:
        """Mean over prompts; at least this where not all were measured, as KL is never negative."""
        return sum(m.kl for m in self.measured.values()) / self.n_prompts

    @property
    def cost(self) -> float:
        """Prefill FLOPs relative to the full model's."""
        return sum(m.flops for m in self.measured.values()) / sum(m.flops_full for m in self.measured.values())

    @property
    def interval(self) -> tuple[float, float]:
        """Bootstrap 95 % interval of `kl`, over prompts."""
        return divergence.bootstrap_interval([self.measured[i].kl for i in sorted(self.measured)])

    @property
    def same_top(self) -> float:
        """Share of positions with the same likeliest token."""
        return sum(m.same for m in self.measured.values()) / sum(m.n for m in self.measured.values())

    @property
    def worst(self) -> int:
        """The prompt with the highest KL."""
        return max(self.measured, key=lambda i: self.measured[i].kl)


class Work:
    """What is known of one model on one list of prompts: a folder, made where it is missing.

    results.jsonl   one line for each prompt under each schedule
    answer-N.npz    the full model's answer to prompt N: tokens int64 [n], logits float32 [n][n_vocab]

    Raises St3Error where the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines = folder, folder / "results.jsonl"
        self._known: dict[tuple[str, int], Measured] = {}
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)
            text = self._lines.read_text(encoding="utf-8", errors="replace") if self._lines.exists() else ""
            if text and not text.endswith("\n"):
                self._append("\n")  # the last line was cut off, and the next one must not become its end
        for line in text.splitlines():
            row = _read_row(line)
            if row:
                self._known[row[0]] = row[1]

    def get(self, overrides: Overrides, prompt: int) -> Measured | None:
        return self._known.get((_key(overrides), prompt))

    def put(self, overrides: Overrides, prompt: int, measured: Measured) -> None:
        self._known[_key(overrides), prompt] = measured
        with self._guarded():
            self._append(
                json.dumps({"schedule": dict(overrides), "prompt": prompt, **asdict(measured)}, sort_keys=True) + "\n"
            )

    def answer(self, prompt: int) -> tuple[list[int], divergence.Logits] | None:
        path = self._folder / f"answer-{prompt}.npz"
        with self._guarded():
            if not path.exists():
                return None
            with np.load(path) as arrays:
                return arrays["tokens"].tolist(), arrays["logits"]

    def put_answer(self, prompt: int, tokens: Sequence[int], logits: divergence.Logits) -> None:
        with self._guarded(), replacing(self._folder / f"answer-{prompt}.npz") as file:
            np.savez(file, tokens=np.array(tokens, np.int64), logits=logits)

    def _append(self, text: str) -> None:
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(text)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:  # a full disk, or a damaged answer
            reason = getattr(e, "strerror", None) or e
            raise St3Error(f"the work folder {str(self._folder)!r} cannot be used, or is damaged: {reason}") from e


def _key(overrides: Overrides) -> str:
    return json.dumps(dict(overrides), sort_keys=True)


def _read_row(line: str) -> tuple[tuple[str, int], Measured] | None:
    """A line of results.jsonl; None where it is none, as the last one that was written when the power went."""
    try:
        row = json.loads(line)
        key = _key(row.pop("schedule")), int(row.pop("prompt"))
        measured = Measured(**row)
        fine = math.isfinite(measured.kl) and measured.kl >= 0 and 0 <= measured.same <= measured.n
        return (key, measured) if fine and measured.n > 0 < measured.flops_full else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Evaluator:
    """Measures candidates. `results` holds an Evaluation of each one asked for.

    overrides   the `st3.*` keys of a candidate
    opened      with those keys, opens the model and gives the function that measures a prompt under them
    tell        called with a candidate and how many prompts of it are done before each that is measured; what it raises
                ends the evaluation
    """

    def __init__(
        self,
        work: Work,
        n_prompts: int,
        overrides: Callable[[Candidate], Overrides],
        opened: Callable[[Overrides], AbstractContextManager[Callable[[int], Measured]]],
        tell: Callable[[Candidate, int], None] = lambda *_: None,
    ) -> None:
        self.results: list[Evaluation] = []
        self._work, self._n_prompts, self._overrides, self._opened = work, n_prompts, overrides, opened
        self._tell = tell
        self._hard = [0.0] * n_prompts

    def __call__(self, candidate: Candidate, limit: float | None = None) -> Evaluation:
        """Measures all prompts, those first that were the farthest away so far; with `limit` only until their mean is
        certain to be over it: KL is never negative, so the prompts that are left cannot bring it down."""
        keys = self._overrides(candidate)
        measured: dict[int, Measured] = {}
        result = Evaluation(candidate, self._n_prompts, measured)
        with ExitStack() as stack:
            measure = None
            for i in sorted(range(self._n_prompts), key=lambda i: -self._hard[i]):
                found = self._work.get(keys, i)
                if found is None:
                    self._tell(candidate, len(measured))
                    measure = measure or stack.enter_context(self._opened(keys))
                    found = measure(i)
                    self._work.put(keys, i, found)
                measured[i] = found
                if limit is not None and result.kl > limit:
                    break
        if result.complete:
            self._hard = [kl + measured[i].kl for i, kl in enumerate(self._hard)]
        self.results.append(result)
        return result
