"""Shrinks any configuration class of transformers to a tiny random model.

Sizes are known by the names that configurations share (``hidden_size``, ``n_embd``, ``num_experts``); everything else
stays as its class has it, so that what is odd about an architecture stays odd. What the names do not settle is in
``PARTICULARS``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, EXPERTS, VOCABULARY, POSITIONS = 128, 2, 4, 4, 320, 256
LARGEST = 6_000_000  # parameters

# What a size is set to, by the names that configurations have for it. Only names that a configuration has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embed_dim"), HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "dff", "d_ff", "decoder_ffn_dim", "dense_intermediate_size"), 2 * HIDDEN
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_dim", "shared_expert_intermediate_size", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp"),
        64,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_num_primary_experts"), EXPERTS
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "num_selected_experts"),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), POSITIONS
    ),
    "vocab_size": VOCABULARY,
    "head_dim": HIDDEN // HEADS,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip

# What the names do not settle, by model type.
_LATENT = {"head_dim": 16}  # of the rotary part
_HEAD = {"head_dim": HIDDEN // HEADS}
PARTICULARS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "bailing_hybrid": _HEAD | {"group_norm_size": 1, "n_group": 1, "topk_group": 1},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cpmant": {"prompt_types": 2, "prompt_length": 4, "segment_types": 4, "dim_head": 32, "dim_ff": 256},
    "deepseek_v3": _LATENT,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32, "laurel_rank": 16, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
        "num_global_key_value_heads": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": _LATENT | {"zero_expert_num": 2, "num_layers": 1, "ffn_hidden_size": 256},
    "mamba2": {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 2},
    "ministral": _HEAD,
    "nemotron": _HEAD | {"num_key_value_heads": 2},
    "youtu": _LATENT,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Attention without a scale, whose norms a trained model has made small: random ones would let it see one token only.
CALMED = dict.fromkeys(("gemma4_text", "gemma4_unified_text"), ("q_norm", "k_norm"))


def build(model_type: str) -> Any:
    """A random model in float32, eval mode, its norms and biases not all alike."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} is not tiny: {size:,} parameters; see PARTICULARS")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if any(part in name for part in CALMED.get(model_type, ())):
            parameter.data *= 0.25
        if parameter.dim() < 2 and ("norm" in name or name.endswith("bias")):
            parameter.data += 0.2 * (torch.rand_like(parameter) - 0.5)
    return model.eval()


def tiny_config(model_type: str) -> Any:
    """The configuration of ``model_type``, shrunk."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return shrink(CONFIG_MAPPING[model_type], PARTICULARS.get(model_type, {}))


def shrink(kind: Any, particulars: dict[str, Any]) -> Any:
    """A configuration of class ``kind`` with small sizes."""
    default = kind()
    known = default.to_dict()
    aliases = getattr(kind, "attribute_map", {})
    names = {*inspect.signature(kind.__init__).parameters, *known} - {"self", "kwargs"}
    chosen = {key: value for key, value in SIZES.items() if key in names and aliases.get(key, key) == key}
    if known.get("num_key_value_heads") and "num_key_value_heads" in names:
        fewer = known["num_key_value_heads"] != known.get("num_attention_heads")
        chosen["num_key_value_heads"] = HEADS // 2 if fewer else HEADS
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        if isinstance(known.get(key), list | tuple) and known[key]:
            chosen[key] = shortened(list(known[key]))
    for key in ("head_dim", "sliding_window", "q_lora_rank"):  # left to be computed, or switched off
        if known.get(key) is None:
            chosen.pop(key, None)
    return kind(**(chosen | particulars))


def shortened(kinds: list[Any]) -> list[Any]:
    """``LAYERS`` of them, as many different ones as there is room for, in their order."""
    different = list(dict.fromkeys(kinds))[:LAYERS]
    return (different * LAYERS)[:LAYERS]


def write(folder: Path, model_type: str, tokenizer: Any = None) -> Path:
    """Save :func:`build` as transformers saves it, in shards."""
    build(model_type).save_pretrained(folder, max_shard_size="200KB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
