"""Tiny random models of many architectures, saved by transformers as it would save real ones: in shards, heads tied
where the architecture ties them, experts one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON = {"vocab_size": 257, "max_position_embeddings": 128, "initializer_range": 0.1, "pad_token_id": 0}
COMMON |= {"bos_token_id": 0, "eos_token_id": 0}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDE | {"num_key_value_heads": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Name: configuration class, its arguments.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    # Its tokenizer class appends a token that the vocabulary lacks.
    "qwen2": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True, "vocab_size": 264}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 32}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "phi": ("PhiConfig", WIDE | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", GROUPED | FOUR | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | FOUR | {"head_dim": 16}),
    "phimoe": ("PhimoeConfig", GROUPED | {"num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        WIDE
        | LATENT
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    ),
    "falcon": ("FalconConfig", WIDE | {"num_hidden_layers": 4}),
    "opt": ("OPTConfig", WIDE | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "cohere": ("CohereConfig", GROUPED | {"use_qk_norm": True}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v3")


def write_architecture(folder: Path, name: str) -> Path:
    """Save a random model of an architecture, float32, with norms and biases that are not all alike."""
    import transformers

    kind, arguments = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**(COMMON | arguments))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.data += torch.rand_like(parameter) - 0.5
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder
