"""AWQ on one decoder block: which scales can be undone where, and what folding them changes.

A scale on a layer's input channels is undone by whatever produced that input:

* a normalisation: its weight (and bias) is divided, in its own dtype; the scale becomes what was really divided by;
* ``v_proj`` for ``o_proj`` and ``up_proj`` for ``down_proj``: attention and the gated activation are linear in them, so
  their rows are divided, in float32, before they are rounded themselves. Query heads that share a value head share
  its scale.

Inputs with no such producer keep the scale 1.
"""

from __future__ import annotations

import torch

from quantlab.quant.awq import Realize, search_scales, solve_awq
from quantlab.quant.grid import Grid, layer_loss
from quantlab.quant.rtn import quantize_block as rtn_quantize_block
from quantlab.quant.view import BlockResult, BlockView

# Consumer and producer, by the last part of their names; both must have one parent.
LINEAR_PAIRS = {"o_proj": "v_proj", "down_proj": "up_proj"}


def quantize_block(
    block: BlockView,
    grid: Grid,
    *,
    scale_search: bool = True,
    clip_search: bool = True,
    search_steps: int = 20,
) -> BlockResult:
    """Every linear of a block. No layer ends with a larger loss than round-to-nearest leaves it."""
    plain = rtn_quantize_block(block, grid).loss
    pairs = linear_pairs(block) if scale_search else {}
    while True:
        result = _attempt(block, grid, pairs, scale_search, clip_search, search_steps)
        worse = [name for name in result.loss if result.loss[name] > plain[name]]
        drop = {consumer for consumer, producer in pairs.items() if producer in worse or consumer in worse}
        if not drop:
            break
        # Dividing a producer's rows moved its rounded grid scales to its disadvantage: leave that pair alone.
        pairs = {c: p for c, p in pairs.items() if c not in drop}
    return result


def linear_pairs(block: BlockView) -> dict[str, str]:
    """Consumer to producer, where a linear's input scale can be undone in another linear's rows."""
    found = {}
    for moments in block.moments:
        consumer = moments.layers[0]
        parent, _, leaf = consumer.rpartition(".")
        producer = f"{parent}.{LINEAR_PAIRS.get(leaf, '')}"
        if len(moments.layers) > 1 or producer not in block.weights:
            continue
        rows, columns = block.weights[producer].shape[0], block.weights[consumer].shape[1]
        if rows == columns or (block.head_dim and columns % rows == 0 and rows % block.head_dim == 0):
            found[consumer] = producer
    return found


def _attempt(
    block: BlockView, grid: Grid, pairs: dict[str, str], scale_search: bool, clip: bool, steps: int
) -> BlockResult:
    result = BlockResult()
    divide = {name: torch.ones(len(w), device=w.device) for name, w in block.weights.items()}  # rows, [out]
    # Consumers of linears first: their scales change the rows of the producers, which are solved afterwards.
    for moments in sorted(block.moments, key=lambda m: m.layers[0] not in pairs):
        names = moments.layers
        weights = [block.weights[n] / divide[n][:, None] for n in names]
        scale = torch.ones_like(moments.magnitude)
        norm = block.norms.get(names[0])
        if names[0] in pairs:
            rows = block.weights[pairs[names[0]]].shape[0]
            tie = tie_heads(rows, len(scale), block.head_dim).to(scale.device)
            scale = search_scales(weights, moments.hessian, moments.magnitude, grid, steps=steps, tie=tie)
            first = torch.zeros(rows, dtype=torch.int64, device=tie.device)  # a column fed by each row
            first.scatter_(0, tie, torch.arange(len(tie), device=tie.device))
            divide[pairs[names[0]]] = scale[first]
        elif norm is not None and scale_search:
            realize = Realize(norm.weight, norm.weight.dtype, norm.offset)
            scale = search_scales(
                weights, moments.hessian, moments.magnitude, grid, steps=steps, realize=realize
            )
            if not bool((scale == 1).all()):
                result.replaced[f"{norm.name}.weight"] = realize.folded(scale)
                if norm.name in block.biases:
                    bias = block.biases[norm.name]
                    result.replaced[f"{norm.name}.bias"] = (bias.to(torch.float32) / scale).to(bias.dtype)
        for name, weight in zip(names, weights, strict=True):
            solved = solve_awq(weight, moments.hessian, scale, grid, clip=clip)
            result.quantized[name] = solved
            effective = solved.dequantize() / scale * divide[name][:, None]
            result.loss[name] = layer_loss(block.weights[name], effective, moments.hessian).item()
    for name, by in divide.items():
        if name in block.biases and not bool((by == 1).all()):
            bias = block.biases[name]
            result.replaced[f"{name}.bias"] = (bias.to(torch.float32) / by).to(bias.dtype)
    return result


def tie_heads(rows: int, columns: int, head_dim: int) -> torch.Tensor:
    """Which producer row feeds each consumer column, int64 [columns]. With ``columns > rows`` (grouped-query attention)
    consecutive heads of ``head_dim`` columns repeat one value head."""
    column = torch.arange(columns)
    if rows == columns:
        return column
    repeats = columns // rows
    head, inside = column // head_dim, column % head_dim
    return (head // repeats) * head_dim + inside
