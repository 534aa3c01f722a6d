"""What is known of each architecture in GGUF files: its tensors under Hugging Face's names, and its configuration.

llama.cpp's converters (``convert_hf_to_gguf.py``) rename every tensor, and change some: the rows of the query and key
matrices of Llama change places (see ``weights``), the norms of Gemma are stored plus one, the experts of a layer are
stacked in one tensor. A configuration is written as keys under the architecture's name. What a file does not say,
llama.cpp knows by architecture; it is said here once.

A shape is a tuple of names of sizes: ``hidden``, ``ffn``, ``vocab``, ``q`` and ``kv`` (rows of the query and key
matrices), ``head`` (rows of one of their heads), ``qkv`` and ``2ffn`` (stacked), ``experts``, ``expert_ffn``,
``shared_ffn``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantlab.errors import DataError
from quantlab.models.gguf.facts import Facts

EXPERT = "{expert}"  # stands for the number of an expert in names of tensors that are stacked


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs. ``name`` is Hugging Face's (in a block: relative to it), ``shape`` names its sizes.
    ``heads``: the size by whose heads llama.cpp reordered its rows. ``shift``: what it added to every value."""

    name: str
    shape: tuple[str, ...]
    heads: str = ""
    shift: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """``model_type`` and ``model_class`` are transformers'. ``outside`` and ``blocks``: tensors that every file has, by
    llama.cpp's names; ``optional`` in blocks: groups of which a file has all or none, by the key of the configuration
    that says so. ``config`` adds to what all architectures have."""

    model_type: str
    model_class: str
    outside: Mapping[str, Place]
    blocks: Mapping[str, Place]
    config: Callable[[Facts], dict[str, Any]]
    optional: Mapping[str, Mapping[str, Place]]


def _shifted(places: Mapping[str, Place]) -> dict[str, Place]:
    """With the norms plus one."""
    return {n: replace(p, shift=1.0) if n.endswith("norm.weight") else p for n, p in places.items()}


EMBEDDING = {
    "token_embd.weight": Place("model.embed_tokens.weight", ("vocab", "hidden")),
    "output_norm.weight": Place("model.norm.weight", ("hidden",)),
}
HEAD = {"output.weight": Place("lm_head.weight", ("vocab", "hidden"))}  # missing where it is the embedding
NORMS = {
    "attn_norm.weight": Place("input_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": Place("post_attention_layernorm.weight", ("hidden",)),
}
ATTENTION = {
    "attn_q.weight": Place("self_attn.q_proj.weight", ("q", "hidden")),
    "attn_k.weight": Place("self_attn.k_proj.weight", ("kv", "hidden")),
    "attn_v.weight": Place("self_attn.v_proj.weight", ("kv", "hidden")),
    "attn_output.weight": Place("self_attn.o_proj.weight", ("hidden", "q")),
}
QKV_BIASES = {
    "attn_q.bias": Place("self_attn.q_proj.bias", ("q",)),
    "attn_k.bias": Place("self_attn.k_proj.bias", ("kv",)),
    "attn_v.bias": Place("self_attn.v_proj.bias", ("kv",)),
}
HEAD_NORMS = {
    "attn_q_norm.weight": Place("self_attn.q_norm.weight", ("head",)),
    "attn_k_norm.weight": Place("self_attn.k_norm.weight", ("head",)),
}
MLP = {
    "ffn_gate.weight": Place("mlp.gate_proj.weight", ("ffn", "hidden")),
    "ffn_up.weight": Place("mlp.up_proj.weight", ("ffn", "hidden")),
    "ffn_down.weight": Place("mlp.down_proj.weight", ("hidden", "ffn")),
}
ROUTED = {
    "ffn_gate_inp.weight": Place("mlp.gate.weight", ("experts", "hidden")),
    "ffn_gate_exps.weight": Place(
        f"mlp.experts.{EXPERT}.gate_proj.weight", ("experts", "expert_ffn", "hidden")
    ),
    "ffn_up_exps.weight": Place(f"mlp.experts.{EXPERT}.up_proj.weight", ("experts", "expert_ffn", "hidden")),
    "ffn_down_exps.weight": Place(
        f"mlp.experts.{EXPERT}.down_proj.weight", ("experts", "hidden", "expert_ffn")
    ),
}
SHARED = {
    "ffn_gate_inp_shexp.weight": Place("mlp.shared_expert_gate.weight", ("one", "hidden")),
    "ffn_gate_shexp.weight": Place("mlp.shared_expert.gate_proj.weight", ("shared_ffn", "hidden")),
    "ffn_up_shexp.weight": Place("mlp.shared_expert.up_proj.weight", ("shared_ffn", "hidden")),
    "ffn_down_shexp.weight": Place("mlp.shared_expert.down_proj.weight", ("hidden", "shared_ffn")),
}
MIXTRAL = {
    "ffn_gate_inp.weight": Place("block_sparse_moe.gate.weight", ("experts", "hidden")),
    "ffn_gate_exps.weight": Place(
        f"block_sparse_moe.experts.{EXPERT}.w1.weight", ("experts", "ffn", "hidden")
    ),
    "ffn_down_exps.weight": Place(
        f"block_sparse_moe.experts.{EXPERT}.w2.weight", ("experts", "hidden", "ffn")
    ),
    "ffn_up_exps.weight": Place(f"block_sparse_moe.experts.{EXPERT}.w3.weight", ("experts", "ffn", "hidden")),
}
FOUR_NORMS = {
    "attn_norm.weight": Place("input_layernorm.weight", ("hidden",)),
    "post_attention_norm.weight": Place("post_attention_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": Place("pre_feedforward_layernorm.weight", ("hidden",)),
    "post_ffw_norm.weight": Place("post_feedforward_layernorm.weight", ("hidden",)),
}
REORDERED = {
    name: replace(place, heads={"attn_q": "q", "attn_k": "kv"}.get(name.partition(".")[0], ""))
    for name, place in (ATTENTION | QKV_BIASES).items()
}
LLAMA_ATTENTION = {name: REORDERED[name] for name in ATTENTION}
LLAMA_BIASES = {
    "attention_bias": {
        **{name: REORDERED[name] for name in QKV_BIASES},
        "attn_output.bias": Place("self_attn.o_proj.bias", ("hidden",)),
    },
    "mlp_bias": {
        "ffn_gate.bias": Place("mlp.gate_proj.bias", ("ffn",)),
        "ffn_up.bias": Place("mlp.up_proj.bias", ("ffn",)),
        "ffn_down.bias": Place("mlp.down_proj.bias", ("hidden",)),
    },
}
PHI3 = {
    "attn_qkv.weight": Place("self_attn.qkv_proj.weight", ("qkv", "hidden")),
    "attn_output.weight": Place("self_attn.o_proj.weight", ("hidden", "q")),
    "ffn_up.weight": Place("mlp.gate_up_proj.weight", ("2ffn", "hidden")),
    "ffn_down.weight": Place("mlp.down_proj.weight", ("hidden", "ffn")),
}


def _dense(facts: Facts) -> dict[str, Any]:
    return {"intermediate_size": facts.count("feed_forward_length"), "hidden_act": "silu"}


def _sliding(facts: Facts) -> int | None:
    """The window of sliding attention; llama.cpp writes 0 for none."""
    return facts.count("attention.sliding_window") if facts.number("attention.sliding_window", 0) else None


def _mistral(facts: Facts) -> dict[str, Any]:
    return _dense(facts) | {"sliding_window": _sliding(facts)}


def _mixtral(facts: Facts) -> dict[str, Any]:
    return _mistral(facts) | {
        "num_local_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
    }


def _qwen_moe(facts: Facts) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "moe_intermediate_size": facts.count("expert_feed_forward_length"),
        # Of layers without experts, which these files have none of.
        "intermediate_size": facts.count("feed_forward_length", facts.count("expert_feed_forward_length")),
        "num_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(facts: Facts) -> dict[str, Any]:
    shared = facts.count("expert_shared_feed_forward_length")
    return _qwen_moe(facts) | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_moe(facts: Facts) -> dict[str, Any]:
    return _qwen_moe(facts) | {"norm_topk_prob": True}  # as llama.cpp computes it


def _gemma(facts: Facts, largest: int) -> dict[str, Any]:
    """``largest``: blocks of the 27B model, whose attention is scaled by another size than its heads'; the file does
    not say so, and llama.cpp knows it by this number too."""
    heads, hidden = facts.count("attention.head_count"), facts.count("embedding_length")
    scaled_by = hidden // heads if facts.count("block_count") == largest else head_size(facts)
    if facts.has("attention.scale"):
        scaled_by = round(facts.number("attention.scale") ** -2)
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "intermediate_size": facts.count("feed_forward_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled_by,
        **{key: facts.number(key, 0) or None for key in caps},
    }


def _gemma2(facts: Facts) -> dict[str, Any]:
    blocks = facts.count("block_count")
    return _gemma(facts, 46) | {
        "sliding_window": facts.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(blocks, [index % 2 == 0 for index in range(blocks)]),
    }


def _gemma3(facts: Facts) -> dict[str, Any]:
    blocks = facts.count("block_count")
    pattern = facts.flags("attention.sliding_window_pattern")
    if pattern is None:
        every = facts.count("attention.sliding_window_pattern", 6)
        pattern = [(index + 1) % every != 0 for index in range(blocks)]
    if len(pattern) != blocks:
        raise DataError(
            f"{facts.called}: gemma3.attention.sliding_window_pattern is of {len(pattern)} blocks, there are {blocks}"
        )
    return _gemma(facts, 62) | {
        "sliding_window": facts.count("attention.sliding_window"),
        "layer_types": _layer_types(blocks, pattern),
        "rope_local_base_freq": facts.number("rope.freq_base_swa", 10000.0),
    }


def _layer_types(blocks: int, sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if sliding[index] else "full_attention" for index in range(blocks)]


def _phi3(facts: Facts) -> dict[str, Any]:
    rotated, head = facts.count("rope.dimension_count", head_size(facts)), head_size(facts)
    return _dense(facts) | {"sliding_window": _sliding(facts), "partial_rotary_factor": rotated / head}


def head_size(facts: Facts) -> int:
    """Numbers of one head of queries and keys."""
    usual = facts.count("embedding_length") // facts.count("attention.head_count")
    return facts.count("attention.key_length", usual or None)


LLAMA = Architecture(
    "llama", "LlamaForCausalLM", EMBEDDING, NORMS | LLAMA_ATTENTION | MLP, _dense, LLAMA_BIASES
)
# What a file calls itself, to what is known of it.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", EMBEDDING, NORMS | ATTENTION | QKV_BIASES | MLP, _dense, {}
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", EMBEDDING, NORMS | ATTENTION | HEAD_NORMS | MLP, _dense, {}
    ),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", EMBEDDING, NORMS | ATTENTION | QKV_BIASES | ROUTED | SHARED, _qwen2_moe, {}
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", EMBEDDING, NORMS | ATTENTION | HEAD_NORMS | ROUTED, _qwen3_moe, {}
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _shifted(EMBEDDING), _shifted(FOUR_NORMS | ATTENTION | MLP), _gemma2, {}
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _shifted(EMBEDDING),
        _shifted(FOUR_NORMS | ATTENTION | HEAD_NORMS | MLP), _gemma3, {},
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", EMBEDDING, NORMS | PHI3, _phi3, {}),
}  # fmt: skip
# Models that llama.cpp writes as `llama`, told apart by what is in the file.
MISTRAL = replace(LLAMA, model_type="mistral", model_class="MistralForCausalLM", config=_mistral, optional={})
MIXTURE = replace(
    MISTRAL, model_type="mixtral", model_class="MixtralForCausalLM", config=_mixtral,
    blocks=NORMS | LLAMA_ATTENTION | MIXTRAL,
)  # fmt: skip


def architecture_of(metadata: Mapping[str, Any], called: str) -> tuple[Architecture, Facts]:
    """What is known of a file's architecture, and its keys.

    Raises:
        DataError: an architecture that is not known, or none.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        said = f"architecture {name[:60]!r}" if isinstance(name, str) else "no general.architecture"
        raise DataError(
            f"{called}: {said}; GGUF files are read of {', '.join(sorted(ARCHITECTURES))}",
            hint="convert the original model's safetensors instead",
        )
    facts = Facts(metadata, name, called)
    if name != "llama":
        return ARCHITECTURES[name], facts
    if facts.number("expert_count", 0):
        return MIXTURE, facts
    titles = [str(metadata.get(key, "")).lower() for key in ("general.name", "general.basename")]
    return (MISTRAL if any("mistral" in title for title in titles) else LLAMA), facts
