"""The model that a command works with, loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config import REVISIT, ST3Config
from . import which
from .console import Console

if TYPE_CHECKING:
    from ..llava import Llava

_STAGES = {"encode": "looking at the picture", "prefill": "reading the prompt", "decode": None}


def load(console: Console, arguments: argparse.Namespace, config: ST3Config, found: which.Model | None = None) -> Llava:
    """Loads `found`, or the one that the arguments choose, and says so where it is the demo's. Raises St3Error."""
    from ..llava import Llava

    found = found or which.find(console, arguments)
    console.stage("loading the model")
    llava = Llava(
        found.model,
        found.mmproj,
        config,
        n_ctx=arguments.n_ctx,
        n_ubatch=arguments.n_ubatch,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.n_gpu_layers,
        on_stage=lambda stage: console.stage(_STAGES[stage]),
        revisit=getattr(arguments, "revisit", REVISIT[0]),
    )
    console.stage(None)
    found.say(console)
    return llava
