"""Decoders of vision models that mtmd serves and that are not pruned."""

from __future__ import annotations

import transformers as hf

from .recipes import ROPE, SIZES, Text

BY_TURNS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 3}
EACH_LAYER = {"vocab_size_per_layer_input": SIZES["vocab_size"]}

OTHERS = {
    "gemma2": Text("gemma2", hf.Gemma2Config, {**BY_TURNS, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "gemma3n": Text(
        "gemma3n",
        hf.Gemma3nTextConfig,
        {
            **BY_TURNS,
            **EACH_LAYER,
            "head_dim": 32,
            "num_kv_shared_layers": 0,  # llama.cpp knows the trained ones by their number of layers
            "hidden_size_per_layer_input": 256,  # of every Gemma 3n
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    "gemma4": Text(
        "gemma4",
        hf.Gemma4TextConfig,
        {
            **BY_TURNS,
            **EACH_LAYER,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
        },
    ),
    "gpt-oss": Text(
        "gpt-oss", hf.GptOssConfig, {**BY_TURNS, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "exaone4": Text("exaone4", hf.Exaone4Config, BY_TURNS),
    "glm4": Text("glm4", hf.Glm4Config, {"head_dim": 32, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}),
    "lfm2": Text(
        "lfm2",
        hf.Lfm2Config,
        {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 3, "conv_L_cache": 3},
    ),
    "nemotron_h": Text(
        "nemotron_h_moe",
        hf.NemotronHConfig,
        {
            "head_dim": 32,
            "layers_block_type": ["linear_attention", "moe", "full_attention"] * 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "qwen35": Text(
        "qwen35",
        hf.Qwen3_5TextConfig,
        {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "full_attention_interval": 2,
        },
    ),
    "deepseek2": Text(
        "deepseek2",
        hf.DeepseekV2Config,
        {
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "head_dim": 16,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": Text(
        "llama4",
        hf.Llama4TextConfig,
        {
            "head_dim": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 192,
            "attention_chunk_size": 64,
        },
    ),
    "ernie4_5": Text("ernie4_5", hf.Ernie4_5Config, {"head_dim": 32}),
}
