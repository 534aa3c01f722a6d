"""Which block type each tensor of a GGUF file gets: llama.cpp's choice, as ``llama_tensor_get_type_impl`` and
``tensor_type_fallback`` of its ``llama-quant.cpp`` make it (no torch).

A recipe's ``type`` is a block type, which most matrices then have, or a mixture (``Q4_K_M``), which gives more bits
to tensors that quantization hurts most. In both, the head, or the embedding where it is the head too, has Q6_K or
Q8_0; and a row that is no multiple of 256 has the fallback type, of 32. Q2_K is llama.cpp's mixture of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.registry.block_types import BLOCK_TYPES

LARGEST = "Q8_0"
MIXTURES = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q3_K_M": "Q3_K", "Q2_K": "Q2_K"}
USUAL_TYPE = "Q4_K_M"
AUTO_TYPE = "auto"  # a type for each tensor, chosen by what each costs the model
TYPES = (*BLOCK_TYPES, *(name for name in MIXTURES if name not in BLOCK_TYPES))
# What a file says of itself: llama_ftype of llama.h.
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q3_K_M": 12, "Q4_K": 14,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What the choice looks at. ``layers``: decoder blocks. ``sharing``: query heads to a key-value head.
    ``experts``: 0 or 1 where there are none. ``tied``: the embedding is the head too. ``importance``: activations are
    looked at. ``large``: a Llama of 80 blocks with grouped heads, whose ``attn_v`` is small."""

    layers: int
    sharing: float = 1.0
    experts: int = 0
    tied: bool = False
    importance: bool = False
    large: bool = False


def base_type(wanted: str) -> str:
    """The block type that most matrices have."""
    return MIXTURES.get(wanted, wanted)


def tensor_type(wanted: str, name: str, columns: int, layer: int, model: Model) -> str:
    """The type of a matrix.

    Args:
        wanted: the recipe's type or mixture. name: of the tensor in the file, without ``.weight``. columns: of a row.
        layer: the block's number, whatever outside the blocks.

    Returns:
        A name in ``BLOCK_TYPES``, or ``F16`` where no block fits a row.
    """
    return fallback(_chosen(wanted, name.rpartition(".")[2], columns, layer, model), columns)


def candidates(columns: int, listed: Sequence[str] = ()) -> tuple[str, ...]:
    """The types that a matrix with rows of ``columns`` may get where types are chosen, fewest bits first; empty where
    no block fits. Where super-blocks fit, types that they replaced are left out.

    Args:
        listed: the types to choose from, or for them what llama.cpp takes where none fits; empty for all.
    """
    fitting = [name for name in listed or BLOCK_TYPES if columns % BLOCK_TYPES[name].block == 0]
    if not listed and any(BLOCK_TYPES[name].scale_range for name in fitting):
        fitting = [name for name in fitting if name == LARGEST or BLOCK_TYPES[name].scale_range]
    if not fitting:
        fitting = [name for name in (fallback(name, columns) for name in listed) if name in BLOCK_TYPES]
    return tuple(sorted({*fitting}, key=lambda name: (BLOCK_TYPES[name].bits_per_weight, name)))


def fallback(kind: str, columns: int) -> str:
    """``kind``, or what llama.cpp takes for it where a row of ``columns`` is not made of whole blocks."""
    if columns % BLOCK_TYPES[kind].block:
        kind = BLOCK_TYPES[kind].fallback
        if kind in BLOCK_TYPES and columns % BLOCK_TYPES[kind].block:
            return "F16"
    return kind


def _chosen(wanted: str, leaf: str, columns: int, layer: int, model: Model) -> str:
    kind = base_type(wanted)
    if leaf == "output" or (leaf == "token_embd" and model.tied):
        return "Q8_0" if columns % BLOCK_TYPES[kind].block or kind == "Q8_0" else "Q6_K"
    if leaf in ("attn_v", "attn_qkv", "attn_kv_b"):
        return _attention_values(wanted, kind, layer, model)
    if leaf == "attn_k" and model.experts == 8:
        return "Q8_0"
    if leaf.startswith("ffn_down"):
        return _down(wanted, kind, layer, model)
    if leaf == "attn_output":
        if model.experts == 8:
            return "Q5_K" if wanted in ("Q2_K", "Q3_K", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M") else kind
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(wanted, kind)
    return kind


def _attention_values(wanted: str, kind: str, layer: int, model: Model) -> str:
    if wanted == "Q2_K":
        kind = "Q4_K" if model.sharing >= 4 else "Q3_K"
    elif wanted == "Q3_K_M":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif wanted == "IQ4_NL" and model.sharing >= 4:
        kind = "Q5_K"
    elif wanted in ("Q4_K_M", "Q5_K_M") and more_bits(layer, model.layers):
        kind = "Q6_K"
    elif wanted == "Q4_K_S" and layer < 4:
        kind = "Q5_K"
    if model.large and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if model.experts == 8 else kind


def _down(wanted: str, kind: str, layer: int, model: Model) -> str:
    first = layer < model.layers // 8
    if wanted == "Q2_K":
        return "Q3_K"
    if wanted == "Q3_K_M":
        return "Q5_K" if layer < model.layers // 16 else "Q4_K"
    if wanted in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, model.layers) else kind
    if wanted == "Q4_K_S":
        return "Q5_K" if first else kind
    if wanted == "IQ4_NL":
        return "Q5_K" if first and not model.importance else kind
    if wanted in ("Q4_0", "Q5_0") and model.importance and first:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[wanted]
    return kind


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the blocks, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
