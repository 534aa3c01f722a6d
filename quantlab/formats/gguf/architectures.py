"""How a Hugging Face model is laid out in a GGUF file: its name there, the names of its tensors, and what is done to
them, by architecture (no torch). Names come from the ``gguf`` package's tensor map.

What llama.cpp computes differently from transformers is undone in the weights. Its rotary embedding of Llama turns
pairs of neighbouring channels, that of transformers channels half a head apart: rows of the query and key projections
change places. GPT-NeoX keeps query, key and value of a head together, llama.cpp all queries first. Gemma multiplies
by ``1 + weight`` in its norms, llama.cpp by the weight. Experts are stored as one tensor. All of it concerns whole
rows, so that packed rows are moved like any others.

Source of the facts: ``convert_hf_to_gguf.py`` of llama.cpp and its ``conversion`` package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from quantlab.errors import DataError

RowOrder = Literal["", "rotary query", "rotary key", "fused heads"]


@dataclass(frozen=True)
class Architecture:
    """``name``: in GGUF files. ``rotary``: query and key rows change places. ``fused``: the fused projection's do.
    ``norm_offset``: what is added to the weights of norms. ``layer_norm``: norms subtract the mean. ``experts``:
    there are some. ``headless``: the head is the embedding, and llama.cpp expects no other."""

    name: str
    rotary: bool = False
    fused: bool = False
    norm_offset: float = 0.0
    layer_norm: bool = False
    experts: bool = False
    headless: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", rotary=True),
    "mistral": Architecture("llama", rotary=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", experts=True),
    "qwen3_moe": Architecture("qwen3moe", experts=True),
    "gemma": Architecture("gemma", norm_offset=1.0, headless=True),
    "gemma2": Architecture("gemma2", norm_offset=1.0, headless=True),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0),
    "phi3": Architecture("phi3"),
    "gpt_neox": Architecture("gptneox", fused=True, layer_norm=True),
}


class Place(NamedTuple):
    """Where a tensor goes. ``name``: in the file. ``order``: how its rows are to stand. ``offset``: added to its
    values. ``expert``: which part of the named tensor it is; None for the whole. ``layer``: the block's number, -1
    outside."""

    name: str
    order: RowOrder = ""
    offset: float = 0.0
    expert: int | None = None
    layer: int = -1

    @property
    def leaf(self) -> str:
        """The name without ``.weight`` or ``.bias``."""
        return self.name.rpartition(".")[0]


def architecture(model_type: str, called: str) -> Architecture:
    """The entry of a model.

    Raises:
        DataError: there is none; says which there are.
    """
    found = ARCHITECTURES.get(model_type)
    if found is None:
        raise DataError(
            f"{called}: a GGUF file of the architecture {model_type} cannot be written",
            hint=f"the gguf format is for {', '.join(ARCHITECTURES)}",
        )
    return found


class Places:
    """Where the tensors of a model go.

    Args:
        settings: the configuration of the language model, with all defaults filled in.
        called: the model's name, for messages.
    """

    def __init__(self, settings: Mapping[str, Any], called: str) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.called, self.settings = called, settings
        self.architecture = architecture(str(settings.get("model_type")), called)
        numbers = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        arch: MODEL_ARCH = numbers[self.architecture.name]
        self._map = get_tensor_name_map(arch, int(settings["num_hidden_layers"]))

    def of(self, name: str) -> Place | None:
        """Where a tensor of the files goes; None where llama.cpp computes it, or has no use for it.

        Raises:
            DataError: GGUF has no name for it.
        """
        if name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")):
            return None
        headless = self.architecture.headless or self.settings.get("tie_word_embeddings")
        if name in ("lm_head.weight", "embed_out.weight") and headless:
            return None
        owner, _, leaf = name.rpartition(".")
        expert = re.search(r"\.experts\.(\d+)\.", name)
        asked = owner if expert is None else owner.replace(f".experts.{expert[1]}.", ".experts.")
        found = self._map.get_name(asked)
        if found is None or leaf not in ("weight", "bias"):
            raise DataError(
                f"{self.called}: GGUF has no name for the tensor {name} of {self.architecture.name}"
            )
        order: RowOrder = ""
        if self.architecture.rotary and owner.endswith((".q_proj", ".k_proj")):
            order = "rotary query" if owner.endswith("q_proj") else "rotary key"
        if self.architecture.fused and owner.endswith(".query_key_value"):
            order = "fused heads"
        offset = self.architecture.norm_offset if name.endswith("norm.weight") else 0.0
        layer = re.match(r"blk\.(\d+)\.", found)
        return Place(
            f"{found}.{leaf}", order, offset, None if expert is None else int(expert[1]),
            -1 if layer is None else int(layer[1]),
        )  # fmt: skip

    def rows(self, order: RowOrder, count: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Which row of the original stands where in the file, [count]; None where they stay."""
        if not order:
            return None
        heads = int(self.settings["num_attention_heads"])
        indices = np.arange(count)
        if order == "fused heads":  # [heads, (query, key, value), channels]
            return indices.reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
        if order == "rotary key":
            heads = int(self.settings.get("num_key_value_heads") or heads)
        return indices.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
