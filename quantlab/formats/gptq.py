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
from quantlab.formats.codes import Codes
from quantlab.registry.formats import Contents

VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what a version leaves out of a stored zero


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


def read(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any], *names: str) -> Codes:
    """A linear of any checkpoint in this layout, also of version 2 (``gptq_v2``), which stores zeros as they are. Width
    and groups are those of the tensors, since a checkpoint may have several (``dynamic``).

    Args:
        described: the ``quantization_config``. names: the linear's; not needed here.

    Raises:
        ValueError: another version, or tensors that are not of one linear.
    """
    version = str(described.get("checkpoint_format") or described.get("format") or "gptq")
    if version not in VERSIONS or described.get("is_marlin_format"):
        raise ValueError(f"its gptq format is {version!r}, read are {' and '.join(VERSIONS)}")
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        raise ValueError(f"its codes are packed in {str(qweight.dtype)[6:]}, read are words of int32")
    groups, outputs = scales.shape
    group_of = tensors.get("g_idx")
    told = int(described["bits"])
    columns = len(qweight) * 32 // told if group_of is None else len(group_of)
    bits = len(qweight) * 32 // columns
    if bits != told and not described.get("dynamic"):
        raise ValueError(f"its codes are of {bits} bits, its quantization_config says {told}")
    if bits not in (2, 3, 4, 8) or len(qweight) * 32 != columns * bits:
        raise ValueError(f"{len(qweight)} words of {columns} inputs are not codes of 2, 3, 4 or 8 bits")
    if qweight.shape[1] != outputs or qzeros.shape != (groups, outputs * bits // 32):
        raise ValueError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are not of "
            f"one linear of {bits} bits"
        )
    if columns % groups:
        raise ValueError(f"its {columns} inputs are not divisible by its {groups} groups")
    group_of = torch.arange(columns) // (columns // groups) if group_of is None else group_of.to(torch.int64)
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ValueError(
            f"g_idx goes from {int(group_of.min())} to {int(group_of.max())}, there are {groups} groups"
        )
    zeros = bitstream.unpack(qzeros.t(), bits, outputs) + VERSIONS[version]
    if int(zeros.max()) == 2**bits:
        raise ValueError(
            f"zeros are stored as {2**bits - 1}, which readers of version 1 take for {2**bits} or, with a carry into "
            "the next one, for 0"
        )
    codes = bitstream.unpack(qweight, bits, columns).t().to(torch.uint8)
    return Codes(
        codes.contiguous(), scales.t().to(torch.float32).contiguous(), zeros.contiguous(), group_of, bits
    )


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
