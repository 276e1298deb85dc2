"""Decoders that are not pruned, of vision models that mtmd serves: stock llama.cpp, and the reason in the report."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: no models to make")

from mrope import RowContext  # noqa: E402
from native_runtime import Context, Model, lib_dir  # noqa: E402
from PIL import Image as Pictures  # noqa: E402
from test_off_is_stock import run  # noqa: E402

from families import recipes  # noqa: E402
from families.convert import Converter  # noqa: E402
from families.files import NOT_PRUNED, check_same, top, write_pair  # noqa: E402
from families.others import OTHERS  # noqa: E402
from families.test_llava import CONFIG, answer, turn  # noqa: E402
from families.test_text import KEYS  # noqa: E402
from st3_edge import Llava  # noqa: E402
from st3_edge.files import gguf_copy  # noqa: E402

others = pytest.mark.parametrize("name", OTHERS)


def asking(recipe: recipes.Text, converter: Converter, folder: Path) -> Path:
    """The file of a model that asks for pruning."""
    recipe.save(recipe.make(), folder / "model")
    path = converter(folder / "model", folder / "plain.gguf")
    gguf_copy.copy(path, folder / "asking.gguf", KEYS, force=False)
    return folder / "asking.gguf"


@others
def test_it_is_stock_and_says_why(rt, converter, tmp_path: Path, name: str) -> None:
    """Breaks if a model whose graph has no cut is pruned, fails, computes anything else than stock llama.cpp, or does
    not say why."""
    path, arch = asking(OTHERS[name], converter, tmp_path), OTHERS[name].arch
    assert gguf.GGUFReader(path).get_field("general.architecture").contents() == arch
    with Model(rt, path) as model, (RowContext if model.mrope else Context)(model, n_ctx=256) as ctx:
        ctx.grid = 6, 5
        rows = np.random.default_rng(1).standard_normal((30, model.n_embd_inp)).astype(np.float32)
        assert ctx.decode([1, 5, 9], 0) == 0
        assert ctx.decode(rows, 3, outputs="none") == 0
        assert ctx.decode([7, 8, 9], 33) == 0
        assert np.isfinite(ctx.logits()).all()
        report = ctx.report()
        assert report["mode"] == "off"
        assert report["reason"] == f"architecture {arch} is not among those that can be pruned"
    stock, ours = os.environ.get("ST3_STOCK_LIB_DIR"), lib_dir()
    if not stock:
        pytest.skip("ST3_STOCK_LIB_DIR is not set")
    want = run(Path(stock), path, tmp_path / "stock.bin", "F16", st3=False)
    got = run(ours, path, tmp_path / "ours.bin", "F16", st3=False)
    assert len(want) > 0 and np.array_equal(want, got)


@pytest.mark.parametrize("name", NOT_PRUNED)
def test_a_conversation_goes_on(converter, tmp_path: Path, name: str) -> None:
    """Breaks if the report, a part of a prompt that is there already, a state, or an image fails where the memory is of
    another kind: recurrent, compressed, shared between layers."""
    pictures = [Pictures.fromarray(NOT_PRUNED[name].picture(i)) for i in range(2)]
    first = turn("user", pictures[0], "What?")
    # F32: rounding of the cache may exchange experts
    kv = {"type_k": "f32", "type_v": "f32"}
    with Llava(*write_pair(name, tmp_path, converter), CONFIG, n_ctx=1024, n_threads=1, **kv) as llava:
        said = answer(llava, first)
        assert llava.last_report is not None
        assert llava.last_report.mode == "off"
        assert "is not among those that can be pruned" in llava.last_report.reason
        more = (first, turn("assistant", said), turn("user", "And here?", pictures[1], "Say it."))
        logits = top(llava, *more)
        llava.save_state(tmp_path / "kept.st3")
        llava.reset()
        check_same(top(llava, *more), logits)
        llava.load_state(tmp_path / "kept.st3")
        check_same(top(llava, *more), logits)
