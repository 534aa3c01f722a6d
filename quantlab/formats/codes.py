"""A linear as every format of integer codes means it, whatever the bytes: what conversion goes through.

    weight[i, j] = scales[i, g] * (codes[i, j] - zeros[i, g])        with g = group_of[j]

A format's ``read`` makes this of its tensors, ``refit`` says whether a narrower, wider, symmetric or asymmetric grid
holds the very same weights, and a format's ``pack`` writes it. Only integers move; a scale is never changed here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Codes(NamedTuple):
    """``codes`` uint8 [out, in]; ``scales`` float32 [out, groups], of either sign; ``zeros`` int32 [out, groups], of
    any size; ``group_of`` int64 [in]: the group of each column; ``bits``: the width of a code."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor
    bits: int

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.columns // self.scales.shape[1]

    @property
    def ordered(self) -> bool:
        """Whether the columns of a group are neighbours, the groups in order and of one size."""
        if self.columns % self.scales.shape[1]:
            return False
        return torch.equal(self.group_of, torch.arange(self.columns) // self.width)

    def levels(self) -> torch.Tensor:
        """What the scales are multiplied by, int32 [out, in]."""
        values = self.codes.to(torch.int32)
        if self.ordered:
            grouped = values.view(len(values), -1, self.width)
            return grouped.sub_(self.zeros[..., None]).view(values.shape)
        return values.sub_(self.zeros[:, self.group_of])

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [out, in]."""
        values = self.levels().to(torch.float32)
        if self.ordered:
            grouped = values.view(len(values), -1, self.width)
            return grouped.mul_(self.scales[..., None]).view(values.shape)
        return values.mul_(self.scales[:, self.group_of])


def spans(held: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest level of each group, int32 [out, groups]; both 0 in a group without columns."""
    levels = held.levels()
    if held.ordered:
        grouped = levels.view(len(levels), -1, held.width)
        return grouped.amin(-1), grouped.amax(-1)
    where, empty = held.group_of.expand_as(levels), torch.zeros_like(held.zeros)
    low = empty.scatter_reduce(1, where, levels, "amin", include_self=False)
    return low, empty.scatter_reduce(1, where, levels, "amax", include_self=False)


def zeros_for(
    zeros: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    *,
    symmetric: bool,
    zero_min: int = 0,
) -> torch.Tensor | None:
    """The zeros of codes of ``bits`` bits for levels from ``low`` to ``high``; None where there are none. All int32
    [out, groups].

    Args:
        zeros: what they are now; they stay so as far as the levels allow.
        symmetric: every zero is ``2**(bits-1)``. zero_min: the least zero that the format stores.
    """
    top = 2**bits - 1
    least, most = (-low).clamp(min=zero_min), (top - high).clamp(max=top)
    found = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros.maximum(least).minimum(most)
    return found if bool(((least <= found) & (found <= most)).all()) else None


def refit(held: Codes, bits: int, *, symmetric: bool, zero_min: int = 0) -> Codes | None:
    """The same weights as codes of ``bits`` bits; None where such codes do not hold them. ``symmetric`` and
    ``zero_min`` as for :func:`zeros_for`."""
    zeros = zeros_for(held.zeros, *spans(held), bits, symmetric=symmetric, zero_min=zero_min)
    if zeros is None:
        return None
    levels = held.levels()
    if held.ordered:
        codes = levels.view(len(levels), -1, held.width).add_(zeros[..., None]).view(levels.shape)
    else:
        codes = levels.add_(zeros[:, held.group_of])
    return held._replace(codes=codes.to(torch.uint8), zeros=zeros, bits=bits)


def rounding_error(values: torch.Tensor, dtype: torch.dtype) -> float:
    """How far ``values`` float32 are off in ``dtype`` at most, relative to themselves; infinite where one does not
    survive at all."""
    stored = values.to(dtype).to(torch.float32)
    off = (stored - values).abs()
    if not bool(off.any()):
        return 0.0
    error = (off / values.abs())[off != 0].amax().item()
    return error if error < 1 else float("inf")
