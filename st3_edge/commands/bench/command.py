"""`st3-edge bench`: what ST³ gives on this machine, measured side by side with stock llama.cpp."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from ...native import machine
from .. import doctor, which
from ..console import INTERRUPTED, Console, run
from . import figures, prepare
from .shapes import SEED, TYPES
from .sides import Raw, Side, Stopped, measure
from .worker import Job

_BUSY = 0.5  # load average of an idle machine, at most
_SCHEDULE = (
    "mode",
    "reason",
    "preset",
    "cuts",
    "counts",
    "keep",
    "score",
    "coverage",
    "merge",
    "rank",
    "budget",
    "anneal",
)


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code. Ctrl-C ends the measurement and prints what there is."""
    chosen = prepare.check(arguments)
    found = None if arguments.shape else run(console, lambda: which.find(console, arguments))
    bench = _Bench(console, arguments, chosen, found)
    finished = run(console, bench.measure, bench.stop)
    result = bench.result()
    if arguments.json:
        console.say(json.dumps(result))
    else:
        for line in _describe(result):
            console.say(line)
    return 0 if finished else INTERRUPTED


class _Bench:
    """One measurement, and what there is of it so far."""

    def __init__(
        self, console: Console, arguments: argparse.Namespace, chosen: prepare.Chosen, found: which.Model | None
    ) -> None:
        self._console, self._arguments = console, arguments
        self._chosen, self._found = chosen, found
        self._load = machine.load()
        self._stopped = self._together = False
        self._jobs: tuple[Job, Job] | None = None
        self._sides: tuple[Side, ...] = ()
        self._pairs: list[dict[str, Raw]] = []

    def measure(self) -> bool:
        """Makes all pairs; returns False where it was stopped. Raises St3Error's kinds."""
        arguments = self._arguments
        try:
            self._jobs = stock, st3 = prepare.make_jobs(self._console, arguments, self._chosen, self._found, self._tell)
            self._together = prepare.fit_together(st3)
            if not self._together:
                self._console.note("memory holds one side at a time: models are loaded anew for every run")
            self._sides = Side("stock", stock), Side("st3", st3)
            groups = [self._sides] if self._together else [[side] for side in self._sides]
            reload = arguments.reload or not self._together
            for pair in measure(groups, arguments.pairs, arguments.generate, reload, self._tell):
                self._pairs.append(pair)
        except Stopped:
            return False
        finally:
            for side in self._sides:
                side.close()
        return True

    def stop(self) -> None:
        """Ends `measure` soon; from any thread."""
        self._stopped = True
        for side in self._sides:
            side.stop()

    def _tell(self, stage: str, share: float) -> None:
        if self._stopped:
            raise Stopped
        self._console.stage(stage, share)

    def result(self) -> dict[str, Any]:
        """Machine, setup, all runs and their summary, as plain values."""
        runs = [{name: figures.metrics(raw) for name, raw in pair.items()} for pair in self._pairs]
        return {
            "machine": {
                "processor": machine.processor(),
                "cpus": machine.usable_cpus(),
                "memory_bytes": machine.memory(),
                "system": platform.platform(),
                "load_before": self._load,
                "versions": doctor.versions(),
            },
            "setup": self._setup(),
            "pairs": [
                {name: {**of_side, "steps_ms": raw[name]["steps_ms"]} for name, of_side in pair.items()}
                for pair, raw in zip(runs, self._pairs, strict=True)
            ],
            "first": {side.name: side.first for side in self._sides},
            "summary": figures.summary(runs, self._work()) if runs else {},
        }

    def _work(self) -> figures.Work:
        assert self._jobs
        st3 = self._sides[1]
        setup, report = st3.setup, st3.report
        off = [setup["visual"]] * setup["layers"]  # stock's memory, which knows of no pictures
        per_layer, held = (off, off) if report["mode"] == "off" else (report["per_layer"], report["held"])
        weights = prepare.bytes_per_token(self._jobs[1].model)
        pruned = report["mode"] == "pruned-prefill"
        return figures.Work(setup["visual"], setup["text"], per_layer, held, st3.live, weights, pruned)

    def _setup(self) -> dict[str, Any]:
        arguments = self._arguments
        setup: dict[str, Any] = {}
        if self._jobs:
            job = self._jobs[1]
            setup = {
                "model": Path(job.model).name,
                "mmproj": Path(job.mmproj).name if job.mmproj else None,
                "pictures": [Path(picture).name for picture in job.pictures],
                "question": job.question,
                "keys": job.keys,
            }
        if self._pairs:
            st3, work = self._sides[1], self._work()
            setup |= {key: st3.setup[key] for key in ("visual", "text", "layers", "n_ctx", "n_ubatch", "threads")}
            setup["schedule"] = {key: st3.report[key] for key in _SCHEDULE if key in st3.report}
            setup |= {"per_layer": work.per_layer, "held": work.held, "weights_bytes_per_token": work.weights}
            setup["devices"] = st3.setup["devices"]
            setup["libraries"] = {
                side.name: {key: side.setup[key] for key in ("ggml", "compiler", "cpu_features")}
                for side in self._sides
            }
        return {
            "command": "st3-edge " + shlex.join(sys.argv[1:]),
            "commit": machine.commit(),
            "shape": arguments.shape,
            "type": (arguments.type or TYPES[0]) if arguments.shape else None,
            "seed": SEED if arguments.shape else None,
            **setup,
            "generate": arguments.generate,
            "pairs": arguments.pairs,
            "against": arguments.against,
            "kv_type": arguments.ctk,
            "flash_attention": True,
            "repack": arguments.repack,
            "n_gpu_layers": arguments.n_gpu_layers,
            "together": self._together,
            "reload": arguments.reload,
        }


def _describe(found: dict[str, Any]) -> list[str]:
    """The same as lines for a person."""
    setup, machine = found["setup"], found["machine"]
    if not found["pairs"]:
        return ["nothing was measured"]
    model = f"{setup['shape']}, random {setup['type']} weights" if setup["shape"] else setup["model"]
    schedule, against = setup["schedule"], "stock" if setup["against"] == "stock" else "pruning off"
    lines = [
        f"{model}: {setup['visual']} visual and {setup['text']} text tokens, {setup['generate']} generated",
        f"ST3 (preset {schedule['preset']}, budget {schedule['budget']:.2f}) against {against}, "
        f"{len(found['pairs'])} pairs",
        f"{setup['threads'][0]} threads ({setup['threads'][1]} in prefill), n_ctx {setup['n_ctx']}, n_ubatch "
        f"{setup['n_ubatch']}, {setup['kv_type'].upper()} KV cache, flash attention; {machine['processor']}",
    ]
    if schedule["reason"]:
        lines.append(f"{schedule['mode']}: {schedule['reason']}")
    ours, theirs = (setup["libraries"][name] for name in ("st3", "stock"))
    lines += [
        f"not the same {what}: stock {theirs[what]}, ST3 {ours[what]}"
        for what in ("compiler", "cpu_features")
        if ours[what] != theirs[what]
    ]
    if machine["load_before"] > _BUSY:
        lines.append(f"other programs were running (load {machine['load_before']:.1f}): the figures are noisy")
    return [*lines, "", *figures.table(found["summary"], setup["against"]), figures.first_requests(found["first"])]
