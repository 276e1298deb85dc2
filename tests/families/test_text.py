"""Each text architecture that is pruned, against Hugging Face's layers: one row of docs/models.md's table a family."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: no reference to compare with")

from annealing import Conversation, native  # noqa: E402
from cases import SEED  # noqa: E402
from native_runtime import Context, Model, lib_dir  # noqa: E402
from oracle import llama as oracle  # noqa: E402
from oracle import schedule  # noqa: E402
from test_off_is_stock import run  # noqa: E402

from families import recipes  # noqa: E402
from families.conftest import Made  # noqa: E402

KEYS: dict[str, str | int | float] = {
    "st3.preset": "st3",
    "st3.start": 2,
    "st3.stride": 2,
    "st3.keep": 0.5,
    "st3.anneal": "linear",
    "st3.anneal_tokens": 16,
    "st3.anneal_floor": 0.2,
}
N_STEPS = 12
EXACT = {"kv": "F32", "flash": False}  # flash attention would round keys and values to F16
families = pytest.mark.parametrize("name", recipes.TEXT)


def words(number: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng([SEED, number]).integers(3, 300, n)]


def picture(made: Made, number: int = 0, nx: int = 9, ny: int = 7) -> oracle.Image:
    """Embeddings of about the size that the model's own tokens have."""
    rng = np.random.default_rng([SEED, 9, number])
    tokens = made.oracle.embed([[5, 6, 7]])[:, : made.oracle.n_embd]
    size = np.sqrt(np.square(tokens).mean()) / made.oracle.input_scale
    return oracle.Image((size * rng.standard_normal((nx * ny, made.oracle.n_embd_inp))).astype(np.float32), nx, ny)


def prompt(made: Made, number: int = 0) -> list[oracle.Piece]:
    return [words(number, 3), picture(made, number), words(number + 50, 20)]


def talk(ctx: Context, made: Made, tally: dict[str, int], seq: int = 0) -> Conversation:
    s = schedule.resolve(made.oracle.n_layer, **{k.removeprefix("st3."): v for k, v in KEYS.items()})
    return Conversation(ctx, made.oracle, s, "F32", tally, made.name, seq, most_error={"F32": made.most_error})


@contextlib.contextmanager
def conversation(rt, made: Made, tally: dict[str, int]) -> Iterator[tuple[Context, Conversation]]:
    """A model with KEYS and one conversation of it, which is closed and counted where nothing failed."""
    with Model(rt, made.path, KEYS) as model, Context(model, n_ctx=512, **EXACT) as ctx:
        t = talk(ctx, made, tally)
        yield ctx, t
        t.close()


@families
def test_off_is_hugging_face(rt, text_model: Callable[[str], Made], tally, name: str) -> None:
    """Breaks if the converted model is another than Hugging Face's: text, an image, text, and tokens one by one."""
    made = text_model(name)
    arch = gguf.GGUFReader(made.path).get_field("general.architecture").contents()
    assert arch == recipes.TEXT[name].arch
    pieces, answer = prompt(made), words(99, 4)
    want = made.oracle.whole([*pieces, answer])
    with Model(rt, made.path) as model, Context(model, n_ctx=256, **EXACT) as ctx:
        assert ctx.decode(pieces[0], 0, outputs="all") == 0
        got = [ctx.logits(i) for i in range(len(pieces[0]))]
        assert ctx.decode(pieces[1].embd, 3, outputs="all") == 0
        got += [ctx.logits(i) for i in range(len(pieces[1].embd))]
        assert ctx.decode(pieces[2], len(got), outputs="all") == 0
        got += [ctx.logits(i) for i in range(len(pieces[2]))]
        for token in answer:
            assert ctx.decode([token], len(got)) == 0
            got.append(ctx.logits())
    cosine = (np.array(got) * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    tally[f"{name} 1 - cosine x 1e-9"] = round(1e9 * float(1 - cosine.min()))
    assert cosine.min() >= 0.999999, f"row {cosine.argmin()}: {cosine.min()}"
    assert oracle.nmse(np.array(got), want) < made.most_error


@families
def test_off_is_stock(text_model: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    """Breaks if the patches change one bit of a logit where nothing is pruned."""
    same_as_stock(text_model(name).path, tmp_path)


def same_as_stock(path: Path, folder: Path) -> None:
    """Compares logits of text, an image and more tokens: of stock, llama_decode and st3_prefill, each in a process."""
    stock = os.environ.get("ST3_STOCK_LIB_DIR")
    if not stock:
        pytest.skip("ST3_STOCK_LIB_DIR is not set")
    ours = lib_dir()
    assert ours is not None
    a = run(Path(stock), path, folder / "stock.bin", "F16", st3=False)
    b = run(ours, path, folder / "ours.bin", "F16", st3=False)
    c = run(ours, path, folder / "st3.bin", "F16", st3=True)
    assert len(a) > 0 and np.array_equal(a, b) and np.array_equal(a, c)


@families
def test_pruned_is_the_oracle(rt, text_model: Callable[[str], Made], tally, name: str) -> None:
    """Breaks if the call of the cut is not at the end of a layer, or anything that a layer reads by row stays long."""
    made = text_model(name)
    with conversation(rt, made, tally) as (ctx, t):
        t.prefill(prompt(made))
        report = ctx.report()
        assert (report["mode"], report["reason"]) == ("pruned-prefill", None)
        full = made.oracle.prefill(prompt(made))
        assert oracle.nmse(full.logits, t.result.logits) > 1e-4, "nothing depends on what was dropped"


@families
def test_annealing_is_the_oracle(rt, text_model: Callable[[str], Made], tally, name: str) -> None:
    """Breaks if a record, a count, a position or a weight is wrong while the answer grows."""
    made = text_model(name)
    with conversation(rt, made, tally) as (ctx, t):
        t.prefill(prompt(made))
        before = ctx.report()["held"]
        for token in words(7, N_STEPS):
            t.step(token)
        assert sum(ctx.report()["held"]) < sum(before)


@families
def test_a_second_picture_is_the_oracle(rt, text_model: Callable[[str], Made], tally, name: str) -> None:
    """Breaks if a later prompt shares quota, score or positions with an earlier one, or pictures of one prompt do."""
    made = text_model(name)
    with conversation(rt, made, tally) as (_, t):
        t.prefill(prompt(made))
        t.step(11)
        t.prefill([picture(made, 1, 6, 5), [4], picture(made, 2, 5, 8), words(3, 9)])
        for token in words(8, 3):
            t.step(token)


@families
def test_a_saved_state_goes_on_the_same(rt, text_model: Callable[[str], Made], name: str) -> None:
    """Breaks if anything that a later logit depends on is not in the state."""
    made = text_model(name)
    with Model(rt, made.path, KEYS) as model, Context(model, n_ctx=512, **EXACT) as ctx:
        assert ctx.prefill(native(prompt(made))) == 0
        at = ctx.positions()[1] + 1
        assert ctx.decode([5], at) == 0
        state, got = ctx.save(0), []
        with Context(model, n_ctx=512, **EXACT) as other:
            assert other.restore(state, 0) == len(state)
            for c in (ctx, other):
                row = []
                for i, token in enumerate(words(6, 4)):
                    assert c.decode([token], at + 1 + i) == 0
                    row.append(c.logits())
                got.append(np.array(row))
            for layer in range(model.n_layer):
                assert np.array_equal(ctx.held(layer), other.held(layer))
                assert np.array_equal(ctx.weights(layer), other.weights(layer))
        assert oracle.nmse(got[1], got[0]) < made.most_error  # other cells: floats are added in another order


@families
def test_evict_only_is_the_oracle(rt, text_model: Callable[[str], Made], tally, name: str) -> None:
    """Breaks if an image that was computed in full is cut down by another rule: values choose who stands for whom."""
    made = text_model(name)
    with conversation(rt, made, tally) as (ctx, t):
        t.picture(picture(made))
        t.text(words(4, 20))
        assert ctx.report()["mode"] == "evict-only"
        t.step(9)
