"""FP8 weights: 8-bit floating point (E4M3, Micikevicius et al. 2022, arXiv:2209.05433), one scale a row.

A row is divided by ``absmax / 448``, so that its largest weight meets the largest number of the format, and every one
is rounded to the nearest of float8_e4m3fn's 253 values: three bits of mantissa, hence a relative error of at most 1/16
down to 2**-6 of the scale, below it steps of 2**-9. No calibration data is needed.

Weights only: activations stay in 16 bits, so what is saved is memory and bandwidth, and no hardware support for FP8 is
needed to load the result. Not covered: FP8 activations, blocks smaller than a row, the E5M2 variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantlab.quant.block import BlockResult, BlockView
from quantlab.quant.grid import Grid, Quantized, layer_loss, storable_scales

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def solve_fp8(weight: torch.Tensor) -> Quantized:
    """Round ``weight`` [out, in] to float8_e4m3fn codes with one scale a row; all-zero rows stay zero.

    What the rounding of the scale (to a value that bfloat16 and float16 hold) leaves above 448 is cut off there, since
    the format has no infinity and would make NaN of it.

    Raises:
        ValueError: the weights hold NaN or infinity.
    """
    values = weight.to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("the weights hold NaN or infinity")
    scales = storable_scales(values.abs().amax(dim=1, keepdim=True) / LARGEST)  # [out, 1]
    codes = (values / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    group_of = torch.zeros(values.shape[1], dtype=torch.int64, device=values.device)
    return Quantized(codes, scales, zeros, group_of, 8)


def quantize_block(block: BlockView, grids: Sequence[Mapping[str, Grid]]) -> list[BlockResult]:
    """Every linear that a set of ``grids`` names; one result a set. FP8 has one grid, so nothing else is read of
    them."""
    results = [BlockResult() for _ in grids]
    hessian = {name: m.hessian for m in block.moments if m.tokens for name in m.layers}
    for name in block.stored:
        wanted = [result for chosen, result in zip(grids, results, strict=True) if name in chosen]
        if not wanted:
            continue
        weight = block.weight(name)
        quantized = solve_fp8(weight)
        loss = layer_loss(weight, quantized.dequantize(), hessian[name]).item() if name in hessian else None
        for result in wanted:
            result.quantized[name] = quantized
            if loss is not None:
                result.loss[name] = loss
    return results
