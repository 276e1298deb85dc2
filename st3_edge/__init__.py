"""st3-edge: quantized LLaVA on your own machine, with visual tokens pruned between the decoder's layers.

    from st3_edge import Llava, ST3Config

    with Llava.demo(ST3Config(budget=0.4)) as llava:
        print(llava.ask("picture.png", "What color is the star?"))
        print(llava.last_report)

Importing this package loads no native library; making a `Llava` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
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
    from .llava import Llava
    from .report import Report

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


# Loaded when they are asked for, so that importing the package takes no time; the others are errors.
_PLACES = {
    **dict.fromkeys(("CURVES", "PRESETS", "RANKS", "ST3Config"), "config"),
    "Llava": "llava",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("st3-edge")
        except metadata.PackageNotFoundError:  # run from its sources
            return "unknown"
    if name in __all__:
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f".{_PLACES.get(name, 'errors')}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
