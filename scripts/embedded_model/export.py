"""From a training checkpoint to a Hugging Face folder, and from there to the GGUF pair.

python export.py hf CHECKPOINT HF_DIR
python export.py gguf HF_DIR OUT_DIR [--type Q8_0|F16|F32]
python export.py pictures OUT_DIR             the demo pictures and questions.json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import gguf_writer
import numpy as np
import questions
import scenes
import vocab

NAME = "st3-demo"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
DEMO_SCENES = (24, 25, 10, 27, 2)  # questions and caption objects that the shipped weights get right


def hf_config(shape) -> dict:
    """config.json of a `modeling.Shape`, as transformers writes it for LLaVA-1.5."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_seq_length": shape.grid**2,
        "image_token_index": vocab.IMAGE,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "bos_token_id": vocab.BOS,
        "eos_token_id": vocab.EOS,
        "text_config": {
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.width,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.width // shape.head,
            "num_key_value_heads": shape.width // shape.head,
            "head_dim": shape.head,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": shape.context,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "bos_token_id": vocab.BOS,
            "eos_token_id": vocab.EOS,
            "pad_token_id": vocab.UNK,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_ffn,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.side,
            "patch_size": shape.patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": shape.vision_width,
        },
    }


def fast_tokenizer(sp):
    """The SentencePiece model as a `tokenizers.Tokenizer`: BPE whose merges follow the pieces' ranks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    normal = [p for p, i in pieces.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
    merges = []
    for piece in normal:
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in pieces and piece[k:] in pieces]
        merges += sorted(((pieces[piece], pieces[a], pieces[b]), a, b) for a, b in pairs)
    merges.sort(key=lambda m: m[0])
    out = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=[(a, b) for _, a, b in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    out.normalizer = normalizers.Replace(" ", "\u2581")
    out.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    out.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>")])
    return out


def write_hf(checkpoint: Path, folder: Path, tokenizer_model: Path) -> None:
    """Write the Hugging Face folder: config, float32 safetensors, tokenizer, picture processor."""
    import modeling
    import torch
    from safetensors.torch import save_file
    from train import n_layers

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    shape = modeling.Shape()
    if n_layers(state) != shape.layers:
        state = modeling.deepen(state, n_layers(state), shape.layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.float().contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    sp = vocab.load(tokenizer_model)
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    fast_tokenizer(sp).save(str(folder / "tokenizer.json"))
    files = {
        "config.json": hf_config(shape),
        "generation_config.json": {
            "bos_token_id": vocab.BOS,
            "eos_token_id": vocab.EOS,
            "pad_token_id": vocab.UNK,
            "do_sample": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "padding_side": "left",
            "chat_template": vocab.CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.context,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": shape.side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": shape.side, "width": shape.side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": STD,
            "do_convert_rgb": True,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": shape.patch,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def pair_paths(folder: Path, file_type: str) -> tuple[Path, Path]:
    """Names of the text and the mmproj file."""
    suffix = file_type.lower()
    return folder / f"{NAME}-{suffix}.gguf", folder / f"mmproj-{NAME}-{suffix}.gguf"


def write_gguf(hf: Path, folder: Path, file_type: str) -> tuple[Path, Path]:
    """Write the GGUF pair of a Hugging Face folder; returns both paths."""
    from safetensors.numpy import load_file

    weights, config = load_file(hf / "model.safetensors"), json.loads((hf / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    text, mmproj = pair_paths(folder, file_type)
    gguf_writer.write_text(text, weights, config, vocab.load(hf / "tokenizer.model"), vocab.CHAT_TEMPLATE, file_type)
    gguf_writer.write_mmproj(mmproj, weights, config, MEAN, STD, file_type)
    return text, mmproj


def read_weights(folder: Path) -> dict:
    """Torch weights by Hugging Face name, from a Hugging Face folder or a folder with the GGUF pair.

    Raises FileNotFoundError where there is neither. Of the GGUF pair, the tower's unused last block
    comes back as it started.
    """
    import modeling
    import torch
    from safetensors.torch import load_file

    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    for kind in ("F32", "F16", "Q8_0"):
        text, mmproj = pair_paths(folder, kind)
        if text.is_file() and mmproj.is_file():
            found = {k: torch.from_numpy(np.array(v)) for k, v in gguf_writer.read_pair(text, mmproj).items()}
            layers = 1 + max(
                int(k.split(".layers.")[1].split(".")[0]) for k in found if "language_model.model.layers." in k
            )
            return {**modeling.Llava(modeling.Shape(layers=layers)).state_dict(), **found}
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor a {NAME} GGUF pair")


def write_pictures(folder: Path) -> None:
    """Draw the demo pictures, with questions and captions in questions.json."""
    rows = []
    for number, index in enumerate(DEMO_SCENES, 1):
        picture = scenes.scene(index, "demo")
        name = f"scene-{number}.png"
        picture.image.save(folder / name, optimize=True)
        asked = [{"q": q.text, "a": q.answer} for q in questions.held_out_questions(index, split="demo")]
        rows.append({"picture": name, "questions": asked, "caption": questions.caption(picture)})
    (folder / "questions.json").write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    hf = commands.add_parser("hf")
    hf.add_argument("checkpoint", type=Path)
    hf.add_argument("folder", type=Path)
    hf.add_argument("--tokenizer", type=Path, default=vocab.MODEL)
    pair = commands.add_parser("gguf")
    pair.add_argument("hf", type=Path)
    pair.add_argument("folder", type=Path)
    pair.add_argument("--type", default="Q8_0", choices=["F32", "F16", "Q8_0"])
    commands.add_parser("pictures").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "hf":
        write_hf(args.checkpoint, args.folder, args.tokenizer)
    elif args.command == "gguf":
        for path in write_gguf(args.hf, args.folder, args.type):
            print(path, path.stat().st_size)
    else:
        write_pictures(args.folder)


if __name__ == "__main__":
    main()
