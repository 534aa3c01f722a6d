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

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlab.formats import bits as bitstream
from quantlab.formats.codes import Codes
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


def read(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any], *names: str) -> Codes:
    """A linear of any checkpoint of packed integers, also one with zeros (``weight_zero_point``, packed along the
    outputs) or a column order (``weight_g_idx``), which this layout's writer leaves to others.

    Args:
        described: the ``quantization_config``. names: what the linear is called, by any of which it is targeted.

    Raises:
        ValueError: codes that are no integers, quantized activations, or tensors that are not of one linear.
    """
    if "weight_packed" not in tensors:
        raise ValueError("its weight is no packed integers (FP8, or another format of compressed-tensors)")
    told = scheme(described, *names)
    bits, activations = int(told["weights"]["num_bits"]), told.get("input_activations")
    if told["weights"].get("type", "int") != "int" or activations:
        raise ValueError("its activations are quantized too, which no other layout says")
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    outputs, columns = (int(size) for size in tensors["weight_shape"])
    if packed.shape != (outputs, -(-columns * bits // 32)) or scales.ndim != 2 or len(scales) != outputs:
        raise ValueError(
            f"weight_packed {list(packed.shape)} and weight_scale {list(scales.shape)} are not of a linear of "
            f"{outputs} outputs, {columns} inputs and {bits} bits"
        )
    groups, order = scales.shape[1], tensors.get("weight_g_idx")
    if columns % groups:
        raise ValueError(f"its {columns} inputs are not divisible by {groups} groups")
    group_of = torch.arange(columns) // (columns // groups)
    if order is not None and bool((order >= 0).all()):  # -1 where there is none
        group_of = order.to(torch.int64)
        if int(group_of.max()) >= groups:
            raise ValueError(f"weight_g_idx goes up to {int(group_of.max())}, there are {groups} groups")
    zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.int32)
    if (stored := tensors.get("weight_zero_point")) is not None:
        if stored.shape == (outputs, groups):  # as they are, from -2^(bits-1) on
            zeros = stored.to(torch.int32) + 2 ** (bits - 1)
        elif stored.shape == (-(-outputs * bits // 32), groups):
            zeros = _unpack(stored, bits, outputs)
        else:
            raise ValueError(
                f"weight_zero_point {list(stored.shape)} is not of {outputs} outputs and {groups} groups"
            )
    codes = _unpack(packed.t(), bits, columns).t().to(torch.uint8)
    return Codes(codes.contiguous(), scales.to(torch.float32), zeros, group_of, bits)


def scheme(described: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The group of the ``quantization_config`` that a linear belongs to, by a name of its or a regular expression
    (``re:``), before one for all linears.

    Raises:
        ValueError: there is none.
    """
    groups: list[Mapping[str, Any]] = list((described.get("config_groups") or {}).values())
    chosen = [group for group in groups if _targeted(group["targets"], names)]
    chosen += [group for group in groups if "Linear" in group["targets"]]
    if not chosen:
        raise ValueError(f"no group of the quantization_config is for {names[0]}")
    return chosen[0]


def _targeted(targets: Sequence[str], names: Sequence[str]) -> bool:
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return any(name in targets or any(re.match(p, name) for p in patterns) for name in names)


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
