"""A model's configuration as a GGUF file says it, and the tensors that llama.cpp wants beside the model's own.

Facts: ``set_gguf_parameters`` and ``generate_extra_tensors`` of the classes in llama.cpp's ``conversion`` package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.errors import DataError
from quantlab.formats.gguf.architectures import Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
SLIDING_EVERY = {"gemma2": 2, "gemma3": 6}  # as llama.cpp has it: the last of so many blocks sees everything


def read_settings(folder: Path) -> dict[str, Any]:
    """The configuration of the language model in a folder, with all defaults filled in. Imports transformers.

    Raises:
        DataError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(folder).get_text_config().to_dict())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its configuration cannot be read: {error}") from error


def add_settings(writer: GGUFWriter, settings: Mapping[str, Any], held: Architecture, called: str) -> None:
    """Write what llama.cpp must know to run the model.

    Raises:
        DataError: the model does something that llama.cpp does not; says what.
    """
    heads, width = int(settings["num_attention_heads"]), int(settings["hidden_size"])
    kv_heads, head = int(settings.get("num_key_value_heads") or heads), head_size(settings)
    writer.add_vocab_size(int(settings["vocab_size"]))
    writer.add_context_length(int(settings["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_block_count(int(settings["num_hidden_layers"]))
    writer.add_feed_forward_length(int(settings["intermediate_size"]))
    writer.add_head_count(heads)
    if not held.layer_norm:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(float(settings["rms_norm_eps"]))
        writer.add_key_length(head)
        writer.add_value_length(head)
    else:
        writer.add_layer_norm_eps(float(settings["layer_norm_eps"]))
        writer.add_parallel_residual(bool(settings.get("use_parallel_residual", True)))
    if held.experts:
        _add_experts(writer, settings, called)
    _add_attention(writer, settings, held, called)
    _add_rotary(writer, settings, held, head, called)


def _add_experts(writer: GGUFWriter, settings: Mapping[str, Any], called: str) -> None:
    if settings.get("mlp_only_layers") or int(settings.get("decoder_sparse_step") or 1) != 1:
        raise DataError(f"{called}: some of its blocks have no experts, which llama.cpp does not run")
    writer.add_expert_count(expert_count(settings))
    writer.add_expert_used_count(int(settings["num_experts_per_tok"]))
    writer.add_expert_feed_forward_length(int(settings["moe_intermediate_size"]))
    if shared := settings.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(shared))


def _add_attention(writer: GGUFWriter, settings: Mapping[str, Any], held: Architecture, called: str) -> None:
    """Caps of logits, and windows of attention."""
    if cap := settings.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(float(cap))
    if cap := settings.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(cap))
    if held.name == "phi3":
        writer.add_sliding_window(int(settings.get("sliding_window") or 0))
    scale = settings.get("query_pre_attn_scalar")
    if scale and scale not in (
        head_size(settings),
        settings["hidden_size"] / settings["num_attention_heads"],
    ):
        raise DataError(
            f"{called}: its attention is scaled by 1 / sqrt({scale}), which llama.cpp does not do"
        )
    if held.name in SLIDING_EVERY:
        writer.add_sliding_window(int(settings["sliding_window"]))
        every = SLIDING_EVERY[held.name]
        for i, kind in enumerate(settings.get("layer_types") or []):
            if (kind == "full_attention") != (i % every == every - 1):
                raise DataError(
                    f"{called}: block {i} has {kind}, which llama.cpp does not expect of {held.name} there"
                )


def _add_rotary(
    writer: GGUFWriter, settings: Mapping[str, Any], held: Architecture, head: int, called: str
) -> None:
    from gguf import RopeScalingType

    rotary = rotary_settings(settings)
    share = float(rotary.get("partial_rotary_factor") or settings.get("rotary_pct") or 1.0)
    if held.name not in ("gemma", "gemma2", "gemma3"):
        writer.add_rope_dimension_count(int(share * head))
    if theta := rotary.get("rope_theta"):
        writer.add_rope_freq_base(float(theta))
    local = (settings.get("rope_parameters") or {}).get("sliding_attention") or {}
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = str(rotary.get("rope_type") or rotary.get("type") or "default")
    original = rotary.get("original_max_position_embeddings") or settings.get(
        "original_max_position_embeddings"
    )
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rotary["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(original or settings["max_position_embeddings"]))
    elif kind == "longrope" and held.name == "phi3":
        original = int(original or settings["max_position_embeddings"])
        scale = int(settings["max_position_embeddings"]) / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        )
    elif kind == "default" and held.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(int(original or settings["max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise DataError(
            f"{called}: its rotary embedding is scaled by {kind}, which is not written to GGUF files"
        )


def extra_tensors(settings: Mapping[str, Any], held: Architecture) -> dict[str, FloatArray]:
    """Tensors that transformers computes from the configuration and llama.cpp reads."""
    rotary = rotary_settings(settings)
    kind = str(rotary.get("rope_type") or rotary.get("type") or "default")
    if kind == "llama3" and held.name == "llama":
        return {"rope_freqs.weight": _llama3_factors(rotary, head_size(settings))}
    if kind == "longrope" and held.name == "phi3":
        return {
            f"rope_factors_{reach}.weight": np.asarray(rotary[f"{reach}_factor"], dtype=np.float32)
            for reach in ("long", "short")
        }
    return {}


def _llama3_factors(rotary: Mapping[str, Any], head: int) -> FloatArray:
    """By what each frequency is divided, [head / 2]: low ones by the whole factor, high ones by 1, smoothly between."""
    frequencies = float(rotary["rope_theta"]) ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    factor, low, high = (float(rotary[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = (
        float(rotary["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    )  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def expert_count(settings: Mapping[str, Any]) -> int:
    """Experts of a block, 0 where there are none."""
    return int(settings.get("num_experts") or settings.get("num_local_experts") or 0)


def head_size(settings: Mapping[str, Any]) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def rotary_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, those of full attention where there are several."""
    found = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    found = dict(found.get("full_attention", found))
    if "rope_theta" not in found and settings.get("rope_theta"):
        found["rope_theta"] = settings["rope_theta"]
    return found
