"""Vision models of each family: Hugging Face's class with a tiny tower, around a decoder of `recipes.TEXT`.

Upstream's converter writes the mmproj. It refuses CLIP LLaVA, for which this repository's own writer stands in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image as Pictures
from safetensors.torch import save_file

from . import recipes
from .convert import MARKERS, Converter

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "embedded_model"))
import gguf_writer

MEAN, STD = 0.5, 0.25
SIDE = 64  # of a tile
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
MORE = {"num_hidden_layers": 4}  # the converter takes the 3 of "mlp1.3" for the number of a layer
Array = np.ndarray
Write = Callable[[Any, Path, Path, Converter], None]  # a model, a folder to work in, the mmproj to write


@dataclass(frozen=True)
class Media:
    """A vision model.

    text: the decoder's name in recipes.TEXT, or in whole.WHOLE; build: a model of a text config, or its tower and
    projector alone, None: the decoder's recipe makes all of it; features: embeddings [n, width] of a tile,
    float32 [1, 3, height, width]; tiles: what mtmd shows of a picture, uint8 [height, width, 3], in the order of its
    image chunks; size: of the picture, height and width; joined: tiles follow each other and are one image;
    markers: special tokens that the family's prompts have; whole: logits of all rows of a prompt by Hugging Face's own
    forward pass, from the pixels.
    """

    text: str
    build: Callable[[Any], Any] | None
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    write: Write
    tiles: Callable[[Array], list[Array]]
    size: tuple[int, int] = (SIDE, SIDE)
    joined: bool = False
    markers: tuple[str, ...] = ()
    whole: Callable[[Any, list[Any], torch.Tensor], Array] | None = None

    def make(self, lm: Any) -> Any:
        """The model around a decoder, F32."""
        if self.build is None:
            return lm
        torch.manual_seed(recipes.SEED)
        made = self.build(lm.config).to(torch.float32)
        recipes.randomize(made)
        if not hasattr(made, "lm_head"):
            return made.eval()
        made.model.get_decoder().load_state_dict(lm.model.state_dict())
        made.lm_head.load_state_dict(lm.lm_head.state_dict(), strict=False)  # a bias has no place in most classes
        return made.eval()

    def picture(self, number: int) -> Array:
        """A smooth picture, so that two ways to make it smaller agree, uint8 [height, width, 3]."""
        rng = np.random.default_rng([recipes.SEED, 77, number])
        coarse = Pictures.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        return np.asarray(coarse.resize(self.size[::-1], Pictures.Resampling.BICUBIC))

    def pixels(self, tile: Array) -> torch.Tensor:
        """A tile as its tower takes it: float32 [1, 3, height, width]."""
        scaled = (tile.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return torch.from_numpy(scaled.transpose(2, 0, 1)[None].copy())


def marker_ids(text: Any) -> dict[str, int]:
    """Numbers of the special tokens of a text config."""
    markers = getattr(text, MARKERS, [])
    return {name: text.vocab_size - len(markers) + i for i, name in enumerate(markers)}


def tensor_of(out: Any) -> torch.Tensor:
    """The features in what get_image_features returns, [n, width]."""
    while not isinstance(out, torch.Tensor):
        out = out.pooler_output if getattr(out, "pooler_output", None) is not None else out[0]
    return out.reshape(-1, out.shape[-1])


def write_by_converter(
    arch: str | None = None, preprocessor: dict[str, Any] | None = None, named: Callable[[str], str] = str
) -> Write:
    """By upstream's converter, from what Hugging Face saves. arch: the class that it knows the tower by; named: the
    name that it knows a weight by."""

    def write(model: Any, folder: Path, out: Path, converter: Converter) -> None:
        folder.mkdir()
        weights = {named(k): v.contiguous().clone() for k, v in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, default=str))
        markers = marker_ids(model.config.text_config)
        added = [{"content": name, "id": number} for name, number in markers.items()]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        (folder / "tokenizer_config.json").write_text("{}")
        seen = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, **(preprocessor or {})}
        (folder / "preprocessor_config.json").write_text(json.dumps(seen))
        converter(folder, out, mmproj=True, arch=arch)

    return write


def write_llava(model: Any, folder: Path, out: Path, converter: Converter) -> None:
    """LLaVA's, as the embedded model's is written. What puts tiles together in LLaVA-1.6 has no place in the file."""
    weights = {}
    for name, w in model.state_dict().items():
        if name == "model.image_newline":
            continue
        name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
        weights[name.replace("vision_model.vision_model", "vision_model")] = w.numpy()
    pinpoints = [n for size in getattr(model.config, "image_grid_pinpoints", None) or [] for n in size]
    gguf_writer.write_mmproj(out, weights, model.config.to_dict(), [MEAN] * 3, [STD] * 3, "F32", pinpoints=pinpoints)


def alone(picture: Array) -> list[Array]:
    """A picture that is shown as it is."""
    return [picture]


def grid(picture: Array) -> list[Array]:
    """Tiles, row by row, and the whole at the size of one."""
    rows, columns = (n // SIDE for n in picture.shape[:2])
    out = [picture[SIDE * y :, SIDE * x :][:SIDE, :SIDE] for y in range(rows) for x in range(columns)]
    whole = Pictures.fromarray(picture).resize((SIDE, SIDE), Pictures.Resampling.BICUBIC)
    return [*out, np.asarray(whole)]


def llava(text: Any) -> Any:
    vision = hf.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 3}, projection_dim=64)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def llava_next(text: Any) -> Any:
    vision = hf.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 3}, projection_dim=64)
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints, image_token_index=3
    )
    return hf.LlavaNextForConditionalGeneration(config)


def janus(text: Any) -> Any:
    vision = hf.JanusVisionConfig(**TOWER, mlp_ratio=1.5, projection_dim=text.hidden_size)
    painter = hf.JanusVQVAEConfig(base_channels=32, channel_multiplier=[1], num_res_blocks=1, latent_channels=32)
    config = hf.JanusConfig(vision_config=vision, text_config=text, vq_config=painter, image_token_id=3)
    return hf.JanusForConditionalGeneration(config)


def smolvlm(text: Any) -> Any:
    vision = {**TOWER, "size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    config = hf.SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=3)
    return hf.SmolVLMForConditionalGeneration(config)


def internvl(text: Any) -> Any:
    vision = hf.InternVLVisionConfig(
        **{**TOWER, "image_size": [SIDE] * 2, "patch_size": [8, 8], **MORE}, attention_bias=True
    )
    config = hf.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=3, downsample_ratio=0.5, max_dynamic_patch=4
    )
    return hf.InternVLForConditionalGeneration(config)


def plain_features(model: Any, tile: torch.Tensor) -> torch.Tensor:
    return tensor_of(model.model.get_image_features(pixel_values=tile))


def tile_features(model: Any, tile: torch.Tensor) -> torch.Tensor:
    """LLaVA-1.6's, before its tiles are put together: llama.cpp leaves them one after the other."""
    seen = model.model.vision_tower(tile, output_hidden_states=True).hidden_states[-2][:, 1:]
    return tensor_of(model.model.multi_modal_projector(seen))


def one_more_axis(model: Any, tile: torch.Tensor) -> torch.Tensor:
    return tensor_of(model.get_image_features(pixel_values=tile[None]))


IDEFICS3 = ("\n", "\n\n", "<fake_token_around_image>", "<global-img>")
TILED = (*IDEFICS3, *(f"<row_{y}_col_{x}>" for y in range(1, 5) for x in range(1, 5)))


def of_llava(text: str) -> Media:
    return Media(text, llava, plain_features, write_llava, alone)


MEDIA = {
    **{f"llava-{name}": of_llava(name) for name, text in recipes.TEXT.items() if not text.streams},
    "llava-1.6": Media("llama", llava_next, tile_features, write_llava, grid, (2 * SIDE, 2 * SIDE), joined=True),
    "janus": Media("llama", janus, plain_features, write_by_converter(), alone),
    "smolvlm": Media(
        "llama",
        smolvlm,
        one_more_axis,
        write_by_converter(preprocessor={"size": {"longest_edge": 2 * SIDE}}),
        grid,
        (2 * SIDE, 2 * SIDE),
        markers=TILED,
    ),
    "internvl3": Media(
        "qwen2",
        internvl,
        plain_features,
        write_by_converter("InternVisionModel"),
        grid,
        (2 * SIDE, 2 * SIDE),
        joined=True,
        markers=("<img>", "</img>"),
    ),
}
