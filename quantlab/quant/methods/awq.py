"""AWQ on one decoder block: which scales can be undone where, and what folding them changes.

A scale on a layer's input channels is undone by whatever produced that input (``quantlab.models.scale_folding`` finds
out):

* a normalisation: its weight (and bias) is divided, in its own dtype; the scale becomes what was really divided by. All
  readers of the norm share the scale, experts as well as a router, which is not quantized and multiplied in its dtype;
* a linear (values for an attention's output, the linear half of a gated perceptron for its last layer): its rows are
  divided, in float32, before they are rounded themselves. Query heads that share a value head share its scale.

Inputs with no such producer keep the scale 1. A layer that stays as it is and reads a norm whose scale is moved is
multiplied in its own dtype, as a router is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantlab.models.scale_folding import LinearPair
from quantlab.quant.block import BlockResult, BlockView
from quantlab.quant.grid import Grid
from quantlab.quant.hessian import InputHessian
from quantlab.quant.methods.awq_search import Realize, row_loss, search_scales, solve_awq


def quantize_block(
    block: BlockView,
    grids: Sequence[Mapping[str, Grid]],
    *,
    scale_search: bool = True,
    clip_search: bool = True,
    search_steps: int = 20,
) -> list[BlockResult]:
    """Every linear that a set of ``grids`` names, on its grid; one result a set. No layer ends with a larger loss than
    round-to-nearest leaves it."""
    return [_on_grids(block, chosen, scale_search, clip_search, search_steps) for chosen in grids]


def _on_grids(
    block: BlockView, grids: Mapping[str, Grid], scale_search: bool, clip: bool, steps: int
) -> BlockResult:
    seen = {name: m for m in block.moments for name in m.layers if name in grids}
    rounded = {
        name: row_loss(block.weight(name), torch.ones_like(m.magnitude), m.hessian, grids[name])
        for name, m in seen.items()
    }
    plain = {name: losses.sum().item() for name, losses in rounded.items()}
    every = block.structure.pairs if scale_search else ()
    pairs = [pair for pair in every if pair.producer in grids and pair.consumer in grids]
    while True:
        result = _attempt(block, seen, rounded, grids, pairs, scale_search, clip, steps)
        # Two sums of the same thing in another order differ by rounding.
        worse = {name for name in result.loss if result.loss[name] > plain[name] * (1 + 1e-5)}
        kept = [pair for pair in pairs if not {pair.producer, pair.consumer} & worse]
        if len(kept) == len(pairs):
            return result
        # Dividing a producer's rows moved its rounded grid scales to its disadvantage: leave that pair alone.
        pairs = kept


def _attempt(
    block: BlockView,
    seen: Mapping[str, InputHessian],
    rounded: Mapping[str, torch.Tensor],
    grids: Mapping[str, Grid],
    pairs: Sequence[LinearPair],
    scale_search: bool,
    clip: bool,
    steps: int,
) -> BlockResult:
    result = BlockResult()
    divide = {name: torch.ones(len(w), device=w.device) for name, w in block.stored.items()}  # rows, [out]
    scales: dict[str, torch.Tensor] = {}  # by layer, [in]
    full = dict(rounded)  # losses before clipping, by layer, [out]
    # Pairs first: their scales change the rows of the producers, which are searched and solved afterwards.
    for pair in pairs:
        m = seen[pair.consumer]
        tie = pair.rows.to(m.magnitude.device)
        weight = block.weight(pair.consumer)
        known: Sequence[torch.Tensor] | None = [rounded[pair.consumer]]
        scale, found = search_scales(
            [weight], [m.hessian], m.magnitude, [grids[pair.consumer]], steps=steps, tie=tie, plain=known
        )
        scales[pair.consumer] = scale
        full[pair.consumer] = found[0]
        divide[pair.producer][tie] = scale  # columns of one row have one scale
    divided = [name for name, by in divide.items() if not bool((by == 1).all())]
    for name in divided:
        full.pop(name, None)  # of rows as they were
    for fold in block.structure.norms if scale_search else ():
        layers = [name for name in fold.layers if name in grids]
        others = [*fold.others, *(name for name in fold.layers if name not in grids)]
        if not layers:
            continue
        norm = block.norms[fold.norm]
        realize = Realize(norm.weight, norm.weight.dtype, norm.offset)
        weights = [block.weight(n) / divide[n][:, None] for n in layers]
        tokens = sum(seen[n].tokens for n in layers)
        mean = sum(seen[n].magnitude * (seen[n].tokens / max(tokens, 1)) for n in layers)
        assert isinstance(mean, torch.Tensor)
        hessians = [seen[n].hessian for n in layers]
        known = [rounded[n] for n in layers] if not {*divided} & {*layers} else None
        own = [grids[n] for n in layers]
        scale, found = search_scales(weights, hessians, mean, own, steps=steps, realize=realize, plain=known)
        full.update(zip(layers, found, strict=True))
        if bool((scale == 1).all()):
            continue
        scales.update(dict.fromkeys(layers, scale))
        result.replaced[f"{fold.norm}.weight"] = realize.folded(scale)
        _multiply(result, block, f"{fold.norm}.bias", 1 / scale)
        for name in others:
            _multiply(result, block, f"{name}.weight", scale)
    for name, m in seen.items():
        scale = scales.get(name, torch.ones_like(m.magnitude))
        weight = block.weight(name) / divide[name][:, None]
        result.quantized[name], loss = solve_awq(
            weight, m.hessian, scale, grids[name], clip=clip, full=full.get(name)
        )
        result.loss[name] = (loss * divide[name].square()).sum().item()  # rows in their original size
    for name in divided:
        _multiply(result, block, f"{name}.bias", 1 / divide[name])
    return result


def _multiply(result: BlockResult, block: BlockView, name: str, by: torch.Tensor) -> None:
    """Multiply a parameter that is not quantized, if the block has it, in its own dtype."""
    value = block.plain.get(name, block.stored.get(name.removesuffix(".weight")))
    if value is not None:
        result.replaced[name] = (value.to(torch.float32) * by).to(value.dtype)
