"""From a checkpoint to files: Hugging Face folder, mmproj, LoRA and merged text model, and their parity.

    python scripts/smol_llava/pair.py --state DIR gguf CHECKPOINT OUT [--type Q8_0]
    python scripts/smol_llava/pair.py --state DIR hf CHECKPOINT OUT
    python scripts/smol_llava/pair.py --state DIR parity CHECKPOINT [--prompts 100]

`gguf` writes mmproj-smol-*.gguf, and for a checkpoint with a LoRA smol-lora-f16.gguf (to go with the
package's own text model) and smol-*.gguf (the sum of both). `parity` compares the F32 pair on st3-edge's
libraries, ST³ off, with Hugging Face's LlavaForConditionalGeneration.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import assets
import gguf
import llama
import numpy as np
import smol
import torch
from embedded import gguf_writer
from pictures import scene
from talk import held_out_questions
from vision import MEAN, SHAPE, STD

IMAGE_TOKEN = 49152  # Hugging Face's placeholder: one row more than the text model has


def config() -> dict:
    """config.json of the pair, as transformers has it for LLaVA-1.5."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": 576,
        "image_token_index": IMAGE_TOKEN,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "llama",
            "vocab_size": IMAGE_TOKEN + 1,
            "hidden_size": llama.WIDTH,
            "intermediate_size": llama.FFN,
            "num_hidden_layers": llama.LAYERS,
            "num_attention_heads": llama.HEADS,
            "num_key_value_heads": llama.KV_HEADS,
            "head_dim": llama.HEAD,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": llama.THETA, "rope_type": "default"},
            "bos_token_id": smol.BOS,
            "eos_token_id": smol.EOS,
            "pad_token_id": smol.EOS,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": SHAPE.vision_width,
            "intermediate_size": SHAPE.vision_ffn,
            "num_hidden_layers": SHAPE.vision_layers,
            "num_attention_heads": SHAPE.vision_heads,
            "image_size": SHAPE.side,
            "patch_size": SHAPE.patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": SHAPE.vision_width,
        },
    }


class Trained:
    """A checkpoint beside the text model it was trained with."""

    def __init__(self, checkpoint: Path, state: Path) -> None:
        self.file = smol.extract(state)
        net = torch.load(checkpoint, map_location="cpu", weights_only=True)["net"]
        self.vision = {k: v.float().numpy() for k, v in net.items() if k.startswith(("vision_model.", "projector."))}
        self.lora: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # text matrix -> A [rank, in], B [out, rank]
        for key, b in net.items():
            if key.endswith("lora_b"):
                name = key.removeprefix("decoder.").removesuffix("lora_b")
                down = net[key.replace("lora_b", "lora_a")]
                self.lora[f"{name}weight"] = down.float().numpy(), b.float().numpy()

    def text(self) -> dict[str, np.ndarray]:
        """The text model with its LoRA added, float32 by Hugging Face name."""
        out = {k: v.numpy() for k, v in llama.weights(self.file).items()}
        for key, (down, up) in self.lora.items():
            out[key] = out[key] + up @ down
        return out

    def tower(self) -> dict[str, np.ndarray]:
        """Encoder and projector by a Hugging Face file's names."""
        return {
            ("vision_tower." if k.startswith("vision") else "multi_modal_projector.") + k.removeprefix("projector."): v
            for k, v in self.vision.items()
        }


def write_mmproj(trained: Trained, path: Path, file_type: str) -> None:
    """The encoder and the projector."""
    mean, std = MEAN.tolist(), STD.tolist()
    gguf_writer.write_mmproj(path, trained.tower(), config(), mean, std, file_type, name="SmolLM2 that sees, vision")


def turned(name: str, w: np.ndarray) -> np.ndarray:
    """Rows of q and k matrices in ggml's rotary order."""
    if match := re.search(r"\.([qk])_proj\.", name):
        return gguf_writer.permute(w, llama.HEADS if match[1] == "q" else llama.KV_HEADS)
    return w


def write_lora(trained: Trained, path: Path) -> None:
    """The LoRA as llama.cpp's adapter file, F16."""
    rank = next(iter(trained.lora.values()))[0].shape[0]
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_name("SmolLM2 that sees, LoRA")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", float(rank))
    for key, (down, up) in trained.lora.items():
        name = gguf_writer.gguf_name(f"language_model.{key}")
        w.add_tensor(f"{name}.lora_a", down.astype(np.float16))
        w.add_tensor(f"{name}.lora_b", np.ascontiguousarray(turned(key, up), np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_text(trained: Trained, path: Path, file_type: str) -> None:
    """The text model with the LoRA in it: the package's file with other weights."""
    kinds = {
        "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }
    matrix, file_kind = kinds[file_type]
    reader = smol.reader(trained.file)
    w = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        w.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    w.add_file_type(file_kind)
    for key, value in trained.text().items():
        name = gguf_writer.gguf_name(f"language_model.{key}")
        kind = matrix if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(turned(key, value), np.float32), kind)
        w.add_tensor(name, packed, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_gguf(trained: Trained, folder: Path, file_type: str) -> tuple[Path, Path]:
    """Everything that llama.cpp needs; returns the merged text model and the mmproj, which is F16 beside BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = file_type.lower()
    text, mmproj = folder / f"smol-{suffix}.gguf", folder / f"mmproj-smol-{suffix}.gguf"
    write_mmproj(trained, mmproj, "F16" if file_type == "BF16" else file_type)
    write_text(trained, text, file_type)
    if trained.lora:
        write_lora(trained, folder / "smol-lora-f16.gguf")
    return text, mmproj


def write_hf(trained: Trained, folder: Path) -> None:
    """config.json and float32 safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"language_model.{k}": v for k, v in trained.text().items()}
    embed = weights["language_model.model.embed_tokens.weight"]
    weights["language_model.model.embed_tokens.weight"] = np.concatenate([embed, embed[:1] * 0])
    weights |= trained.tower()
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    smol.tokenizer(trained.file).save(str(folder / "tokenizer.json"))


def parity(trained: Trained, state: Path, prompts: int) -> dict:
    """How well llama.cpp's logits, with flash attention and without, agree with Hugging Face's where answers begin.

    Weights are F32 on both sides.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    import native_runtime
    import native_vision
    import transformers

    a, tokenizer = assets.load(state), smol.tokenizer(trained.file)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_hf(trained, folder)
        reference = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        text, mmproj = write_gguf(trained, folder, "F32")
        libraries = native_runtime.built()
        rt = native_runtime.Runtime(libraries)
        model = native_runtime.Model(rt, text)
        sight = native_vision.Vision(model, mmproj, threads=2)
        # flash attention takes K and V as F16 and sums in it
        contexts = {
            name: native_runtime.Context(model, n_ctx=1024, kv="F32", threads=2, flash=name == "flash")
            for name in ("plain", "flash")
        }
        found = {name: {"argmax_equal": 0, "worst_nmse": 0.0} for name in contexts}
        before, done, i = tokenizer.encode(smol.BEFORE_IMAGE).ids, 0, 0
        while done < prompts:
            s = scene(a, i)
            picture = np.array(s.image)
            image = sight.encode(picture)
            pixels = ((torch.from_numpy(picture).float() / 255 - MEAN) / STD).permute(2, 0, 1)[None]
            for q in held_out_questions(s, i, "known", a.names)[: prompts - done]:
                after = tokenizer.encode("\n" + smol.turn(q.text)).ids
                ids = torch.tensor([[*before, *[IMAGE_TOKEN] * 576, *after]])
                with torch.no_grad():
                    out = reference(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
                want = out.logits[0, -1, :IMAGE_TOKEN].numpy()
                for name, ctx in contexts.items():
                    ctx.clear()
                    if ctx.prefill([before, image, after]):
                        raise RuntimeError("llama.cpp could not read the prompt")
                    got, of = ctx.logits(), found[name]
                    of["argmax_equal"] += int(got.argmax() == want.argmax())
                    of["worst_nmse"] = max(of["worst_nmse"], float(np.square(got - want).sum() / np.square(want).sum()))
                done += 1
            i += 1
        for part in (*contexts.values(), sight, model, rt):
            part.close()
    return {"prompts": done, **found}


def main() -> None:
    """Parse the command line and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=os.environ.get("ST3_SMOL_STATE"), required=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("gguf", "hf", "parity"):
        sub = commands.add_parser(name)
        sub.add_argument("checkpoint", type=Path)
        if name != "parity":
            sub.add_argument("out", type=Path)
        if name == "gguf":
            sub.add_argument("--type", default="Q8_0", choices=["F32", "F16", "BF16", "Q8_0"])
    sub.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    if not args.state:
        parser.error("name the folder for data and checkpoints: --state DIR")
    trained = Trained(args.checkpoint, Path(args.state))
    if args.command == "gguf":
        write_gguf(trained, args.out, args.type)
        for path in sorted(args.out.glob("*.gguf")):
            print(path, path.stat().st_size)
    elif args.command == "hf":
        write_hf(trained, args.out)
    else:
        print(json.dumps(parity(trained, Path(args.state), args.prompts)))


if __name__ == "__main__":
    main()
