"""Fixtures of the tests of model families: the libraries, upstream's converter, and the models that were made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT / "tests" / "native", ROOT / "scripts"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import native_runtime  # noqa: E402

from families.convert import Converter  # noqa: E402

if TYPE_CHECKING:  # where torch is missing, the tests are skipped
    from families.reference import HfDecoder


@dataclass(frozen=True)
class Made:
    """A decoder of a family: its file and its oracle."""

    name: str
    path: Path
    oracle: HfDecoder
    most_error: float


@pytest.fixture(scope="package")  # it takes the log
def rt(native_folder: Path) -> Iterator[native_runtime.Runtime]:
    """The libraries."""
    made = native_runtime.Runtime(native_folder)
    yield made
    made.close()


@pytest.fixture(scope="session")
def converter(upstream: Path) -> Iterator[Converter]:
    """Upstream's converter."""
    made = Converter(upstream)
    yield made
    made.close()


@pytest.fixture(scope="session")
def text_model(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Makes a family's decoder once: text_model(name), or of another recipe under a name of its own."""
    import torch

    from families import recipes

    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    folder, made = tmp_path_factory.mktemp("families"), {}

    def make(name: str, recipe: recipes.Text | None = None) -> Made:
        asked = recipe is None
        if (name, asked) not in made:
            recipe = recipe or recipes.TEXT[name]
            lm = recipe.make()
            at = folder / f"{len(made)}-{name}"
            recipe.save(lm, at)
            path = converter(at, at.with_suffix(".gguf"))
            decoder = recipe.oracle(lm)
            if recipe.most_error > recipes.Text.most_error:
                decoder.inexact = (recipe.most_error / decoder.n_layer) ** 0.5
            made[name, asked] = Made(name, path, decoder, recipe.most_error)
        return made[name, asked]

    return make
