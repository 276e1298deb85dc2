"""The model that a command line names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config import REVISIT, ST3Config
from .console import Console

if TYPE_CHECKING:
    from ..llava import Llava

_STAGES = {"encode": "looking at the picture", "prefill": "reading the prompt", "decode": None}


def load(console: Console, arguments: argparse.Namespace, config: ST3Config) -> Llava:
    """Loads it. Raises St3Error."""
    from .. import demo
    from ..llava import Llava

    console.stage("loading the model")
    model, mmproj = (arguments.model, arguments.mmproj) if arguments.model else demo.model_paths()
    llava = Llava(
        model,
        mmproj,
        config,
        n_ctx=arguments.n_ctx,
        n_ubatch=arguments.n_ubatch,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.n_gpu_layers,
        on_stage=lambda stage: console.stage(_STAGES[stage]),
        revisit=getattr(arguments, "revisit", REVISIT[0]),
    )
    console.stage(None)
    return llava


def tell_which(console: Console, arguments: argparse.Namespace) -> None:
    """Says that the demo model answers, where it does."""
    if not arguments.model:
        console.note("(no --model: the small demo model answers, which knows drawn shapes only)")
