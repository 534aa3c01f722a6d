"""Round-to-nearest: each weight to the closest code of its group's range. The baseline every method must beat.

It needs no data; statistics, where they are there, only serve to report the layer's loss.
"""

from __future__ import annotations

import torch

from quantlab.quant.grid import Grid, Quantized, layer_loss, round_to_grid
from quantlab.quant.view import BlockResult, BlockView


def solve_rtn(weight: torch.Tensor, grid: Grid) -> Quantized:
    """Round ``weight`` [out, in] to nearest on ``grid``."""
    return round_to_grid(weight.to(torch.float32), grid)


def quantize_block(block: BlockView, grid: Grid) -> BlockResult:
    """Every linear of a block, rounded."""
    result = BlockResult({name: solve_rtn(weight, grid) for name, weight in block.weights.items()})
    for moments in block.moments:
        for name in moments.layers:
            loss = layer_loss(block.weights[name], result.quantized[name].dequantize(), moments.hessian)
            result.loss[name] = loss.item()
    return result
