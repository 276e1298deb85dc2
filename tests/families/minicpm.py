"""MiniCPM-V 2.6, whose classes are no part of Hugging Face's library: its parts are.

The tower is SigLIP with positions by share of the picture, as Idefics2's is; what reads it is a layer of torch's
attention whose queries are learned. The names in the file are those of upstream's older converter, which wants all
of a trained model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from .convert import Converter
from .media import MEAN, SIDE, STD, TOWER, Array, Media, grid

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "embedded_model"))
from gguf_writer import gguf_name

N_QUERIES = 25
POSITIONS = 70  # of a side, in every MiniCPM-V
HEAD = 128  # likewise
EPS = 1e-6
NAMES = {
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "post_layernorm.weight": "v.post_ln.weight",
    "post_layernorm.bias": "v.post_ln.bias",
    "kv_proj.weight": "kv.weight",
    "attn.out_proj.weight": "attn.out.weight",
    "attn.out_proj.bias": "attn.out.bias",
}


def places(rows: int, columns: int, width: int) -> torch.Tensor:
    """Sines and cosines [rows * columns, width]: of the column in the first half, of the row in the second."""
    turn = 1e4 ** -(torch.arange(width // 4) / (width // 4))
    y, x = (n.reshape(-1, 1) * turn for n in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)


class Resampler(torch.nn.Module):
    """As many tokens as there are queries."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(N_QUERIES, width))
        self.kv_proj = torch.nn.Linear(seen, width, bias=False)
        self.attn = torch.nn.MultiheadAttention(width, width // HEAD)
        self.ln_q, self.ln_kv, self.ln_post = (torch.nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.proj = torch.nn.Parameter(torch.zeros(width, width))

    def forward(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Of patches [rows * columns, seen]."""
        x = self.ln_kv(self.kv_proj(x))
        out, _ = self.attn(self.ln_q(self.query), x + places(rows, columns, x.shape[1]), x)
        return self.ln_post(out) @ self.proj


class MiniCPMV(torch.nn.Module):
    """Tower and resampler."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        size = {"image_size": POSITIONS * TOWER["patch_size"], "hidden_act": "gelu_pytorch_tanh"}
        self.vpm = Idefics2VisionTransformer(Idefics2VisionConfig(**{**TOWER, **size}))
        self.resampler = Resampler(TOWER["hidden_size"], text.hidden_size)

    def features(self, tile: torch.Tensor) -> torch.Tensor:
        """Embeddings [N_QUERIES, width]."""
        rows, columns = (n // TOWER["patch_size"] for n in tile.shape[2:])
        return self.resampler(self.vpm(tile).last_hidden_state[0], rows, columns)


def write(model: MiniCPMV, folder: Path, out: Path, converter: Converter) -> None:
    """Its mmproj."""
    w = gguf.GGUFWriter(out, "clip")
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("resampler")
    w.add_int32("clip.minicpmv_version", 3)
    w.add_uint32("clip.minicpmv_query_num", N_QUERIES)
    w.add_vision_image_size(SIDE)
    w.add_vision_patch_size(TOWER["patch_size"])
    w.add_vision_embedding_length(TOWER["hidden_size"])
    w.add_vision_feed_forward_length(TOWER["intermediate_size"])
    w.add_vision_block_count(TOWER["num_hidden_layers"])
    w.add_vision_projection_dim(0)
    w.add_vision_head_count(TOWER["num_attention_heads"])
    w.add_vision_attention_layernorm_eps(EPS)
    w.add_vision_use_gelu(True)
    w.add_vision_image_mean([MEAN] * 3)
    w.add_vision_image_std([STD] * 3)
    for name, value in tensors(model).items():
        w.add_tensor(name, np.ascontiguousarray(value, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tensors(model: MiniCPMV) -> dict[str, Array]:
    """By their names in the file."""
    out = {"resampler.pos_embed_k": np.zeros((1, HEAD))}  # has to be there; llama.cpp computes it
    for name, value in model.vpm.state_dict().items():
        out[NAMES.get(name) or gguf_name(f"vision_tower.vision_model.{name}")] = value.numpy()
    for name, value in model.resampler.state_dict().items():
        if name == "proj":
            out["resampler.proj.weight"] = value.numpy().T
        elif "in_proj" in name:
            for one, part in zip("qkv", value.numpy().reshape(3, -1, *value.shape[1:]), strict=True):
                out[f"resampler.attn.{one}.{name.removeprefix('attn.in_proj_')}"] = part
        else:
            out[f"resampler.{NAMES.get(name, name)}"] = value.numpy()
    return out


def whole_first(picture: Array) -> list[Array]:
    *tiles, whole = grid(picture)
    return [whole, *tiles]


MEDIA = {
    "minicpm-v-2.6": Media(
        "qwen2",
        MiniCPMV,
        MiniCPMV.features,
        write,
        whole_first,
        (2 * SIDE, 2 * SIDE),
        markers=("\n", "<image>", "</image>", "<slice>", "</slice>"),
    )
}
