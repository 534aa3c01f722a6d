"""Another solver's GPTQ result judged decision by decision, in plain arithmetic.

Two right solvers may differ: where a value lies halfway between two codes, the last bit of a matrix product decides,
and all that follows in that row is different. So the recursion is run once more, column by column as in Algorithm 1,
with the other's decisions forced on it: every code, scale and zero must be what it would have decided there, or a tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantlab.quant.grid import storable_scales


@dataclass
class Verdict:
    """Decisions other than the plain ones: ``ties`` [rows] counts those near a half, ``wrong`` the others. ``loss``
    [rows]: the sum of the squared errors."""

    ties: torch.Tensor
    wrong: int
    loss: torch.Tensor


def compare(
    value: torch.Tensor, taken: torch.Tensor, low: torch.Tensor, high: torch.Tensor, slack: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``taken`` is not ``value`` rounded and clamped: [rows] of ties (``slack`` from a half), and of the rest."""
    clamped = torch.minimum(torch.maximum(value, low), high)
    other = taken != clamped.round()
    half = (clamped - clamped.floor() - 0.5).abs() <= slack
    near = half & ((taken - clamped).abs() <= 0.5 + slack)
    return other & near, other & ~near


def plain_scales(ahead: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower end of the range and unrounded scale [rows] of the group ``ahead`` [rows, width]."""
    low, high = ahead.amin(dim=1).clamp(max=0), ahead.amax(dim=1).clamp(min=0)
    wider = torch.maximum(high, -low)
    symmetric = limits[1] == limits[2]
    low, high = torch.where(symmetric, -wider, low), torch.where(symmetric, wider, high)
    low, high = torch.where(high == low, -1.0, low), torch.where(high == low, 1.0, high)
    return low, (high - low) / limits[0]


def replay(
    w: torch.Tensor,
    factor: torch.Tensor,
    limits: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    *,
    width: int,
    group_of: torch.Tensor | None = None,
    block: int = 128,
    slack: float = 1e-4,
) -> Verdict:
    """Judge ``codes`` [rows, columns], ``scales`` and ``zeros`` [rows, groups] for ``w`` [rows, columns], all in
    solving order. ``limits`` [3, rows]: highest code, lowest and highest zero (equal: a symmetric grid); ``group_of``
    [columns] says that the grids were given. ``slack`` is in steps of the grid."""
    w, codes, zeros = w.clone(), codes.to(torch.float32), zeros.to(torch.float32)
    rows, columns = w.shape
    ties, loss = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    wrong = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start)
        for j in range(start, stop):
            group = j // width if group_of is None else int(group_of[j])
            scale, zero = scales[:, group], zeros[:, group]
            if group_of is None and j % width == 0:
                ahead = w[:, j : j + width].clone()
                beyond = max(j + width - stop, 0)
                ahead[:, width - beyond :] -= errors @ factor[start:stop, stop : stop + beyond]
                low, exact = plain_scales(ahead, limits)
                # A scale may fall either way where it is halfway between two bfloat16 values.
                below, above = storable_scales(exact * (1 - 4e-6)), storable_scales(exact * (1 + 4e-6))
                moved = scale != storable_scales(exact)
                tied = moved & ((scale == below) | (scale == above))
                ties += tied
                wrong += int((moved & ~tied).sum())
                tied, bad = compare(-low / scale, zero, limits[1], limits[2], slack)
                ties += tied
                wrong += int(bad.sum())
            tied, bad = compare(w[:, j] / scale + zero, codes[:, j], torch.zeros(rows), limits[0], slack)
            ties += tied
            wrong += int(bad.sum())
            error = (w[:, j] - (codes[:, j] - zero) * scale) / factor[j, j]
            w[:, j:stop] -= error[:, None] * factor[j : j + 1, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        loss += errors.square().sum(dim=1)
    return Verdict(ties, wrong, loss)
