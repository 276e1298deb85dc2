"""The model that a command works with, loaded."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..config import REVISIT, ST3Config
from ..files.output import cache_folder
from .console import Console

if TYPE_CHECKING:
    from ..llava import Llava
    from . import which

_STAGES = {"encode": "looking at the picture", "prefill": "reading the prompt", "decode": None}


def load(console: Console, arguments: argparse.Namespace, config: ST3Config, found: which.Model) -> Llava:
    """Loads a model with the options that commands share. Raises St3Error."""
    from ..llava import Llava

    console.stage("loading the model")
    llava = Llava(
        found.model,
        found.mmproj,
        config,
        n_ctx=arguments.n_ctx,
        n_ubatch=arguments.n_ubatch,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.n_gpu_layers,
        lora=adapters(arguments),
        on_stage=lambda stage: console.stage(_STAGES[stage]),
        revisit=getattr(arguments, "revisit", REVISIT[0]),
        image_cache_dir=cache_folder() / "pictures" if arguments.cache else None,
    )
    console.stage(None)
    return llava


def adapters(arguments: argparse.Namespace) -> dict[str, float]:
    """The LoRA adapters of a command line, else of the config file, and their strengths."""
    words = arguments.lora
    if not words:  # Path.expanduser fails where there is no such person
        words = [os.path.expanduser(word) for word in getattr(arguments, "settings", {}).get("lora", [])]  # noqa: PTH111
    return dict(map(_adapter, words))


def _adapter(text: str) -> tuple[str, float]:
    """A path and the strength behind its last "=", if that is a number."""
    path, equals, strength = text.rpartition("=")
    try:
        return (path, float(strength)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0
