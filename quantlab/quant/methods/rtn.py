"""Round-to-nearest: each weight to the closest code of its group's range. The baseline every method must beat.

It needs no data; statistics, where they are there, only serve to report the layer's loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantlab.quant.block import BlockResult, BlockView
from quantlab.quant.grid import Grid, Quantized, layer_loss, round_to_grid


def solve_rtn(weight: torch.Tensor, grid: Grid) -> Quantized:
    """Round ``weight`` [out, in] to nearest on ``grid``."""
    return round_to_grid(weight.to(torch.float32), grid)


def quantize_block(block: BlockView, grids: Sequence[Mapping[str, Grid]]) -> list[BlockResult]:
    """Every linear that a set of ``grids`` names, rounded on its grid; one result a set."""
    results = [BlockResult() for _ in grids]
    hessian = {name: m.hessian for m in block.moments if m.tokens for name in m.layers}
    for name in block.stored:
        weight = block.weight(name)
        for chosen, result in zip(grids, results, strict=True):
            if name not in chosen:
                continue
            result.quantized[name] = solve_rtn(weight, chosen[name])
            if name in hessian:
                rounded = result.quantized[name].dequantize()
                result.loss[name] = layer_loss(weight, rounded, hessian[name]).item()
    return results
