"""The text and mmproj GGUF writers, on a tiny random model. Needs numpy and PyPI's `gguf`."""

import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "embedded_model"))
import gguf_writer  # noqa: E402

CONFIG = {
    "vision_feature_layer": -2,
    "text_config": {
        "vocab_size": 7, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "vision_config": {
        "image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "layer_norm_eps": 1e-5,
    },
}  # fmt: skip


class Tokenizer:
    """As much of a SentencePieceProcessor as the writer asks for."""

    pieces = ("<unk>", "<s>", "</s>", "<image>", "<0x0A>", "\u2581", "a")

    def vocab_size(self):
        return len(self.pieces)

    def id_to_piece(self, i):
        return self.pieces[i]

    def get_score(self, i):
        return -float(i)

    def is_unknown(self, i):
        return i == 0

    def is_control(self, i):
        return i in (1, 2, 3)

    def is_byte(self, i):
        return i == 4

    def unk_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def random_weights():
    rng = np.random.default_rng(1)
    t, v = CONFIG["text_config"], CONFIG["vision_config"]
    d, f, w, g = t["hidden_size"], t["intermediate_size"], v["hidden_size"], v["intermediate_size"]
    shapes = {"language_model.model.embed_tokens.weight": (7, d), "language_model.model.norm.weight": (d,)}
    shapes["language_model.lm_head.weight"] = (7, d)
    for i in range(t["num_hidden_layers"]):
        at = f"language_model.model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (d, f)}
        shapes |= {f"{at}{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    tower = "vision_tower.vision_model."
    shapes |= {
        f"{tower}embeddings.class_embedding": (w,),
        f"{tower}embeddings.patch_embedding.weight": (w, 3, 14, 14),
        f"{tower}embeddings.position_embedding.weight": (5, w),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{tower}{norm}.{p}": (w,) for p in ("weight", "bias")}
    for i in range(v["num_hidden_layers"]):
        at = f"{tower}encoder.layers.{i}."
        for name, rows, columns in (
            *((f"self_attn.{p}_proj", w, w) for p in ("q", "k", "v", "out")), ("mlp.fc1", g, w), ("mlp.fc2", w, g),
        ):  # fmt: skip
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        shapes |= {f"{at}layer_norm{k}.{p}": (w,) for k in (1, 2) for p in ("weight", "bias")}
    for k, columns in ((1, w), (2, d)):
        shapes |= {
            f"multi_modal_projector.linear_{k}.weight": (d, columns), f"multi_modal_projector.linear_{k}.bias": (d,)
        }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(params=["F32", "F16", "Q8_0"])
def pair(request, tmp_path):
    weights = random_weights()
    text, mmproj = tmp_path / "text.gguf", tmp_path / "mmproj.gguf"
    gguf_writer.write_text(text, weights, CONFIG, Tokenizer(), "{{ messages }}", request.param)
    gguf_writer.write_mmproj(mmproj, weights, CONFIG, [0.5] * 3, [0.25] * 3, request.param)
    return request.param, weights, text, mmproj


def test_weights_come_back(pair):
    # broken by a swapped name, a lost permutation or a transposed matrix
    kind, weights, text, mmproj = pair
    found = gguf_writer.read_pair(text, mmproj)
    unused = {n for n in weights if "encoder.layers.2." in n or "post_layernorm" in n}
    assert set(found) == set(weights) - unused
    for name, value in found.items():
        assert np.abs(value - weights[name]).max() <= {"F32": 0, "F16": 2e-3, "Q8_0": 2e-2}[kind], name


def test_keys_that_llama_cpp_reads(pair):
    # broken by a renamed key, the wrong block count, or a tokenizer that adds a blank
    _, _, text, mmproj = pair
    t, m = gguf.GGUFReader(text), gguf.GGUFReader(mmproj)

    def value(reader, key):
        return reader.get_field(key).contents()

    assert value(t, "general.architecture") == "llama" and value(m, "general.architecture") == "clip"
    assert value(t, "llama.block_count") == 2 and value(t, "llama.attention.head_count") == 2
    assert value(t, "llama.rope.dimension_count") == 32
    assert value(t, "tokenizer.ggml.add_space_prefix") is False
    assert value(t, "tokenizer.ggml.add_bos_token") is True
    assert list(value(t, "tokenizer.ggml.token_type")) == [2, 3, 3, 3, 6, 1, 1]
    assert value(m, "clip.projector_type") == "mlp" and value(m, "clip.use_gelu") is False
    assert value(m, "clip.has_vision_encoder") is True
    # two of three blocks run for feature layer -2, and only those are in the file
    assert value(m, "clip.vision.block_count") == 2 and list(value(m, "clip.vision.feature_layer")) == [2]
    names = {x.name for x in m.tensors}
    assert "v.blk.1.ffn_down.weight" in names and "v.blk.2.ffn_down.weight" not in names
    assert not any("post_ln" in n for n in names)


def test_only_matrices_are_quantized(pair):
    # broken by quantizing what ggml adds, gathers or convolves: the clip loader would refuse or misread it
    kind, _, text, mmproj = pair
    for reader in (gguf.GGUFReader(text), gguf.GGUFReader(mmproj)):
        for t in reader.tensors:
            if len(t.shape) == 1:
                assert t.tensor_type.name == "F32", t.name
            elif t.name in ("v.patch_embd.weight", "v.position_embd.weight"):
                assert t.tensor_type.name == ("F32" if kind == "F32" else "F16"), t.name
            else:
                assert t.tensor_type.name == kind, t.name


def test_permutation_turns_half_split_rotation_into_interleaved():
    # broken by permuting the wrong way round: rotated dot products of q and k then differ
    heads, head = 2, 8
    rng = np.random.default_rng(3)
    w = rng.standard_normal((heads * head, 5))
    x = rng.standard_normal(5)
    angles = 7 * 10000.0 ** (-np.arange(0, head, 2) / head)
    c, s = np.cos(angles), np.sin(angles)
    a, b = np.split((w @ x).reshape(heads, head), 2, axis=1)
    halves = np.concatenate([a * c - b * s, b * c + a * s], 1)
    y = (gguf_writer.permute(w, heads) @ x).reshape(heads, head)
    a, b = y[:, 0::2], y[:, 1::2]
    pairs = np.stack([a * c - b * s, b * c + a * s], 2).reshape(heads, head)
    back = gguf_writer.unpermute(pairs.reshape(-1), heads).reshape(heads, head)
    assert np.allclose(back, halves)
    assert np.array_equal(gguf_writer.unpermute(gguf_writer.permute(w, heads), heads), w)


def test_an_unknown_tensor_is_refused():
    # broken by a lookup that guesses
    with pytest.raises(KeyError):
        gguf_writer.hf_name("v.blk.0.attn_sinks.weight")
