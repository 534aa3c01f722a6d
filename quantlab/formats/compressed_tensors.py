"""The compressed-tensors layout, as read by transformers (with the compressed-tensors package) and vLLM.

Integer codes are ``pack-quantized``. For a linear of ``in`` inputs, ``out`` outputs, ``b`` bits and ``G`` groups:

=================  ==========================  ==================================================================
``weight_packed``  int32 [out, ceil(in*b/32)]  codes packed along the inputs, without gaps; the zero is 2^(b-1)
``weight_scale``   float [out, G]              in the type of the model
``weight_shape``   int64 [2]                   ``out`` and ``in``, since the last word may be half empty
=================  ==========================  ==================================================================

8-bit floating point (E4M3) is stored ``float-quantized``: ``weight`` float8_e4m3fn [out, in], ``weight_scale``
[out, 1]. Both say nothing about activations: they stay in 16 bits, and only the weights get smaller.

Widths may differ from layer to layer, each (width, group size) being a group of its own in the configuration.

Not covered: asymmetric grids, whose packed zeros transformers (5.23 with compressed-tensors 0.20) takes for tensors of
the wrong shape; a column order (``weight_g_idx``), which the package no longer reads. transformers computes with every
width, unpacked at the first forward; vLLM has had 4 and 8 bits for long, the others since lately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The tensors of one linear. ``codes`` uint8 or float8_e4m3fn [out, in], ``scales`` and ``zeros`` [out, G];
    ``group_of`` [in] must be in order. Scales come back as they are given, to be stored in the type of the model."""
    if codes.dtype == torch.float8_e4m3fn:
        return {"weight": codes, "weight_scale": scales}
    if not torch.equal(group_of, group_of.sort().values):
        raise ValueError("the compressed-tensors layout has no room for a column order")
    if not symmetric:
        raise ValueError("transformers reads symmetric grids only from the compressed-tensors layout")
    return {
        "weight_packed": _pack(codes.t(), bits).t().contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }


def unpack(
    tensors: Mapping[str, torch.Tensor], *, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of :func:`pack`."""
    scales = tensors["weight_scale"].to(torch.float32)
    if "weight" in tensors:
        codes = tensors["weight"]
        group_of = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.device)
        return codes, scales, torch.zeros_like(scales, dtype=torch.int32), group_of
    columns = int(tensors["weight_shape"][1])
    codes = _unpack(tensors["weight_packed"].t(), bits, columns).t().to(torch.uint8).contiguous()
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    group_of = torch.arange(columns, device=codes.device) // (columns // scales.shape[1])
    return codes, scales, zeros, group_of


def config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this layout.

    The quantizer and the other options have no place in it: the package means to refuse keys that it does not know.
    """
    if not contents.symmetric:
        raise ValueError("transformers reads symmetric grids only from the compressed-tensors layout")
    options = contents.options
    ordered = options.get("act_order", False) is True
    if ordered and not options.get("static_groups", False):
        raise ValueError("the compressed-tensors layout has no room for a column order")
    kinds = sorted(set(contents.layers.values())) or [(contents.bits, contents.group_size)]
    floating = contents.floating
    groups = {}
    for number, (width, size) in enumerate(kinds):
        # Layers are named one by one where there are several groups: beside a group for every "Linear" vLLM would
        # not look at names of layers that it fuses (q, k and v become one).
        named = [name for name, kind in contents.layers.items() if kind == (width, size)]
        named += [contents.aliases[name] for name in named if name in contents.aliases]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else _with_experts(named),
            "weights": {
                "num_bits": width,
                "type": "float" if floating else "int",
                "symmetric": True,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "actorder": "weight" if ordered else None,
            },
            "input_activations": None,
            "output_activations": None,
            # Told a group too: without it the package takes weights alone to be of another name, the same bytes.
            "format": "float-quantized" if floating else "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if floating else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(contents.ignore),
        "kv_cache_scheme": None,
    }


def _with_experts(named: Sequence[str]) -> list[str]:
    """Targets of a group. transformers, which merges experts, takes the group of theirs to be the one that has a
    regular expression with ``experts`` in it."""
    if not any("experts" in name.split(".") for name in named):
        return list(named)
    return [r"re:.*\.experts\.\d+\..*", *(name for name in named if "experts" not in name.split("."))]


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Along dimension 0, [n, m] to int32 [ceil(n * bits / 32), m]."""
    words = -(-values.shape[0] * bits // 32)
    missing = -values.shape[0] % 32
    if missing:
        values = torch.cat([values, values.new_zeros(missing, values.shape[1])])
    return bitstream.pack(values, bits)[:words]


def _unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of :func:`_pack`, int32 [n, m]."""
    whole = (n + 31) // 32 * bits
    if whole > words.shape[0]:
        words = torch.cat([words, words.new_zeros(whole - words.shape[0], words.shape[1])])
    return bitstream.unpack(words, bits, whole * 32 // bits)[:n]
