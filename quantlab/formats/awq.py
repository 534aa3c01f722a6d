"""AutoAWQ's GEMM checkpoint layout: 4 bits, read by transformers (through gptqmodel's kernels) and vLLM.

For a linear of ``in`` inputs, ``out`` outputs and ``G`` groups:

==========  ===================  =========================================================================
``qweight`` int32 [in, out/8]    eight codes a word along the outputs, in the order 0 2 4 6 1 3 5 7
``qzeros``  int32 [G, out/8]     zeros, packed alike
``scales``  float16 [G, out]
==========  ===================  =========================================================================

Other widths are not part of the layout as readers know it, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantlab.formats import bits as bitstream
from quantlab.formats.codes import Codes
from quantlab.registry.formats import Contents

ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


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
    """The three tensors of one linear. ``codes`` [out, in], ``scales`` and ``zeros`` [out, G]; ``group_of`` must be
    in order, which is the only arrangement this layout knows."""
    if not torch.equal(group_of, group_of.sort().values):
        raise ValueError("the awq layout has no room for a column order")
    return {
        "qweight": _pack_rows(codes, bits),
        "qzeros": _pack_rows(zeros, bits),
        "scales": scales.t().to(torch.float16).contiguous(),
    }


def unpack(
    tensors: Mapping[str, torch.Tensor], *, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of :func:`pack`."""
    codes = _unpack_rows(tensors["qweight"], bits).to(torch.uint8)
    width = codes.shape[1] if group_size == -1 else group_size
    group_of = torch.arange(codes.shape[1], device=codes.device) // width
    zeros = _unpack_rows(tensors["qzeros"], bits)
    return codes, tensors["scales"].t().to(torch.float32), zeros, group_of


def read(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any], *names: str) -> Codes:
    """A linear of any checkpoint in this layout.

    Args:
        described: the ``quantization_config``. names: the linear's; not needed here.

    Raises:
        ValueError: another version (``gemv``), another width, or tensors that are not of one linear.
    """
    version = str(described.get("version") or described.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"its awq version is {version!r}, read is 'gemm'")
    bits = int(described["bits"])
    if bits != 4:
        raise ValueError(f"its codes are of {bits} bits, the awq layout is of 4")
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    columns, (groups, outputs) = len(qweight), scales.shape
    if qweight.shape[1] * 8 != outputs or qzeros.shape != (groups, outputs // 8) or columns % groups:
        raise ValueError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are not of "
            "one linear of 4 bits"
        )
    codes, steps, zeros, group_of = unpack(tensors, bits=bits, group_size=columns // groups)
    return Codes(codes, steps.contiguous(), zeros, group_of, bits)


def config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this layout."""
    if any(found != (contents.bits, contents.group_size) for found in contents.layers.values()):
        raise ValueError("the awq layout knows one width and one group size")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "format": "gemm",
        "bits": contents.bits,
        "group_size": contents.group_size,
        "zero_point": not contents.symmetric,
        "modules_to_not_convert": list(contents.ignore) or None,
        "meta": {"quantizer": [contents.quantizer]},
    }


def _pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, n] integers to int32 [n, out/8]."""
    outputs, n = values.shape
    ordered = values.reshape(outputs // 8, 8, n)[:, ORDER.to(values.device)].reshape(outputs, n)
    return bitstream.pack(ordered, bits).t().contiguous()


def _unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, out/8] to int32 [out, n]."""
    outputs = words.shape[1] * 32 // bits
    ordered = bitstream.unpack(words.t(), bits, outputs).reshape(outputs // 8, 8, -1)
    values = torch.empty_like(ordered)
    values[:, ORDER.to(words.device)] = ordered
    return values.reshape(outputs, -1)
