"""What scripts/quality.py measures: a model's answers about held-out scenes under one configuration.

Scenes come in chunks. A chunk's pictures are encoded once and kept on disk; all configurations share them.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import native_runtime
import native_vision
import numpy as np
from quality_subjects import Fact, Subject

from st3_edge import divergence
from st3_edge.native import st3

FACT_TOKENS, CAPTION_TOKENS, LONG_TOKENS = 10, 130, 512
LONG = (128, 256)  # generated tokens: where `early`, `middle` and `late` descriptions begin
CHUNK = 20  # scenes of one task
BANDS = "bands"  # a key of a configuration beside the st3.* ones: in how many images a picture is given

Keys = dict[str, native_runtime.Value]
Asked = tuple[str, list[int] | None]  # a question, and the answer that stands in for the model's own, if any
Turn = tuple[str, list[int], list[np.ndarray]]  # a question, its answer's tokens, the logits of each and of the end


@dataclass(frozen=True)
class Job:
    """What a worker needs besides a task."""

    subject: Subject
    embeddings: Path  # folder
    threads: int = 1


@dataclass(frozen=True)
class Task:
    """Scenes of a style under a configuration, and what is measured (quality_grids.Grid.measures)."""

    style: str
    name: str
    keys: Keys
    indices: range
    measures: tuple[str, ...]


class Reader:
    """Greedy answers of one configuration."""

    def __init__(self, rt: native_runtime.Runtime, job: Job, keys: Keys) -> None:
        keys = dict(keys)
        self.bands = int(keys.pop(BANDS, 1))
        self.subject = job.subject
        self.model = native_runtime.Model(rt, job.subject.files[0], keys)
        self.ctx = native_runtime.Context(self.model, n_ctx=1024, threads=job.threads)
        L = rt.llama
        self.before = [*self.model.bos(), *self.model.tokenize(self.subject.before)]
        self.eos = L.llama_vocab_eos(self.model.vocab)

    def prompt(self, embd: np.ndarray, question: str) -> list[st3.Piece]:
        """The prompt of a question about one image, float32 [576, width], given as so many images of whole rows."""
        after = np.array(self.after(question))
        bands = [st3.Visual(part, 24, 24 // self.bands) for part in np.split(embd, self.bands)]
        return [st3.Text(np.array(self.before)), *bands, st3.Text(after)]

    def after(self, question: str) -> list[int]:
        """What follows the image in a prompt."""
        return self.model.tokenize(self.subject.after(question))

    def ask(self, embd: np.ndarray, question: str) -> None:
        """Read the prompt of a question about one image. Raises SystemExit where that fails."""
        self.ctx.clear()
        code = st3.prefill(self.ctx.ptr, 0, self.prompt(embd, question))
        if code:
            raise SystemExit(f"prefill failed ({code}): {st3.last_error()}")

    def ask_more(self, question: str) -> None:
        """Read a question that follows the last answer: the picture stays as that left it."""
        self._decode([self.eos, *self.model.tokenize(self.subject.again(question))])

    def ask_anew(self, question: str) -> None:
        """Take all text after the image back, and read a question there: the picture stays as the answers left it."""
        if not self.ctx.seq_rm(0, len(self.before) + 576, -1):
            raise SystemExit("the text cannot be removed")
        self._decode(self.after(question))

    def say(self, limit: int, given: list[int] | None = None) -> tuple[list[int], list[np.ndarray]]:
        """The tokens of the answer, or of the one given, and the logits that each of them and the end are chosen by."""
        said: list[int] = []
        rows = []
        while True:
            rows.append(self.ctx.logits())
            token = int(np.argmax(rows[-1])) if given is None else [*given, self.eos][len(said)]
            if token == self.eos or len(said) == limit:
                return said, rows
            said.append(token)
            self._decode([token])  # one by one: annealing counts such steps

    def talk(self, embd: np.ndarray, asked: Iterable[Asked], forgets: bool = False) -> Iterator[Turn]:
        """A conversation about one image. If it `forgets`, each question comes without what was said before."""
        for turn, (question, given) in enumerate(asked):
            if not turn:
                self.ask(embd, question)
            elif forgets:
                self.ask_anew(question)
            else:
                self.ask_more(question)
            limit = CAPTION_TOKENS if question in self.subject.captions else FACT_TOKENS
            yield question, *self.say(limit, given)

    def _decode(self, tokens: list[int]) -> None:
        if self.ctx.decode(tokens, st3.n_positions(self.ctx.ptr)):
            raise SystemExit(f"decode failed: {''.join(self.ctx.rt.log)}")

    def held(self) -> float:
        """Share of the last image's visual tokens that are in the cache now, mean over layers; 1 when off."""
        report = self.ctx.report()
        return float(np.mean(report["held"]) / report["given"]) if report.get("held") and report["given"] else 1.0

    def close(self) -> None:
        """Free context and model."""
        self.ctx.close()
        self.model.close()


_worker: tuple[native_runtime.Runtime, Job] | None = None


def start_worker(job: Job) -> None:
    """Load the libraries once a process."""
    global _worker
    _worker = native_runtime.Runtime(native_runtime.built()), job


@functools.lru_cache(maxsize=1)
def pictures(style: str, indices: range) -> np.ndarray:
    """The embeddings of some scenes, float32 [len(indices), 576, width]: from the disk, or encoded and written."""
    assert _worker is not None
    rt, job = _worker
    file = job.embeddings / f"{style}-{indices.start}-{len(indices)}.npy"
    if not file.is_file():
        text, mmproj = job.subject.files
        with native_runtime.Model(rt, text) as model:
            vision = native_vision.Vision(model, mmproj, job.threads)
            embd = [vision.encode(job.subject.image(style, i)).embd for i in indices]
            vision.close()
        part = file.with_suffix(f".{os.getpid()}")
        with part.open("wb") as f:
            np.save(f, np.stack(embd).astype(np.float32))
        part.replace(file)
    out: np.ndarray = np.load(file)
    return out


def described(measures: tuple[str, ...], i: int, of_five: int) -> bool:
    """Whether scene i is described: so many of five, or each."""
    return "every caption" in measures or ("captions" in measures and i % 5 < of_five)


def converse(reader: Reader, embd: np.ndarray, style: str, i: int) -> Iterator[Turn]:
    """Descriptions of scene i and single facts by turns, until enough is generated. These models were never taught to
    describe after another answer, so each question comes without what was said before."""
    subject = reader.subject
    facts = subject.all_facts(style, i) or subject.all_facts(style, 0)
    pairs = zip(cycle(subject.captions), cycle(facts), strict=False)
    asked = ((question, None) for words, q in pairs for question in (words, q.text))
    left = LONG_TOKENS
    for turn in reader.talk(embd, asked, forgets=True):
        yield turn
        left -= len(turn[2])
        if left <= 0:
            return


@functools.lru_cache(maxsize=1)
def full_answers(style: str, indices: range, measures: tuple[str, ...]) -> dict[int, list[tuple[str, list[Turn]]]]:
    """What the full model says, by scene: for each measure a conversation."""
    assert _worker is not None
    rt, job = _worker
    reader = Reader(rt, job, {})
    out: dict[int, list[tuple[str, list[Turn]]]] = {}
    for i, embd in zip(indices, pictures(style, indices), strict=True):
        talks = []
        if "kl" in measures and i % 5 == 0:
            talks += [("kl facts", list(reader.talk(embd, [(q.text, None)]))) for q in job.subject.facts(style, i)]
        if "kl" in measures and i % 25 == 0:
            talks.append(("kl captions", list(reader.talk(embd, [(job.subject.captions[0], None)]))))
        if "long" in measures:
            talks.append(("kl long", list(converse(reader, embd, style, i))))
        out[i] = talks
    reader.close()
    return out


def run(task: Task) -> tuple[Task, list[dict]]:
    """Answer every question about the scenes of one task."""
    assert _worker is not None
    rt, job = _worker
    style, keys, measures = task.style, task.keys, task.measures
    by_lot = "random" in (keys.get("st3.preset"), keys.get("st3.anneal_score"))
    full = full_answers(style, task.indices, measures)
    reader = Reader(rt, job, keys)
    out = []
    for i, embd in zip(task.indices, pictures(style, task.indices), strict=True):
        if by_lot:  # a draw for each scene: intervals take scenes as independent
            reader.close()
            reader = Reader(rt, job, {**keys, "st3.seed": zlib.crc32(f"{style} {i}".encode())})
        row: dict = {"scene": i, "measures": measures}

        def right(*asked: Fact, reader: Reader = reader, embd: np.ndarray = embd) -> bool:
            """Whether the last of some questions is answered right."""
            *_, (_, tokens, _) = reader.talk(embd, [(q.text, None) for q in asked])
            return job.subject.right(reader.model.text(tokens), asked[-1].answer)

        if "facts" in measures:
            row["facts"] = [(q.kind, right(q)) for q in job.subject.facts(style, i)]
        if described(measures, i, job.subject.described):
            ((_, tokens, _),) = reader.talk(embd, [(job.subject.captions[0], None)])
            row |= {
                "objects": objects(reader, tokens, style, i),
                "tokens": len(tokens),
                "held": round(reader.held(), 4),
            }
        pair = job.subject.pair(style, i) if "second" in measures and i % 4 == 1 else None
        if pair:
            row["second"] = int(right(*pair)), 1
        if "long" in measures:
            generated = 0
            for question, tokens, rows in converse(reader, embd, style, i):
                if question in job.subject.captions:
                    when = ("early", "middle", "late")[sum(generated >= n for n in LONG)]
                    row.setdefault(when, []).append(objects(reader, tokens, style, i))
                generated += len(rows)
            row["held"] = round(reader.held(), 4)
        for measure, turns in full.get(i, []):
            asked = [(question, tokens) for question, tokens, _ in turns]
            theirs = reader.talk(embd, asked, forgets=measure == "kl long")
            nats = np.concatenate(
                [
                    divergence.kl_divergence(np.stack(mine), np.stack(seen))
                    for (_, _, mine), (_, _, seen) in zip(turns, theirs, strict=True)
                ]
            )
            parts = {measure: nats} if measure != "kl long" else {"kl 256": nats[:256], "kl 512": nats[256:512]}
            for k, v in parts.items():
                nats_before, tokens_before = row.get(k, (0.0, 0))
                row[k] = nats_before + float(v.sum()), tokens_before + len(v)
        out.append(row)
    report = reader.ctx.report()
    reader.close()
    schedule = ("mode", "cuts", "counts", "budget", "keep", "anneal", "merge", "rank")
    out[0]["schedule"] = {k: report[k] for k in schedule if k in report}
    return task, out


def objects(reader: Reader, tokens: list[int], style: str, i: int) -> tuple[int, int, int]:
    """What a description gets right, names and should name."""
    return reader.subject.objects(reader.model.text(tokens), style, i)
