"""A tiny model of each family, made by Hugging Face's classes with random weights.

TEXT has decoders alone, whose images are random embeddings. Each is saved as Hugging Face saves it, so that upstream's
converter reads what it reads of a trained one. Two architectures have no class of their own there and are written from
one that computes the same: internlm2 from Llama, minicpm from Granite.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from cases import SEED
from safetensors.torch import load_file, save_file

from .convert import MARKERS

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 352,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
Change = Callable[[dict, dict], None]  # of config.json and the weights, in place


@dataclass(frozen=True)
class Text:
    """A decoder: the architecture of the file, the config class and its arguments.

    image_scale: as HfDecoder's; streams: layers before which more is added to an image's rows;
    change: what upstream's converter wants to find instead of what Hugging Face saves;
    most_error: NMSE of logits that floats explain, some four times the worst seen (llama.cpp has GELU in a table of F16
    on the CPU: choices are as inexact then).
    """

    arch: str
    config: type
    extra: dict[str, Any] = field(default_factory=dict)
    image_scale: float = 1.0
    streams: tuple[int, ...] = ()
    change: Change | None = None
    most_error: float = 1e-9

    def with_markers(self, markers: tuple[str, ...]) -> Text:
        """The same with special tokens at the end of its vocabulary."""
        return replace(self, extra={**self.extra, MARKERS: [*self.extra.get(MARKERS, []), *markers]})

    def save(self, model: Any, folder: Path) -> None:
        """Writes what upstream's converter reads."""
        save(model, folder, self.change)

    def oracle(self, model: Any) -> Any:
        """The HfDecoder of a model."""
        from .reference import HfDecoder, StreamsDecoder

        if self.streams:
            return StreamsDecoder(model.model, model.lm_head, self.streams)
        return HfDecoder(model.model, model.lm_head, self.image_scale)

    def make(self) -> Any:
        """The model, F32, with weights that keep the residual stream of one size and its attention peaked."""
        torch.manual_seed(SEED)  # what randomize adds to: sinks and biases of some classes are drawn
        made = hf.AutoModelForCausalLM.from_config(self.config(**{**SIZES, **self.extra}), dtype=torch.float32)
        randomize(made)
        return made.eval()


def randomize(model: torch.nn.Module) -> None:
    """Seeded weights: matrices that keep the size of what they are given, norms about what they are at first."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim < 2:
                p.add_(0.1 * drawn(p))
            elif "embed_tokens" in name:
                p.copy_(drawn(p))
            else:
                inputs = p.shape[-1] if ".experts." in name else p[0].numel()
                p.copy_(drawn(p) * (1.2 if "q_proj" in name or "k_proj" in name else 1.0) * inputs**-0.5)


def save_words(folder: Path) -> None:
    """Writes a tokenizer.json, whose words the converter counts."""
    words = {str(i): i for i in range(SIZES["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))


def save(model: Any, folder: Path, change: Change | None = None) -> None:
    """Writes config.json, model.safetensors and tokenizer.json."""
    model.save_pretrained(folder)
    save_words(folder)
    if change:
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        change(config, weights)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            {k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )


def as_internlm2(config: dict, weights: dict[str, torch.Tensor]) -> None:
    """Llama as InternLM2 has it: q, k and v of each group of heads in one matrix."""
    names = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    groups, width = config["num_key_value_heads"], config["hidden_size"]
    for i in range(config["num_hidden_layers"]):
        q, k, v = (weights.pop(f"model.layers.{i}.self_attn.{x}_proj.weight") for x in "qkv")
        rows = [x.reshape(groups, -1, width) for x in (q, k, v)]
        weights[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(rows, 1).reshape(-1, width)
    for name in list(weights):
        new = name
        for old, other in names.items():
            new = new.replace(old, other)
        weights[new] = weights.pop(name)
    config["architectures"], config["bias"] = ["InternLM2ForCausalLM"], False


def as_minicpm(config: dict, weights: dict[str, torch.Tensor]) -> None:
    """Granite as MiniCPM names its scales."""
    config["architectures"] = ["MiniCPMForCausalLM"]
    config["scale_emb"] = config["embedding_multiplier"]
    config["scale_depth"] = config["residual_multiplier"] * config["num_hidden_layers"] ** 0.5
    config["dim_model_base"] = config["hidden_size"] / config["logits_scaling"]


def with_streams(*layers: int) -> Change:
    """Granite as Granite 4 Vision's decoder: the first of its projectors is what an image's rows begin with."""

    def change(config: dict, weights: dict[str, torch.Tensor]) -> None:
        config["deepstack_layer_map"] = [[0, 0], *([1 + i, layer] for i, layer in enumerate(layers))]
        config["text_config"] = {"num_hidden_layers": config["num_hidden_layers"]}
        config["vision_config"] = {"num_hidden_layers": 1 + len(layers)}

    return change


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

TEXT = {
    "llama": Text("llama", hf.LlamaConfig),
    "qwen2": Text("qwen2", hf.Qwen2Config),
    "qwen3": Text("qwen3", hf.Qwen3Config, {"head_dim": 32}),
    "qwen3moe": Text(
        "qwen3moe",
        hf.Qwen3MoeConfig,
        {"head_dim": 32, "norm_topk_prob": True, **EXPERTS},  # llama.cpp always scales the chosen experts to 1
        most_error=1e-7,
    ),
    "mistral3": Text("mistral3", hf.Ministral3Config, {"head_dim": 32, "rope_parameters": YARN}),
    "phi2": Text(
        "phi2",
        hf.PhiConfig,
        {"num_key_value_heads": 4, "intermediate_size": 512, "partial_rotary_factor": 0.5},
        most_error=1e-6,
    ),
    "phi3": Text(
        "phi3",
        hf.Phi3Config,
        # llama.cpp looks this token up in every model of that name
        {"sliding_window": None, "original_max_position_embeddings": 2048, MARKERS: ["<|endoftext|>"]},
    ),
    "internlm2": Text("internlm2", hf.LlamaConfig, change=as_internlm2),
    "stablelm": Text("stablelm", hf.StableLmConfig, {"use_parallel_residual": False}),
    "stablelm-parallel": Text("stablelm", hf.StableLmConfig, {"use_parallel_residual": True, "use_qkv_bias": True}),
    "minicpm": Text("minicpm", hf.GraniteConfig, {**SCALES, "attention_multiplier": 32**-0.5}, change=as_minicpm),
    "granite": Text("granite", hf.GraniteConfig, {**SCALES, "attention_multiplier": 0.25}),
    "granite4-vision": Text(
        "granite",
        hf.GraniteConfig,
        {**SCALES, "attention_multiplier": 0.25},
        streams=(1, 3, 4),
        change=with_streams(1, 3, 4),
    ),
    "gemma": Text(
        "gemma", hf.GemmaConfig, {"head_dim": 32, "tie_word_embeddings": True}, image_scale=128**0.5, most_error=1e-8
    ),
    "chatglm": Text("chatglm", hf.GlmConfig, {"head_dim": 32, "seq_length": SIZES["max_position_embeddings"]}),
}
