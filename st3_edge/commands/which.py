"""Which model a command line means: its own words, else the environment, else the config file, else the demo model."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .. import demo
from ..errors import ModelError
from ..files import choose, gguf
from . import loading
from .console import Console, amount

_DEMO = "(no model chosen, so the small demo model answers: it knows drawn shapes only; -m or --hf chooses one)"

# owner/repo or owner/repo:QUANT, as against the path of a file
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Model(NamedTuple):
    """The paths of both files; name: what a person calls it; words: the options that choose it, [] for the demo's."""

    model: str
    mmproj: str
    name: str
    words: list[str]

    def say(self, console: Console) -> None:
        """Says that the demo model answers, where it does; for use when nothing else can go wrong before the answer."""
        if not self.words:
            console.note(_DEMO)


def find(console: Console, arguments: argparse.Namespace) -> Model:
    """The model that is meant, downloaded where --hf names it and it is not there. Raises ModelError."""
    for name in ("hf", "model", "mmproj"):
        if getattr(arguments, name) == "":
            raise ModelError(f"--{name} names nothing")
    for path in loading.adapters(arguments) if hasattr(arguments, "lora") else ():
        gguf.read_header(path, "adapter")  # before a download
    if arguments.hf and arguments.model:
        raise ModelError("--hf and --model exclude each other: both name the model")
    settings: Mapping[str, str] = getattr(arguments, "settings", {})
    environment = os.environ.get("ST3_MODEL", "")
    mmproj = arguments.mmproj
    if arguments.hf or arguments.model:
        found = _from(console, arguments.hf, arguments.model, mmproj)
    elif mmproj:
        raise ModelError("--mmproj is half of a model: --model names the other")
    elif environment:
        repository = is_repository(environment)
        found = _from(
            console,
            environment if repository else None,
            None if repository else environment,
            os.environ.get("ST3_MMPROJ") or None,
        )
    elif settings.get("hf") or settings.get("model"):
        if settings.get("hf") and settings.get("model"):
            raise ModelError("the config file has both hf and model: both name the model")
        # Path.expanduser fails where there is no such person
        paths = {key: os.path.expanduser(settings[key]) for key in ("model", "mmproj") if settings.get(key)}  # noqa: PTH111
        found = _from(console, settings.get("hf"), paths.get("model"), paths.get("mmproj"))
    elif os.environ.get("ST3_MMPROJ"):
        raise ModelError("ST3_MMPROJ is half of a model: ST3_MODEL names the other")
    elif settings.get("mmproj"):
        raise ModelError("the config file's mmproj is half of a model: model names the other")
    else:
        model, half = demo.model_paths()
        found = Model(str(model), str(half), "the demo model", [])
    return found


def is_repository(name: str) -> bool:
    """Whether a name is a repository's and not a file's."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.lower().endswith(".gguf") and not Path(name).exists()


def _from(console: Console, repository: str | None, model: str | None, mmproj: str | None) -> Model:
    more = ["--mmproj", mmproj] if mmproj else []
    if repository:
        half, name = mmproj, repository
        model, found, name = download(console, repository)
        return Model(model, half or found, name, ["--hf", repository, *more])
    assert model
    if os.path.isdir(model):  # noqa: PTH112 which raises nothing
        raise ModelError(f"model {model!r} is a folder: name the language model's file in it")
    if is_repository(model):
        raise ModelError(f"there is no file {model!r} (--hf {model} takes it from Hugging Face)")
    return Model(model, mmproj or choose.beside(model), Path(model).stem, ["--model", model, *more])


def download(console: Console, repository: str) -> tuple[str, str, str]:
    """Both files of a repository and its name, from the cache where they are there; shows how far a download is."""
    from ..files import hub

    started, first = time.monotonic(), -1

    def progress(done: int, total: int | None) -> None:
        nonlocal first
        first = done if first < 0 else first
        rate = (done - first) / max(time.monotonic() - started, 0.1)
        size = f"{amount(done)} of {amount(total)}" if total else amount(done)
        console.stage(f"downloading {repository}", done / total if total else None, f"{size}, {rate / 1e6:.1f} MB/s")

    found = hub.pair(repository, progress=progress)
    console.stage(None)
    return found
