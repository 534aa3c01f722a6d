"""AutoGPTQ's checkpoint layout, version 1, as read by transformers (through gptqmodel's kernels) and vLLM.

For a linear of ``in`` inputs and ``out`` outputs, ``b`` bits and ``G`` groups:

==========  ================  ==========================================================================
``qweight`` int32 [in*b/32, out]  codes packed along the inputs
``qzeros``  int32 [G, out*b/32]   ``zero - 1`` packed along the outputs
``scales``  float16 [G, out]
``g_idx``   int32 [in]            the group of each input column
==========  ================  ==========================================================================

Readers add one to every packed field of ``qzeros`` at once, so ``zero - 1`` must not be negative: a zero of 0 would
carry into its neighbour. Grids for this format are therefore fitted with ``zero >= 1`` (``Format.zero_min``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from quantlab.formats import bits as bitstream
from quantlab.registry.formats import Contents


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> dict[str, torch.Tensor]:
    """The four tensors of one linear. ``codes`` [out, in], ``scales`` and ``zeros`` [out, G], ``group_of`` [in]."""
    return {
        "qweight": bitstream.pack(codes.t(), bits),
        "qzeros": bitstream.pack(zeros - 1, bits).t().contiguous(),
        "scales": scales.t().to(torch.float16).contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def unpack(
    tensors: Mapping[str, torch.Tensor], *, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of :func:`pack`."""
    group_of = tensors["g_idx"].to(torch.int64)
    outputs = tensors["scales"].shape[1]
    codes = bitstream.unpack(tensors["qweight"], bits, group_of.shape[0]).t().to(torch.uint8)
    zeros = bitstream.unpack(tensors["qzeros"].t(), bits, outputs) + 1
    return codes.contiguous(), tensors["scales"].t().to(torch.float32), zeros, group_of


# Names of block lists that optimum finds by itself.
FOUND = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")


def config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this layout.

    ``desc_act`` tells readers whether groups are out of place, so it is false with static groups, however the columns
    were visited. Which linears are packed is said twice, since readers differ: by names inside a block (transformers
    through optimum, vLLM) and, for what was left out, by names with ``-:`` before them (gptqmodel).

    Raises:
        ValueError: the layers differ in width or group size. gptqmodel and vLLM know per-layer overrides (``dynamic``),
            but transformers drops them, and a checkpoint has to load there.
    """
    if any(found != (contents.bits, contents.group_size) for found in contents.layers.values()):
        raise ValueError("transformers reads one width and group size from the gptq layout")
    options = contents.options
    found = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "bits": contents.bits,
        "group_size": contents.group_size,
        "sym": contents.symmetric,
        "desc_act": options.get("act_order", False) is True and not options.get("static_groups", False),
        "static_groups": options.get("static_groups", False),
        "damp_percent": options.get("damp", 0.01),
        "lm_head": False,
        "true_sequential": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [contents.quantizer]},
    }
    # Packed experts are read by those who go by the names in the files.
    aliases = [name for name in contents.aliases.values() if "experts" not in name.split(".")]
    inside = kept_in_blocks([*contents.layers, *aliases], contents.ignore)
    if inside:
        found["modules_in_block_to_quantize"] = [inside]
    if contents.blocks and contents.blocks not in FOUND:
        found["block_name_to_quantize"] = contents.blocks
    if contents.kept:
        found["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in contents.kept}
    return found


def kept_in_blocks(layers: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """Names, relative to a block, of the quantized linears, if there are others beside them in the blocks (readers
    take every linear of a block for quantized unless told); empty where there are none."""
    layers = list(layers)
    lists = {name.split(_numbered(name), 1)[0] for name in layers if _numbered(name)}
    inside = {inside_block(name) for name in layers} - {""}
    # Beside the decoder's blocks there may be others, of what sees or hears; readers look into one list only.
    others = {inside_block(name) for name in ignore if name.split(_numbered(name) or "\0", 1)[0] in lists} - {
        ""
    }
    if inside & others:
        raise ValueError(
            f"the gptq layout leaves out a linear in every block or in none: {min(inside & others)}"
        )
    # Readers compare the ends of names: what another one ends in begins with the dot before it.
    unclear = {name for name in inside if any(other.endswith(name) for other in others)}
    return sorted(f".{name}" if name in unclear else name for name in inside) if others else []


def inside_block(name: str) -> str:
    """A module's name after its block's number, empty outside the blocks."""
    number = _numbered(name)
    return name.split(number, 1)[1] if number else ""


def _numbered(name: str) -> str:
    """The block's number in a module name with its dots (``.3.``), empty outside the blocks."""
    return next((f".{part}." for part in name.split(".")[:-1] if part.isdecimal()), "")
