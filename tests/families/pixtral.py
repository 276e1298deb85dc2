"""Vision models with Pixtral's tower, which takes pictures of any shape: Pixtral, Mistral Small 3.1 and LightOnOCR.

In the first two a special token ends each row but the last. llama.cpp's encoder returns it among the visual tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from oracle.llama import Image, Piece

from .media import MORE, TOWER, Array, Media, alone, marker_ids, tensor_of, write_by_converter

BREAK, END = "[IMG_BREAK]", "[IMG_END]"
IMAGE = 3  # the token in whose place visual tokens come
ROWS, COLUMNS = 5, 6  # of visual tokens in a picture
PATCH = TOWER["patch_size"]
VISION = {**TOWER, **MORE, "image_size": 2 * COLUMNS * PATCH, "head_dim": 32, "hidden_act": "silu"}


def parts(text: Any) -> dict[str, Any]:
    """Arguments of all three."""
    vision = hf.PixtralVisionConfig(**VISION)
    return {"vision_config": vision, "text_config": text, "tie_word_embeddings": text.tie_word_embeddings}


def pixtral(text: Any) -> Any:
    config = hf.LlavaConfig(
        **parts(text), vision_feature_layer=-1, vision_feature_select_strategy="full", image_token_index=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def mistral3(text: Any) -> Any:
    config = hf.Mistral3Config(**parts(text), vision_feature_layer=-1, spatial_merge_size=2, image_token_index=IMAGE)
    return hf.Mistral3ForConditionalGeneration(config)


def lighton_ocr(text: Any) -> Any:
    config = hf.LightOnOcrConfig(**parts(text), spatial_merge_size=2, image_token_id=IMAGE)
    return hf.LightOnOcrForConditionalGeneration(config)


def rows_of(model: Any, picture: torch.Tensor) -> torch.Tensor:
    """Embeddings [rows, columns, width]."""
    out = tensor_of(model.get_image_features(pixel_values=picture, image_sizes=[tuple(picture.shape[2:])]))
    return out.reshape(ROWS, COLUMNS, -1)


def features(model: Any, picture: torch.Tensor) -> torch.Tensor:
    """Embeddings of rows that a token ends."""
    rows = rows_of(model, picture)
    end = model.get_input_embeddings().weight[marker_ids(model.config.text_config)[BREAK]]
    return torch.cat([rows, end.expand(len(rows), 1, -1)], 1).flatten(0, 1)[:-1]


def plain_features(model: Any, picture: torch.Tensor) -> torch.Tensor:
    return rows_of(model, picture).flatten(0, 1)


def logits(model: Any, pieces: list[Piece], picture: torch.Tensor) -> Array:
    """Logits [n, vocabulary] of all rows by Hugging Face's own forward pass, to which ends of rows are text."""
    markers = marker_ids(model.config.text_config)
    between = [markers[BREAK]] if BREAK in markers else []
    image = [token for _ in range(ROWS) for token in [IMAGE] * COLUMNS + between][: -len(between) or None]
    ids = [token for piece in pieces for token in (image if isinstance(piece, Image) else piece)]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([ids]),
            pixel_values=picture,
            image_sizes=torch.tensor([picture.shape[2:]]),
            use_cache=False,
        )
    return out.logits[0].numpy()


def old_name(name: str) -> str:
    """Of a weight in repositories whose tower is in no "model". The converter wants a row of the decoder's embeddings,
    and passes over all weights of a "language_model"."""
    return name.removeprefix("model.").replace("language_model.embed_tokens", "embed_tokens")


MEDIA = {
    "pixtral": Media(
        "llama",
        pixtral,
        features,
        write_by_converter("LlavaForConditionalGeneration", named=old_name),
        alone,
        (ROWS * PATCH, COLUMNS * PATCH),
        markers=(BREAK, END),
        whole=logits,
    ),
    "mistral3": Media(
        "mistral3",
        mistral3,
        features,
        write_by_converter("Mistral3ForConditionalGeneration", named=old_name),
        alone,
        (2 * ROWS * PATCH, 2 * COLUMNS * PATCH),
        markers=(BREAK, END),
        whole=logits,
    ),
    "lighton-ocr": Media(
        "qwen3",
        lighton_ocr,
        plain_features,
        write_by_converter("LightOnOCRForConditionalGeneration"),
        alone,
        (2 * ROWS * PATCH, 2 * COLUMNS * PATCH),
        markers=("<|im_start|>", "<|im_end|>"),
        whole=logits,
    ),
}
