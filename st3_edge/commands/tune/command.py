"""What `st3-edge tune` does, and what it shows."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...config import Override, ST3Config
from ...errors import ConfigError, ModelError, St3Error
from ...files import gguf, gguf_copy
from ...files.output import cache_folder, check_output
from ...files.pair import check_pair
from ...native import libraries
from ...prompts import images
from ...runtime import state
from .. import options, which
from ..console import INTERRUPTED, Console, run
from . import search
from .evaluate import Evaluation, Evaluator, Work
from .prompts import QUESTIONS, Question, choose, pictures_in, read_questions
from .search import Candidate, Shape
from .subject import Prompt, Subject


class Interrupted(Exception):
    """Ctrl-C, at a place where nothing is half done."""


class Space(NamedTuple):
    """What is searched. config: what is not, the same in all candidates; carried: the file's own `st3.*` keys."""

    shapes: list[Shape]
    n_layer: int
    config: ST3Config
    carried: Mapping[str, Override]

    def overrides(self, candidate: Candidate) -> dict[str, Override]:
        """The `st3.*` keys of a candidate."""
        return replace(self.config, **candidate._asdict()).overrides(self.carried)

    @property
    def min_share(self) -> float:
        """Of an image's visual tokens, stays in every layer in any case."""
        value = {**self.carried, **self.config.overrides(self.carried)}.get("st3.min_share", 0.0)
        return float(value) if isinstance(value, (int, float)) else 0.0


class Task(NamedTuple):
    """What the command was asked for, checked; words: the options that choose the model; output: None where no file is
    to be written."""

    model: str
    mmproj: str
    words: list[str]
    space: Space
    prompts: list[Prompt]
    max_kl: float
    output: str | None


class Found(NamedTuple):
    """What the search came to. best: None where no candidate is within the limit."""

    results: list[Evaluation]
    best: Evaluation | None
    overrides: dict[str, Override]
    interrupted: bool
    output: str | None


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises St3Error; wrong files and options are refused before
    anything is loaded."""
    task = _task(console, arguments)
    n_pictures = len({prompt.picture for prompt in task.prompts})
    console.note(
        f"prompts: {len(task.prompts)}, pictures: {n_pictures}, pairs of start and stride: {len(task.space.shapes)}"
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        console.note("\nst3-edge: stopping after this prompt (Ctrl-C again: at once)")

    def stage(name: str, share: float) -> None:
        if stopped.is_set():
            raise Interrupted
        console.stage(name, share)

    found = run(console, lambda: _find(console, arguments, task, stage), stop)
    console.say(json.dumps(_object(task, found)) if arguments.json else _page(task, found))
    if found.interrupted:
        console.note("st3-edge: interrupted; the same command goes on from here")
        return INTERRUPTED
    if found.best is None:
        raise St3Error(f"no schedule stays within a KL of {task.max_kl:g} (--max-kl)")
    return 0


def _find(console: Console, arguments: argparse.Namespace, task: Task, stage: Callable[[str, float], None]) -> Found:
    space, n_prompts = task.space, len(task.prompts)
    work = Work(_work_folder(arguments, task))
    subject = Subject(
        task.model,
        task.mmproj,
        task.prompts,
        work,
        n_tokens=arguments.tokens,
        n_ctx=arguments.n_ctx,
        n_ubatch=arguments.n_ubatch,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.n_gpu_layers,
        stage=stage,
    )
    evaluator = Evaluator(
        work, n_prompts, space.overrides, subject.opened, lambda c, done: stage(_name(c), done / n_prompts)
    )

    def evaluate(candidate: Candidate, limit: float | None) -> Evaluation:
        result = evaluator(candidate, limit)
        console.note(_line(result))
        return result

    interrupted = False
    try:
        subject.answer()
        search.search(space.shapes, space.n_layer, task.max_kl, evaluate, space.min_share)
    except Interrupted:
        interrupted = True
    best = search.best(evaluator.results, task.max_kl)
    overrides = space.overrides(best.candidate) if best else {}
    output = task.output if best and not interrupted else None
    if output:
        try:
            gguf_copy.copy(
                task.model,
                output,
                overrides,
                force=arguments.force,
                tell=lambda share: stage("writing the model", share),
            )
        except Interrupted:
            interrupted, output = True, None
    return Found(evaluator.results, best, overrides, interrupted, output)


def _task(console: Console, arguments: argparse.Namespace) -> Task:
    if not (math.isfinite(arguments.max_kl) and arguments.max_kl > 0):
        raise ConfigError(f"--max-kl must be above 0, not {arguments.max_kl:g}")
    config, output = options.config(arguments), arguments.output
    prompts = _prompts(arguments)  # before a download
    if output:
        check_output(Path(output), [], force=arguments.force)
    found = run(console, lambda: which.find(console, arguments))  # shows how far a download is
    model, mmproj = found.model, found.mmproj
    space = _space(config, check_pair(model, mmproj), model)
    if output:
        gguf_copy.check(model, output, force=arguments.force)
    libraries.check_present()
    found.say(console)
    return Task(model, mmproj, found.words, space, prompts, arguments.max_kl, output)


def _space(config: ST3Config, header: gguf.Header, model: str) -> Space:
    carried = header.schedule
    if (config.preset or carried.get("st3.preset")) == "off":
        raise ConfigError("preset off drops nothing, so there is nothing to tune: give another one (--preset)")
    if "st3.keep" in carried:
        raise ConfigError("the model file carries st3.keep, which excludes a budget: tune the file it was made from")
    n_layer = header.metadata.get(f"{header.architecture}.block_count")
    if not isinstance(n_layer, int) or not 2 <= n_layer <= 2**16:
        raise ModelError(f"model {model!r} has no layers to cut between")
    starts = search.default_starts(n_layer) if config.start is None else [config.start]
    strides = search.default_strides(n_layer) if config.stride is None else [config.stride]
    shapes = search.shapes(starts, strides, n_layer)
    if not shapes:
        raise ConfigError(f"start must be below {n_layer}, the number of the model's layers, not {config.start}")
    return Space(shapes, n_layer, config, carried)


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    pictures = pictures_in(arguments.folder)
    questions: list[Question] = [(None, question) for question in QUESTIONS]
    if arguments.questions is not None:
        questions = read_questions(arguments.questions, {picture.name for picture in pictures})
    pairs = choose(pictures, questions, arguments.prompts)
    digests = {picture: images.load(picture).digest for picture in dict.fromkeys(picture for picture, _ in pairs)}
    return [Prompt(picture, digests[picture], question) for picture, question in pairs]


def _work_folder(arguments: argparse.Namespace, task: Task) -> Path:
    """A folder for all that measurements depend on, less the schedule."""
    about = {
        "model": [state.fingerprint(task.model), state.fingerprint(task.mmproj), task.space.carried],
        "prompts": [[prompt.digest, prompt.question] for prompt in task.prompts],
        "tokens": arguments.tokens,
        "library": state.fingerprint(str(libraries.path_of("llama"))),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return Path(arguments.work or cache_folder() / "tune") / name


def _name(candidate: Candidate) -> str:
    return f"start {candidate.start}, stride {candidate.stride}, budget {candidate.budget:.2f}"


def _line(result: Evaluation) -> str:
    if result.complete:
        return f"{_name(result.candidate)}: KL {result.kl:.4f}, cost {result.cost:.3f}"
    done = f"{len(result.measured)} of {result.n_prompts} prompts"
    return f"{_name(result.candidate)}: KL above {result.kl:.4f}, given up after {done}"


def _page(task: Task, found: Found) -> str:
    lines = ["  cost      KL   95 % interval       same word  start  stride  budget"]
    for r in search.frontier(found.results):
        low, high = r.interval
        lines.append(
            f"{'*' if r is found.best else ' '} {r.cost:.3f}  {r.kl:.4f}  {low:.4f} to {high:.4f}  {r.same_top:>9.1%}"
            f"  {r.candidate.start:5}  {r.candidate.stride:6}  {r.candidate.budget:6.2f}"
        )
    lines.append("\ncost: prefill FLOPs, 1 without pruning; KL: from the model without pruning, nats a token")
    if found.best is None:
        return "\n".join(lines)
    worst = task.prompts[found.best.worst]
    kl = found.best.measured[found.best.worst].kl
    words = [*task.words, *(word for item in found.overrides.items() for word in _option(*item))]
    lines += [
        f"*: the cheapest within {task.max_kl:g}; farthest, {kl:.4f}: {worst.question!r} about {worst.picture.name}",
        f"\nst3-edge ask IMAGE QUESTION {shlex.join(words)}",
    ]
    if found.output:
        lines.append(f"\n{found.output} is the model with this schedule: it needs none of these options")
    return "\n".join(lines)


def _option(key: str, value: Override) -> list[str]:
    """A `st3.*` key as a person types it."""
    name = key.removeprefix("st3.").replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _object(task: Task, found: Found) -> dict[str, Any]:
    """What --json prints."""

    def row(r: Evaluation) -> dict[str, Any]:
        worst = task.prompts[r.worst]
        return {
            **r.candidate._asdict(),
            "cost": r.cost,
            "kl": r.kl,
            "kl_interval": r.interval,
            "same_top": r.same_top,
            "worst": {"picture": worst.picture.name, "question": worst.question, "kl": r.measured[r.worst].kl},
        }

    return {
        "max_kl": task.max_kl,
        "prompts": len(task.prompts),
        "evaluated": len(found.results),
        "interrupted": found.interrupted,
        "frontier": [row(r) for r in search.frontier(found.results)],
        "best": row(found.best) if found.best else None,
        "overrides": found.overrides,
        "output": found.output,
    }
