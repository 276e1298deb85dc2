"""Headers of the embedded model with values changed: what upstream would abort the process for is refused first."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from st3_edge import ModelError
from st3_edge.files import gguf_copy, pair
from st3_edge.files.gguf import read_header
from st3_edge.files.pair import check_pair


def changed(path: str, key: str, value: int, target: Path) -> str:
    """A copy of a GGUF file with another value of a u32 key."""
    end = read_header(path).values[key][1]
    data = bytearray(Path(path).read_bytes())
    struct.pack_into("<I", data, end - 4, value)
    target.write_bytes(data)
    return str(target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("image_size", 7),
        ("image_size", 28 * 14),
        ("patch_size", 0),
        ("patch_size", 1),
        ("patch_size", 13),
        ("patch_size", 1000),
        ("embedding_length", 0),
        ("embedding_length", 191),
        ("attention.head_count", 0),
        ("attention.head_count", 5),
        ("attention.head_count", 1000),
    ],
)
def test_a_vision_half_whose_values_cannot_be_is_refused(files, tmp_path, key, value):
    # broken if it were loaded: upstream asserts, and the process aborts
    mmproj = changed(files[1], f"clip.vision.{key}", value, tmp_path / "mmproj.gguf")
    with pytest.raises(ModelError, match="is damaged") as caught:
        check_pair(files[0], mmproj)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_length": "long"}, "context_length is 'long'"),
        ({"context_length": float("nan")}, "context_length is nan"),
        ({"context_length": float("inf")}, "context_length is inf"),
        ({"context_length": 1.5}, "context_length is 1.5"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 513}, "block_count is 513"),
        ({"nextn_predict_layers": 17}, "nextn_predict_layers is 17, of 16"),
        ({"expert_count": 1025, "expert_used_count": 1}, "expert_count is 1025"),
        ({"expert_count": 8}, "numbers of experts"),
        ({"expert_used_count": 1}, "numbers of experts"),
        ({"expert_count": 8, "expert_used_count": 9}, "numbers of experts"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_group_count": 3}, "numbers of experts"),
    ],
)
def test_counts_of_a_text_model_that_cannot_be_are_refused(files, tmp_path, changes, said):
    # broken if it were loaded: upstream asserts, and the process aborts
    target = tmp_path / "model.gguf"
    gguf_copy.copy(files[0], target, {f"llama.{key}": value for key, value in changes.items()}, force=False)
    with pytest.raises(ModelError, match=said):
        check_pair(str(target), files[1])


def test_a_vision_half_of_another_width_is_refused(files, foreign_mmproj):
    # broken if both were loaded to find that out
    with pytest.raises(ModelError, match="another model: its visual tokens are 32 wide, those of the text model 192"):
        check_pair(files[0], foreign_mmproj)


def test_the_embedded_pair_fits(files):
    # broken if a check refused what works
    assert check_pair(*files).architecture == "llama"


@pytest.mark.parametrize(
    "grid", [[300, 300], [336, 0], [-336, 336], [336], [336 * 65, 336], [2**30, 2**30], [336] * 400, []]
)
def test_a_grid_that_is_not_made_of_tiles_is_refused(files, rewritten_mmproj, grid):
    # broken if it were loaded: a tile that is no square aborts the process at the first large picture
    with pytest.raises(ModelError, match="image_grid_pinpoints"):
        check_pair(files[0], rewritten_mmproj({"clip.vision.image_grid_pinpoints": grid or [0] * 300}))


def test_llava_1_6s_grid_is_taken(files, rewritten_mmproj):
    # broken if a check refused what works
    grid = [336, 672, 672, 336, 672, 672, 1008, 336, 336, 1008]
    assert check_pair(files[0], rewritten_mmproj({"clip.vision.image_grid_pinpoints": grid}))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("v.blk.3.attn_q.weight", lambda shape: (shape[0], shape[1] + 1), "attn_q.weight is 192×193, not 192×192"),
        ("v.blk.0.ln1.bias", lambda shape: (64,), "ln1.bias is 64, not 192"),
        ("v.class_embd", lambda shape: (), "impossible shape"),
        ("mm.2.weight", lambda shape: (shape[0], 0), "impossible shape"),
        ("mm.0.weight", lambda shape: (2**40, 1), "impossible shape"),
    ],
)
def test_tensors_of_another_shape_are_refused(files, name, change, says):
    # broken if upstream's graph were built of them: it asserts, and the process aborts
    header = read_header(files[1])
    other = replace(header, shapes={**header.shapes, name: change(header.shapes[name])})
    with pytest.raises(ModelError, match=says):
        pair._Llava("x", other).check()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip.has_vision_encoder": False}, "no vision encoder"),
        ({"clip.vision.image_std": (0.5, 0.0, 0.5)}, "image_std"),
        ({"clip.vision.image_mean": (0.5, float("nan"), 0.5)}, "image_mean"),
        ({"clip.vision.image_mean": (0.5,)}, "image_mean"),
        ({"clip.vision.spatial_merge_size": 0}, "spatial_merge_size is 0"),
        ({"clip.vision.attention.layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
    ],
)
def test_values_of_any_vision_half_that_cannot_be_are_refused(files, monkeypatch, changes, says):
    # broken if only LLaVA's were looked at: pictures would become infinite, or the process would abort
    good = read_header(files[1])
    arrays = {key: value for key, value in changes.items() if isinstance(value, tuple)}
    plain = {key: value for key, value in changes.items() if key not in arrays}
    other = replace(
        good,
        metadata={**good.metadata, "clip.projector_type": "idefics3", **plain},
        arrays={**good.arrays, **arrays},
    )
    monkeypatch.setattr(pair.gguf, "read_header", lambda path, _="": other if path == files[1] else read_header(path))
    with pytest.raises(ModelError, match=says):
        check_pair(*files)
    fine = {"clip.projector_type": "idefics3"}
    other = replace(good, metadata={**good.metadata, **fine})
    assert check_pair(*files).architecture == "llama"


def test_values_of_another_type_are_refused(files, tmp_path):
    # broken if they were read as they are: upstream asserts what it reads
    path = tmp_path / "mmproj.gguf"
    data = Path(files[1]).read_bytes()
    key = b"clip.vision.image_size"
    at = data.index(key) + len(key)
    path.write_bytes(data[:at] + struct.pack("<I", 5) + data[at + 4 :])
    with pytest.raises(ModelError, match="image_size is of the type i32, not u32"):
        check_pair(files[0], str(path))


@pytest.mark.parametrize(("name", "kind"), [("blk.4.attn_norm.weight", 1), ("blk.0.ffn_up.weight", 24)])
def test_text_tensors_that_no_op_takes_are_refused(files, name, kind):
    # broken if the graph were computed with them: ggml aborts
    header = read_header(files[0])
    with pytest.raises(ModelError, match=name):
        pair._check_text("x", replace(header, types={**header.types, name: kind}))


def test_yis_projector_is_taken(files):
    # broken if the norms behind its layers were missed, or mm.2 were asked for, which it has not
    header = read_header(files[1])
    wide = {"mm.1.weight": (192,), "mm.1.bias": (192,), "mm.4.weight": (192,), "mm.4.bias": (192,)}
    named = {name.replace("mm.2.", "mm.3."): shape for name, shape in header.shapes.items()} | wide
    tensors, types = dict.fromkeys(named, 1), {name: 0 if len(shape) == 1 else 8 for name, shape in named.items()}
    yi = replace(header, shapes=named, tensors=tensors, types={**types, "v.patch_embd.weight": 1})
    assert pair._Llava("x", yi).check() == 192


def test_a_glm_without_mrope_is_refused(files, tmp_path):
    # broken if it were loaded: upstream aborts the process at the first picture
    model = tmp_path / "glm4.gguf"
    gguf_copy.copy(files[0], model, {"general.architecture": "glm4"}, force=False)
    with pytest.raises(ModelError, match="no M-RoPE"):
        check_pair(str(model), files[1])
