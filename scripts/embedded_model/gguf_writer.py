"""Write the text GGUF and the mmproj GGUF, and read both back; numpy and PyPI's `gguf` only.

Weights go by the names of a Hugging Face LLaVA file. `F32`, `F16` and `Q8_0` are the file types; in a
quantized mmproj only what ggml multiplies as a matrix is Q8_0: the convolution kernel and the
position table stay F16, vectors F32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

Weights = dict[str, np.ndarray]
_FTYPE = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_TEXT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_TEXT_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_VISION = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_VISION_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix from Hugging Face's half-split rotary order to ggml's interleaved one (NORM)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name: str) -> str | None:
    """A tensor's GGUF name; None for what neither file holds (the tower's last norm)."""
    if match := re.fullmatch(r"language_model\.model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{match[1]}.{_TEXT_LAYER[match[2]]}.weight"
    if match := re.fullmatch(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"v.blk.{match[1]}.{_VISION_LAYER[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"multi_modal_projector\.(linear_[12])\.(weight|bias)", name):
        return f"{_PROJECTOR[match[1]]}.{match[2]}"
    if name.startswith("language_model."):
        return _TEXT[name.removeprefix("language_model.")]
    return _VISION.get(name.removeprefix("vision_tower.vision_model."))


def hf_name(name: str) -> str:
    """The inverse of `gguf_name`. Raises KeyError for a name that no such model has."""

    def inverse(d: dict[str, str]) -> dict[str, str]:
        return {v: k for k, v in d.items()}

    if match := re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name):
        return f"language_model.model.layers.{match[1]}.{inverse(_TEXT_LAYER)[match[2]]}.weight"
    if match := re.fullmatch(r"v\.blk\.(\d+)\.(.+)\.(weight|bias)", name):
        part = inverse(_VISION_LAYER)[match[2]]
        return f"vision_tower.vision_model.encoder.layers.{match[1]}.{part}.{match[3]}"
    if match := re.fullmatch(r"(mm\.[02])\.(weight|bias)", name):
        return f"multi_modal_projector.{inverse(_PROJECTOR)[match[1]]}.{match[2]}"
    if name in inverse(_TEXT):
        return "language_model." + inverse(_TEXT)[name]
    return "vision_tower.vision_model." + inverse(_VISION)[name]


def _add(writer: gguf.GGUFWriter, name: str, w: np.ndarray, file_type: str) -> None:
    matrix = w.ndim == 2 and "position_embd" not in name
    if file_type == "F32" or w.ndim < 2:
        kind = gguf.GGMLQuantizationType.F32
    elif file_type == "Q8_0" and matrix and w.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
    else:
        kind = gguf.GGMLQuantizationType.F16
    packed = gguf.quants.quantize(np.ascontiguousarray(w, np.float32), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(
    path: Path, weights: Weights, config: dict, tokenizer, chat_template: str, file_type: str = "Q8_0"
) -> None:
    """Write the decoder as a `llama` GGUF.

    `config` is the dict of a Hugging Face LLaVA config.json, `tokenizer` a SentencePieceProcessor.
    """
    text = config["text_config"]
    head = text["hidden_size"] // text["num_attention_heads"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("st3 demo LLaVA")
    w.add_description("A small LLaVA trained from scratch on rendered scenes; demo model of st3-edge.")
    w.add_file_type(_FTYPE[file_type])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(text["max_position_embeddings"])
    w.add_embedding_length(text["hidden_size"])
    w.add_block_count(text["num_hidden_layers"])
    w.add_feed_forward_length(text["intermediate_size"])
    w.add_head_count(text["num_attention_heads"])
    w.add_head_count_kv(text["num_key_value_heads"])
    w.add_layer_norm_rms_eps(text["rms_norm_eps"])
    w.add_rope_dimension_count(head)
    w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    w.add_vocab_size(text["vocab_size"])
    ids = range(tokenizer.vocab_size())
    kinds = [
        gguf.TokenType.UNKNOWN
        if tokenizer.is_unknown(i)
        else gguf.TokenType.CONTROL
        if tokenizer.is_control(i)
        else gguf.TokenType.BYTE
        if tokenizer.is_byte(i)
        else gguf.TokenType.NORMAL
        for i in ids
    ]
    w.add_tokenizer_model("llama")
    w.add_token_list([tokenizer.id_to_piece(i) for i in ids])
    w.add_token_scores([tokenizer.get_score(i) for i in ids])
    w.add_token_types(kinds)
    w.add_bos_token_id(tokenizer.bos_id())
    w.add_eos_token_id(tokenizer.eos_id())
    w.add_unk_token_id(tokenizer.unk_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(chat_template)
    heads = text["num_attention_heads"]
    for name, value in weights.items():
        if name.startswith("language_model."):
            turned = permute(value, heads) if re.search(r"\.[qk]_proj\.", name) else value
            _add(w, gguf_name(name), turned, file_type)
    _finish(w)


def write_mmproj(
    path: Path,
    weights: Weights,
    config: dict,
    mean: list[float],
    std: list[float],
    file_type: str = "Q8_0",
    name: str = "st3 demo LLaVA vision",
    pinpoints: Sequence[int] = (),
) -> None:
    """Write tower and projector as a LLaVA mmproj, with the blocks up to the feature layer only. `pinpoints`: the
    sizes at which LLaVA-1.6 cuts pictures into tiles, width and height in turn."""
    vision = config["vision_config"]
    run = vision["num_hidden_layers"] + 1 + config["vision_feature_layer"]
    w = gguf.GGUFWriter(path, "clip")
    w.add_name(name)
    w.add_file_type(_FTYPE[file_type])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("mlp")
    w.add_vision_use_gelu(False)  # neither GELU nor SiLU: quick-GELU
    w.add_vision_image_size(vision["image_size"])
    w.add_vision_patch_size(vision["patch_size"])
    w.add_vision_embedding_length(vision["hidden_size"])
    w.add_vision_feed_forward_length(vision["intermediate_size"])
    w.add_vision_block_count(run)
    w.add_vision_projection_dim(config["text_config"]["hidden_size"])
    w.add_vision_head_count(vision["num_attention_heads"])
    w.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    w.add_vision_image_mean(mean)
    w.add_vision_image_std(std)
    # hidden_states[-2] is the output of that many blocks
    w.add_array("clip.vision.feature_layer", [run])
    if pinpoints:
        w.add_array("clip.vision.image_grid_pinpoints", list(pinpoints))
    for name, value in weights.items():
        if name.startswith("language_model."):
            continue
        match = re.search(r"encoder\.layers\.(\d+)\.", name)
        out = gguf_name(name)
        if out and not (match and int(match[1]) >= run):
            _add(w, out, value, file_type)
    _finish(w)


def read_pair(text: Path, mmproj: Path) -> Weights:
    """Both files as float32 weights by Hugging Face name (the tower's unused last block is not in them)."""
    out: Weights = {}
    reader = gguf.GGUFReader(text)
    heads = int(reader.get_field("llama.attention.head_count").contents())
    for source in (reader, gguf.GGUFReader(mmproj)):
        for t in source.tensors:
            shape = [int(n) for n in reversed(t.shape)]
            value = gguf.quants.dequantize(t.data, t.tensor_type).reshape(shape).astype(np.float32)
            if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", t.name):
                value = unpermute(value, heads)
            out[hf_name(t.name)] = value
    return out
