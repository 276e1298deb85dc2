"""Teacher forcing on the embedded model: the distributions that KL divergences are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st3_edge import Llava, ST3Config, divergence
from st3_edge.native import st3
from st3_edge.runtime.text_model import TextModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

N = 12


@pytest.fixture(scope="module")
def context(files: tuple[str, str]) -> Iterator[Callable[..., Any]]:
    """A llama_context under a schedule: context(preset=..., ...)."""
    models = []

    def make(**config: Any) -> Any:
        models.append(TextModel(files[0], ST3Config(**config).overrides(), n_ctx=1024, n_threads=1))
        return models[-1].ctx

    yield make
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def pieces(llava: Llava, picture: str) -> list[st3.Piece]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the image."}]
    return llava.pieces([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def full(context: Callable[..., Any], pieces: list) -> tuple[list[int], np.ndarray]:
    return divergence.greedy_answer(context(preset="off"), pieces, N)


def test_the_greedy_answer_is_the_one_that_is_given(load, full, picture) -> None:
    # broken if the prompt were another than that of a call, or a row of logits belonged to another position
    tokens, logits = full
    assert logits.shape[0] == len(tokens) == N and logits.dtype == np.float32
    assert logits.argmax(-1).tolist() == tokens
    with load(ST3Config(preset="off")) as llava:
        said = llava.ask(picture, "Describe the image.", temperature=0, max_tokens=N)
        assert (
            b"".join(llava._session.llama.piece(token, first=False) for token in tokens).decode().strip()
            == said.strip()
        )


def test_an_answer_that_ends_ends_with_the_token_that_says_so(context, llava, picture) -> None:
    # broken if the end were left out: whether a pruned model goes on matters as much as what it says
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What color is the star?"}]
    off = context(preset="off")
    tokens, logits = divergence.greedy_answer(off, llava.pieces([{"role": "user", "content": content}]), 100)
    assert len(tokens) == len(logits) < 100 and tokens[-1] == llava._session.llama.eos


def test_the_full_model_is_at_no_distance_from_itself(context, full, pieces) -> None:
    # broken by a position too many or too few, or cells that stayed from the prompt before
    off = context(preset="off")
    for _ in range(2):
        again = divergence.teacher_forced_logits(off, pieces, full[0])
        assert again.shape == full[1].shape
        assert divergence.kl_divergence(full[1], again).max() < 1e-6
    assert divergence.teacher_forced_logits(off, pieces, full[0][:1]).shape == (1, full[1].shape[1])


def test_one_batch_gives_what_single_steps_give(context, full, pieces, monkeypatch) -> None:
    # broken if the whole answer were seen at each position, or the pruned cache were not the same for both
    pruned = context(preset="pvtp", budget=0.1)
    batch = divergence.teacher_forced_logits(pruned, pieces, full[0])
    monkeypatch.setattr(st3, "anneals", lambda _: True)
    steps = divergence.teacher_forced_logits(pruned, pieces, full[0])
    assert divergence.kl_divergence(steps, batch).max() < 1e-5
    assert divergence.kl_divergence(full[1], batch).max() > 1e-3, "budget 0.1 is not the full model"


def test_annealing_goes_on_while_the_answer_is_given(context, full, pieces) -> None:
    # broken if the answer came as one batch, which does not move annealing's clock
    annealing = context(preset="st3", keep=1.0, anneal_tokens=N - 1, anneal_floor=0.25)
    divergence.teacher_forced_logits(annealing, pieces, full[0])
    assert set(st3.report(annealing)["held"]) == {144}


def test_less_is_farther_away(context, full, pieces) -> None:
    # broken if schedules did not reach the model
    kl = [
        divergence.kl_divergence(
            full[1], divergence.teacher_forced_logits(context(preset="pvtp", budget=b), pieces, full[0])
        ).mean()
        for b in (0.9, 0.15)
    ]
    assert 0 < kl[0] < 0.1 * kl[1]


def test_a_context_of_the_scripts_will_do(files, full, pieces) -> None:
    # broken if scripts/quality.py, which makes its contexts itself, could not measure by the same functions
    import native_runtime

    folder = native_runtime.lib_dir()
    assert folder is not None
    rt = native_runtime.Runtime(folder)
    with native_runtime.Model(rt, Path(files[0])) as model, native_runtime.Context(model, n_ctx=1024) as ctx:
        again = divergence.teacher_forced_logits(ctx.ptr, pieces, full[0])
    rt.close()
    assert divergence.kl_divergence(full[1], again).max() < 1e-6
