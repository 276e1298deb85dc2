"""Random weights: the same file from the same seed, and a vision encoder whose output a decoder can use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Image, Model
from native_vision import Vision

from st3_edge.commands.bench import random_model
from st3_edge.commands.bench.shapes import SHAPES, Shape, Tower

TEXT = Shape(2, 256, 4, 2, 512, n_vocab=272)
TOWER = Tower(n_layer=2, n_embd=64, n_head=2, n_ff=128, image_size=56, patch_size=14)


@pytest.mark.parametrize("file_type", random_model.FILE_TYPES)
def test_weights_hang_on_the_seed_alone(tmp_path: Path, file_type: str) -> None:
    """Breaks if a file depended on anything else, or two seeds gave the same."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_model.write_text(tmp_path / name, TEXT, file_type, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path: Path) -> None:
    """Breaks if a file were written that llama.cpp cannot read."""
    with pytest.raises(ValueError, match="do not divide"):
        random_model.write_text(tmp_path / "a", Shape(1, 32, 1, 1, 32, n_vocab=272), "Q4_K")


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K", "Q8_0"])
def test_every_shape_can_be_written_in_its_types(file_type: str) -> None:
    """Breaks if a shape of the command line had rows that its type cannot hold, and is not refused."""
    block = random_model.gguf.GGML_QUANT_SIZES[random_model.Kind[file_type]][0]
    for name, shape in SHAPES.items():
        fits = all(t.dims[-1] % block == 0 for t in random_model.text_tensors(shape) if len(t.dims) > 1)
        assert fits == (file_type in shape.types), name


@pytest.mark.parametrize("name", ["internvl3-2b", "qwen2.5-vl-7b", "qwen3-vl-4b", "gemma-3-4b"])
def test_other_architectures(rt, tmp_path: Path, name: str) -> None:
    """Breaks if the file of another architecture than llama lacks what that has, or is not pruned."""
    small = replace(SHAPES[name], n_layer=4, n_embd=256, n_head=2, n_head_kv=1, n_ff=512, n_vocab=272)
    random_model.write_text(tmp_path / "a.gguf", small, "F16", SEED)
    rng = np.random.default_rng(SEED)
    image = Image(rng.standard_normal((64, (1 + small.n_deepstack) * small.n_embd)).astype(np.float32), 8, 8)
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 1}
    with Model(rt, tmp_path / "a.gguf", keys) as model, Context(model) as ctx:
        assert ctx.prefill([[1, 5], replace(image, non_causal=small.arch == "gemma3"), [7, 8]]) == 0
        assert ctx.report()["mode"] == "pruned-prefill" and np.isfinite(ctx.logits()).all()


def test_a_picture_is_encoded(rt, tmp_path: Path) -> None:
    """Breaks if a tensor were missing or misnamed, or activations grew beyond all bounds."""
    random_model.write_text(tmp_path / "text.gguf", TEXT, "F16", SEED)
    random_model.write_vision(tmp_path / "mmproj.gguf", TOWER, TEXT.n_embd, SEED)
    pictures = np.random.default_rng(SEED).integers(0, 256, (2, 56, 56, 3), np.uint8)
    with Model(rt, tmp_path / "text.gguf") as model:
        vision = Vision(model, tmp_path / "mmproj.gguf", threads=1)
        a, b = (vision.encode(picture).embd for picture in pictures)
        vision.close()
    assert a.shape == (TOWER.n_visual, TEXT.n_embd)
    assert np.isfinite(a).all() and 0.05 < a.std() < 20
    assert not np.allclose(a, b) and a.std(0).max() > 0.01  # what is seen matters, and where
