"""Round-to-nearest in the block types of GGUF: scales by search, codes to nearest.

Plain, every weight counts alike; weighted, a weight counts as much as the mean squared activation of its input channel.
That is llama.cpp's importance matrix, and the diagonal of the second moments that the column solver takes whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantlab.formats.gguf.encode import encode
from quantlab.quant.block import BlockResult, BlockView
from quantlab.quant.grid import Grid, layer_loss
from quantlab.registry.block_types import BLOCK_TYPES


def quantize_block(block: BlockView, grids: Sequence[Mapping[str, Grid]]) -> list[BlockResult]:
    """Every linear that a set of ``grids`` names, in the block type of its grid; one result a set."""
    return _rounded(block, grids, weighted=False)


def quantize_block_by_importance(block: BlockView, grids: Sequence[Mapping[str, Grid]]) -> list[BlockResult]:
    """The same, weighted by the importance of each input channel."""
    return _rounded(block, grids, weighted=True)


def _rounded(block: BlockView, grids: Sequence[Mapping[str, Grid]], *, weighted: bool) -> list[BlockResult]:
    results = [BlockResult() for _ in grids]
    known = {name: moments for moments in block.moments if moments.tokens for name in moments.layers}
    for name in block.stored:
        weight, moments = block.weight(name), known.get(name)
        importance = moments.diagonal if weighted and moments is not None else None
        for kind in dict.fromkeys(chosen[name].type for chosen in grids if name in chosen):
            solved = encode(weight, BLOCK_TYPES[kind], importance)
            loss = (
                None if moments is None else layer_loss(weight, solved.dequantize(), moments.hessian).item()
            )
            for chosen, result in zip(grids, results, strict=True):
                if name in chosen and chosen[name].type == kind:
                    result.quantized[name] = solved
                    if loss is not None:
                        result.loss[name] = loss
    return results
