"""GPTQ: rounding column by column, each error spread over the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1. For a layer ``y = W x`` with second moments
``H = X^T X / n`` it minimises ``tr((W - Q) H (W - Q)^T)`` greedily: column j is rounded, and what its rounding
adds to the error is taken off the later columns along row j of the upper Cholesky factor of ``H^-1``.

``act_order`` takes the columns with the largest ``H_jj`` first (the paper's follow-up in its repository); groups
are then runs of that order, and ``group_of`` says which column went where. ``act_order="group"`` keeps the groups
where they are and orders whole groups, and the columns inside each: most of the gain, and a checkpoint that any
kernel reads at full speed.

Not covered: a fused kernel for the column loop.
"""

from __future__ import annotations

from typing import Literal

import torch

from quantlab.quant.grid import Grid, Quantized, decode, encode, fit, layer_loss
from quantlab.quant.view import BlockResult, BlockView, split


def solve_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool | Literal["group"] = False,
    block: int = 128,
) -> Quantized:
    """Quantize one layer, or several of equal input stacked along their rows.

    Args:
        weight: [out, in], any float dtype; finite.
        hessian: second moments of the input, [in, in], symmetric, positive semi-definite.
        damp: share of the mean diagonal added to the diagonal; doubled until the factorisation succeeds.
        block: columns solved between two updates of the rest (speed only, the result is the same algebra).

    Raises:
        ValueError: the Hessian stays indefinite however much it is damped (it holds NaN or infinities).
    """
    w = weight.to(torch.float32).clone()
    h = hessian.to(torch.float32).clone()
    rows, columns = w.shape
    width = grid.columns(columns)

    # A channel that never fired says nothing about its weights: any value is as good, zero is the smallest code.
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0

    order = column_order(torch.diagonal(h), width, act_order)
    w, h = w[:, order], h[order][:, order]
    factor = inverse_factor(h, damp)  # [in, in], upper

    codes = torch.empty_like(w)
    scales = torch.empty(rows, columns // width, device=w.device)
    zeros = torch.empty_like(scales)
    scale, zero = scales[:, :1], zeros[:, :1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(rows, stop - start, device=w.device)
        tile = factor[start:stop, start:stop]
        for j in range(start, stop):
            if j % width == 0:  # a new group: its range is that of the weights as corrected so far
                group = j // width
                if j + width > stop and j > start:  # columns beyond this block still lack its corrections
                    pending = errors[:, : j - start] @ factor[start:j, stop : j + width]
                    ahead = torch.cat([w[:, j:stop], w[:, stop : j + width] - pending], dim=1)
                else:
                    ahead = w[:, j : j + width]
                scales[:, group], zeros[:, group] = fit(ahead, grid)
                scale, zero = scales[:, group : group + 1], zeros[:, group : group + 1]
            column = w[:, j : j + 1]  # [out, 1]
            code = encode(column, scale, zero, grid)
            codes[:, j : j + 1] = code
            i = j - start
            error = (column - decode(code, scale, zero)) / tile[i, i]
            w[:, j:stop] -= error * tile[i : i + 1, i:]
            errors[:, i : i + 1] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]

    back = torch.argsort(order)
    group_of = torch.arange(columns, device=w.device) // width
    if act_order == "group":  # the k-th group solved is one of the groups in place: put it back there
        placed = torch.argsort(order[::width] // width)
        scales, zeros = scales[:, placed], zeros[:, placed]
    else:
        group_of = group_of[back]
    return Quantized(codes[:, back].to(torch.uint8), scales, zeros.to(torch.int32), group_of)


def column_order(
    diagonal: torch.Tensor, width: int, act_order: bool | Literal["group"] = False
) -> torch.Tensor:
    """In which order columns are solved, int64 [in], from the Hessian's diagonal [in]; ``width`` columns a group."""
    if act_order is False:
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order is True:
        return torch.argsort(diagonal, descending=True, stable=True)
    energy = diagonal.reshape(-1, width)  # [groups, group_size]
    inside = torch.argsort(energy, dim=1, descending=True, stable=True)
    inside += torch.arange(0, len(diagonal), width, device=diagonal.device)[:, None]
    groups = torch.argsort(energy.amax(dim=1), descending=True, stable=True)
    return inside[groups].reshape(-1)


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse: ``(H + damp * mean(diag H) * I)^-1 = U^T U``.

    Too little damping for float32 shows as a failed factorisation; it is then doubled, at most 12 times.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moments hold NaN or infinite values: the model's activations overflow")
    mean = torch.diagonal(hessian).mean()
    eye = torch.eye(hessian.shape[0], device=hessian.device)
    for _ in range(12):
        lower, failed = torch.linalg.cholesky_ex(hessian + damp * mean * eye)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damp *= 2
    raise ValueError("the second moments are not positive definite, even strongly damped")


def quantize_block(
    block: BlockView, grid: Grid, *, damp: float = 0.01, act_order: bool | Literal["group"] = False
) -> BlockResult:
    """Every linear of a block; layers of equal input are solved as one matrix."""
    result = BlockResult()
    for names, weight, moments in block.stacked():
        solved = solve_gptq(weight, moments.hessian, grid, damp=damp, act_order=act_order)
        for name, part in zip(names, split(solved, [len(block.weights[n]) for n in names]), strict=True):
            result.quantized[name] = part
            result.loss[name] = layer_loss(block.weights[name], part.dequantize(), moments.hessian).item()
    return result
