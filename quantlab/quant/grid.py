"""Uniform integer grids for weights: what every rounding method here rounds to.

A weight matrix ``W [out, in]`` is cut along its input dimension into groups of ``group_size`` columns; every
(row, group) has one positive ``scale`` and one integer ``zero``, and a weight is stored as an integer code
``q`` in ``[0, 2**bits - 1]`` standing for ``(q - zero) * scale``.

Symmetric grids fix ``zero = 2**(bits-1)``; asymmetric ones take it from the group's range. This is the
convention of GPTQ (Frantar et al. 2023, arXiv:2210.17323) and of the checkpoint layouts that followed it.

Scales are rounded, before anything is rounded to them, to values that bfloat16 and float16 both hold exactly.
The solver therefore sees the scales that the kernel will use, whatever dtype the model is later loaded in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# float16 still holds all 8 significant bits of a bfloat16 value down to here (its own steps are 2**-24).
SMALLEST_SCALE = 2.0**-17
# Ranges that a search tries: the whole one first, each a thirtieth of it narrower than the one before, down to half.
SEARCHED = tuple(1 - step / 30 for step in range(16))


@dataclass(frozen=True)
class Grid:
    """The shape of a grid: how many codes, how many columns share a scale, where zero may lie.

    ``group_size`` is -1 for one group a row. ``zero_min`` is 1 for layouts that store ``zero - 1`` unsigned. ``type``
    is the block type of a GGUF file, whose grid is its own (``registry.block_types``); the rest then describes it.
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_min: int = 0
    type: str = ""

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    def columns(self, in_features: int) -> int:
        """Columns a group spans in a layer of ``in_features`` inputs."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix. ``codes`` uint8 [out, in] (float8_e4m3fn for FP8, whose zeros are all 0), ``scales`` float32
    and ``zeros`` int32 [out, groups], ``group_of`` int64 [in]: which group a column belongs to (not in order under
    act_order), ``bits``: the width of a code."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """The weights these codes stand for, float32 [out, in]."""
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        values = self.codes.to(torch.float32)
        if torch.equal(self.group_of, self.group_of.sort().values):  # no column order: scales are broadcast
            grouped = values.reshape(rows, groups, columns // groups)
            return grouped.sub_(self.zeros[..., None]).mul_(self.scales[..., None]).reshape(rows, columns)
        return values.sub_(self.zeros[:, self.group_of]).mul_(self.scales[:, self.group_of])


def storable_scales(scales: torch.Tensor) -> torch.Tensor:
    """Round positive scales to the nearest value that bfloat16 and float16 both represent."""
    return scales.to(torch.bfloat16).to(torch.float32).clamp(min=SMALLEST_SCALE, max=65280.0)


def fit(
    groups: torch.Tensor, grid: Grid, shrink: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group from its range, shrunk by ``shrink`` (1 keeps the whole range).

    Args:
        groups: float32 ``[..., group_size]``.
        shrink: a number, or a tensor broadcastable to ``[...]``.

    Returns:
        ``scale`` float32 and ``zero`` float32 (integers), both ``[...]``. An all-zero group gets a grid on
        which zero is exact.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)  # aminmax is several times as slow on CPUs
    return fit_range(low.clamp(max=0.0) * shrink, high.clamp(min=0.0) * shrink, grid)


def fit_range(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero for values between ``low <= 0`` and ``high >= 0``, of any shape."""
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high - low == 0
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = storable_scales((high - low) / grid.max_code)
    if grid.symmetric:
        zero = torch.full_like(scale, float((grid.max_code + 1) // 2))
    else:
        zero = torch.round(-low / scale).clamp(grid.zero_min, grid.max_code)
    return scale, zero


def search(groups: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`fit`, on the range among ``SEARCHED`` on which rounding costs least, the first of equals.

    Args:
        groups: float32 [rows, group_size].
        importance: of each column's squared error, float32 [group_size].

    Returns:
        ``scale`` and ``zero``, float32 [rows].
    """
    low, high = groups.amin(dim=-1).clamp(max=0.0), groups.amax(dim=-1).clamp(min=0.0)
    scale = zero = least = groups.new_empty(0)
    for shrink in SEARCHED:
        s, z = fit_range(low * shrink, high * shrink, grid)
        cost = nearest_values(groups, s, z, grid).sub_(groups).square_() @ importance
        if not len(least):
            scale, zero, least = s, z, cost
            continue
        better = cost < least
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        least = torch.minimum(cost, least)
    return scale, zero


def encode(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Nearest codes of ``values`` (float32, as float so that they can go on being computed with)."""
    return torch.round(values / scale + zero).clamp(0, grid.max_code)


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """What ``codes`` stand for: ``(codes - zero) * scale``."""
    return (codes - zero) * scale


def round_to_grid(weight: torch.Tensor, grid: Grid, shrink: float | torch.Tensor = 1.0) -> Quantized:
    """Round-to-nearest of ``weight`` float32 [out, in] on grids fitted to its groups.

    ``shrink`` is a number or a tensor [out, groups].
    """
    rows, columns = weight.shape
    width = grid.columns(columns)
    groups = weight.reshape(rows, columns // width, width)  # [out, groups, group_size]
    scale, zero = fit(groups, grid, shrink)
    codes = encode(groups, scale[..., None], zero[..., None], grid)
    group_of = torch.arange(columns, device=weight.device) // width
    return Quantized(
        codes.reshape(rows, columns).to(torch.uint8), scale, zero.to(torch.int32), group_of, grid.bits
    )


def nearest_values(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """``values`` [..., group_size] rounded to their grids (``scale`` and ``zero`` [...]); a new tensor."""
    s, z = scale[..., None], zero[..., None]
    return torch.div(values, s).add_(z).round_().clamp_(0, grid.max_code).sub_(z).mul_(s)


def layer_loss(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Mean squared output error a token of ``approximation`` for ``weight`` (both [out, in]): tr(E H E^T)
    with H = X^T X / n [in, in], that is ``mean_n |x_n E^T|^2``. Scalar. Of an H that is its diagonal alone, [in], what
    the products of different channels add is left out."""
    error = weight - approximation
    if hessian.dim() == 1:
        return error.square().sum(dim=0) @ hessian
    return ((error @ hessian) * error).sum()
