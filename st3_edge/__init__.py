"""st3-edge: quantized LLaVA on your own machine, with visual tokens pruned between the decoder's layers.

    from st3_edge import Llava, ST3Config

    with Llava.demo(ST3Config(budget=0.4)) as llava:
        print(llava.ask("picture.png", "What color is the star?"))
        print(llava.last_report)

Importing this package loads no native library; making a `Llava` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import CURVES, PRESETS, RANKS, ST3Config
from .errors import (
    ConfigError,
    ContextError,
    ImageError,
    LibraryError,
    ModelError,
    OutputError,
    PromptError,
    St3Error,
    StateError,
)
from .report import Report

__version__: str

if TYPE_CHECKING:
    from .llava import Llava

__all__ = [
    "CURVES",
    "PRESETS",
    "RANKS",
    "ConfigError",
    "ContextError",
    "ImageError",
    "LibraryError",
    "Llava",
    "ModelError",
    "OutputError",
    "PromptError",
    "Report",
    "ST3Config",
    "St3Error",
    "StateError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("st3-edge")
        except metadata.PackageNotFoundError:  # run from its sources
            return "unknown"
    if name == "Llava":
        from .llava import Llava

        return Llava
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
