"""Vision models that Hugging Face has as a whole, the decoder in them: M-RoPE, deepstack, sliding windows.

WHOLE has the recipes of their decoders, which make the whole model, MEDIA_OF_WHOLE what mtmd shows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from oracle.llama import Image, Piece
from safetensors.torch import save_file

from .convert import MARKERS, Converter
from .media import MEAN, SIDE, STD, Array, Media, alone, tensor_of
from .recipes import EXPERTS, ROPE, SEED, SIZES, Text, randomize, save_words
from .reference import HfDecoder, MropeDecoder, WindowDecoder

IMAGE = 3  # the token in whose place visual tokens come
PATCH, MERGE = 14, 2


@dataclass(frozen=True)
class Whole(Text):
    """A decoder in its vision model. `config`: the vision model's class; `extra`: arguments of the decoder's config;
    more: those of the vision model's; preprocessor: of preprocessor_config.json; decoder: its oracle."""

    model: Callable[[Any], Any] | None = None
    more: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    decoder: Callable[[Any], HfDecoder] | None = None

    def make(self) -> Any:
        """The vision model, F32."""
        text = {**SIZES, **self.extra}
        torch.manual_seed(SEED)
        made = self.model(self.config(text_config=text, image_token_id=IMAGE, **self.more)).to(torch.float32)
        randomize(made)
        return made.eval()

    def save(self, model: Any, folder: Path) -> None:
        """Writes it, with tensors named as in the repositories of trained ones, where the vision half is no part of
        "model"."""
        folder.mkdir()
        weights = {k.replace("model.visual.", "visual."): v for k, v in model.state_dict().items()}
        if self.config is hf.Gemma3Config:
            weights = {
                k.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model."): v
                for k, v in weights.items()
                if k != "lm_head.weight"
            }
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        if self.change:
            self.change(config, weights)
        save_file(
            {k: v.contiguous().clone() for k, v in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        config[MARKERS] = self.extra.get(MARKERS, [])
        (folder / "config.json").write_text(json.dumps(config, default=str))
        seen = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, **self.preprocessor}
        (folder / "preprocessor_config.json").write_text(json.dumps(seen))
        save_words(folder)

    def oracle(self, model: Any) -> HfDecoder:
        """Its decoder's."""
        return self.decoder(model)


def write(model: Any, folder: Path, out: Path, converter: Converter) -> None:
    """The mmproj."""
    recipe = next(r for r in WHOLE.values() if r.model is type(model))
    recipe.save(model, folder)
    converter(folder, out, mmproj=True)


def patches(picture: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture [1, 3, height, width] as Qwen2VLImageProcessor lays it out, patches of two equal frames, and its grid
    [1, 3]."""
    rows, columns = (n // size for n in picture.shape[2:])
    tiles = picture.reshape(1, 3, rows // MERGE, MERGE, size, columns // MERGE, MERGE, size)
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(rows * columns, 3, 1, size, size).expand(-1, -1, 2, -1, -1)
    return tiles.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def qwen_features(model: Any, picture: torch.Tensor) -> torch.Tensor:
    """Visual tokens, and behind each what deepstack adds to it."""
    pixels, grid = patches(picture, model.config.vision_config.patch_size)
    out = model.model.get_image_features(pixel_values=pixels, image_grid_thw=grid)
    deepstack = [layer[0] for layer in getattr(out, "deepstack_features", None) or []]
    return torch.cat([out.pooler_output[0], *deepstack], -1)


def ids_of(pieces: list[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, n] of pieces, and 1 for those of images."""
    ids = [
        IMAGE if isinstance(p, Image) else t
        for p in pieces
        for t in (range(len(p.embd)) if isinstance(p, Image) else p)
    ]
    kinds = [int(isinstance(p, Image)) for p in pieces for _ in (p.embd if isinstance(p, Image) else p)]
    return torch.tensor([ids]), torch.tensor([kinds])


def qwen_logits(model: Any, pieces: list[Piece], picture: torch.Tensor) -> Array:
    """Logits [n, vocabulary] of all rows, from the pixels."""
    ids, kinds = ids_of(pieces)
    pixels, grid = patches(picture, model.config.vision_config.patch_size)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False)
    return out.logits[0].numpy()


def gemma_logits(model: Any, pieces: list[Piece], picture: torch.Tensor) -> Array:
    """The same."""
    ids, kinds = ids_of(pieces)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=picture, token_type_ids=kinds, use_cache=False)
    return out.logits[0].numpy()


def gemma_features(model: Any, picture: torch.Tensor) -> torch.Tensor:
    return tensor_of(model.model.get_image_features(pixel_values=picture))


QWEN_TOWER = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
QWEN2 = {"rope_parameters": {**ROPE, "mrope_section": [8, 4, 4]}}
VISION_MARKERS = ("<|vision_start|>", "<|vision_end|>")

QWEN3_TOWER = {
    **QWEN_TOWER,
    "patch_size": PATCH,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
QWEN3 = {"head_dim": 32, "rope_parameters": {**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}


def mrope_decoder(model: Any) -> HfDecoder:
    """The decoder of a model without deepstack."""
    return MropeDecoder(model.model.language_model, model.lm_head)


def turned_experts(config: dict, weights: dict[str, torch.Tensor]) -> None:
    """Matrices of experts as the repositories have them: input by output."""
    for name in weights:
        if ".experts." in name:
            weights[name] = weights[name].mT


WHOLE = {
    "qwen2-vl": Whole(
        "qwen2vl",
        hf.Qwen2VLConfig,
        QWEN2,
        model=hf.Qwen2VLForConditionalGeneration,
        more={
            "vision_config": {
                "depth": 4,
                "embed_dim": 64,
                "mlp_ratio": 2,
                "num_heads": 2,
                "hidden_size": SIZES["hidden_size"],
                "patch_size": PATCH,
            }
        },
        preprocessor={},
        decoder=mrope_decoder,
    ),
    "qwen2.5-vl": Whole(
        "qwen2vl",
        hf.Qwen2_5_VLConfig,
        QWEN2,
        model=hf.Qwen2_5_VLForConditionalGeneration,
        more={
            "vision_config": {
                **QWEN_TOWER,
                "patch_size": PATCH,
                "fullatt_block_indexes": [1, 3],
                "window_size": 112,
                "tokens_per_second": 2,
            }
        },
        preprocessor={},
        decoder=mrope_decoder,
    ),
    "qwen3-vl": Whole(
        "qwen3vl",
        hf.Qwen3VLConfig,
        QWEN3,
        model=hf.Qwen3VLForConditionalGeneration,
        more={"vision_config": QWEN3_TOWER},
        preprocessor={},
        decoder=lambda m: MropeDecoder(m.model.language_model, m.lm_head, n_deepstack=2),
    ),
    "qwen3-vl-moe": Whole(
        "qwen3vlmoe",
        hf.Qwen3VLMoeConfig,
        {**QWEN3, **EXPERTS},
        change=turned_experts,
        most_error=1e-7,
        model=hf.Qwen3VLMoeForConditionalGeneration,
        more={"vision_config": QWEN3_TOWER},
        preprocessor={},
        decoder=lambda m: MropeDecoder(m.model.language_model, m.lm_head, n_deepstack=2),
    ),
    "gemma3": Whole(
        "gemma3",
        hf.Gemma3Config,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        most_error=1e-8,
        model=hf.Gemma3ForConditionalGeneration,
        more={
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 8,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 16,
        },
        preprocessor={"image_seq_length": 16},
        decoder=lambda m: WindowDecoder(m.model.language_model, m.lm_head),
    ),
}

MEDIA_OF_WHOLE = {
    **{
        name: Media(
            name,
            None,
            qwen_features,
            write,
            alone,
            (5 * PATCH * MERGE, 6 * PATCH * MERGE),
            markers=VISION_MARKERS,
            whole=qwen_logits,
        )
        for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
    },
    "gemma3": Media(
        "gemma3", None, gemma_features, write, alone, markers=("<start_of_image>", "<end_of_image>"), whole=gemma_logits
    ),
}
