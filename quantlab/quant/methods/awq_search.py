"""AWQ: scale the channels that matter up before rounding, and undo it in the operation before.

Lin et al.: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024,
arXiv:2306.00978. A per-channel scale s leaves ``W x = (W diag(s)) (diag(s)^-1 x)`` unchanged in exact arithmetic,
but the rounding error of channel j is divided by ``s_j``. Section 3.2 searches ``s = a^alpha`` (``a`` mean absolute
activation) over alpha in [0, 1]; the authors' code divides by the weights' own size as well, and both
families are tried here. The clip search of the authors' code (shrinking a group's range) follows.

The loss of a candidate is its exact mean squared output error over the calibration tokens, written with the
second moments: ``tr((W - W') H (W - W')^T)``, so no candidate runs the model again. Candidates are ranked on a sample
of the rows (``SCREENED`` of each layer: rows are independent, and a scale is judged by their sum); the best are then
measured on all. Where candidates are only ranked, products may round their operands to bfloat16: it moves the sum of a
sample's losses by less than 1e-4. A candidate that makes any of the layers sharing the scale worse than plain rounding
is dropped, so the result is never worse than round-to-nearest for any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantlab.models.precision import bfloat16_operands
from quantlab.quant.grid import Grid, Quantized, fit, fit_range, nearest_values, round_to_grid

SCREENED = 128  # rows of each layer that candidates are ranked on
TRIED = 5  # of the best candidates measured on all rows: where so many fail there is little to gain
CHUNK = 1 << 17  # weights worked on at once where every step is an elementwise pass: they stay in the cache


def search_scales(
    weights: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
    magnitude: torch.Tensor,
    grids: Sequence[Grid],
    *,
    steps: int = 20,
    tie: torch.Tensor | None = None,
    realize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    plain: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The scale per input channel, float32 [in], for layers whose inputs must share one, and the :func:`row_loss` of
    every layer with it, [out_i] each.

    Args:
        weights: matrices [out_i, in], float32.
        hessians: second moments of each one's input [in, in] (the same for all that share an input; those of the
            tokens routed to it for an expert).
        magnitude: mean absolute activation per channel [in].
        grids: of each matrix.
        steps: how many alphas between 0 and 1. Every second one is tried, then the neighbours of the best.
        plain: the row loss of each matrix when it is rounded as it is, where that is known.
        tie: int64 [in], channels with the same number must share a scale (grouped-query attention);
            None leaves every channel free.
        realize: maps a wished scale to the one that the preceding operation can undo exactly in its
            own dtype (a normalisation's bfloat16 weight, say); None takes the wish as it is.

    The scale is all ones where no candidate beats plain rounding.
    """
    ones = torch.ones_like(magnitude)
    sample = [w[:: -(-len(w) // SCREENED)] for w in weights]
    # Errors of different layers are weighed by the energy of their outputs, so that none drowns the others.
    energy = [max(((w @ h) * w).sum().item(), 1e-20) for w, h in zip(sample, hessians, strict=True)]

    def judged(scale: torch.Tensor) -> float:
        with bfloat16_operands(magnitude.device):
            losses = [
                row_loss(w, scale, h, grid).sum().item()
                for w, h, grid in zip(sample, hessians, grids, strict=True)
            ]
        return sum(loss / e for loss, e in zip(losses, energy, strict=True))

    unscaled = judged(ones)
    ranked: list[tuple[float, int, torch.Tensor]] = []
    family = Candidates(weights, magnitude, steps)
    tried: dict[tuple[int, int], float] = {}

    def attempt(kind: int, step: int) -> None:
        if (kind, step) in tried or not 1 <= step <= steps:
            return
        scale = family.scale(kind, step)
        if tie is not None:
            scale = _average_tied(scale, tie)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if realize is not None:
            scale = realize(scale)
        sound = bool(torch.isfinite(scale).all() and (scale > 0).all())
        tried[kind, step] = judged(scale) if sound else float("inf")
        if tried[kind, step] < unscaled:
            ranked.append((tried[kind, step], len(ranked), scale))

    for kind in range(family.kinds):
        for step in range(2 if steps > 2 else 1, steps + 1, 2):
            attempt(kind, step)
    kind, step = min(tried, key=lambda at: tried[at])
    attempt(kind, step - 1)
    attempt(kind, step + 1)
    if plain is None:
        plain = [row_loss(w, ones, h, grid) for w, h, grid in zip(weights, hessians, grids, strict=True)]
    for _, _, scale in sorted(ranked, key=lambda entry: entry[:2])[:TRIED]:
        scaled = [row_loss(w, scale, h, grid) for w, h, grid in zip(weights, hessians, grids, strict=True)]
        if all(a.sum() <= b.sum() for a, b in zip(scaled, plain, strict=True)):
            return scale, scaled
    return ones, plain


def row_loss(
    weight: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    shrink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared output error a token of every row [out] when ``weight * scale`` [out, in] is rounded and divided by
    ``scale`` [in] again; ``shrink`` [out, groups] narrows the groups' ranges."""
    rows, columns = weight.shape
    width = grid.columns(columns)
    losses = []
    for start in range(0, rows, max(1, 8 * CHUNK // columns)):
        part = slice(start, start + max(1, 8 * CHUNK // columns))
        scaled = (weight[part] * scale).view(-1, columns // width, width)
        ranges = fit(scaled, grid, 1.0 if shrink is None else shrink[part])
        error = nearest_values(scaled, *ranges, grid).sub_(scaled).view(-1, columns).div_(scale)
        losses.append((error @ hessian).mul_(error).sum(dim=1))
    return torch.cat(losses)


class Realize:
    """Scales that ``values / scale`` can hold exactly in ``dtype``: the division is rounded to the dtype, and the
    scale becomes what was really divided by. ``values`` is the weight of the preceding normalisation [in]."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype, offset: float = 0.0) -> None:
        self.values, self.dtype, self.offset = values.to(torch.float32), dtype, offset

    def folded(self, scale: torch.Tensor) -> torch.Tensor:
        """The stored weight after folding, in ``dtype`` (``offset`` is 1 where the norm multiplies by 1 + weight)."""
        return ((self.values + self.offset) / scale - self.offset).to(self.dtype)

    def __call__(self, scale: torch.Tensor) -> torch.Tensor:
        before = self.values + self.offset
        after = self.folded(scale).to(torch.float32) + self.offset
        return torch.where(before == 0, scale, before / after)


class Candidates:
    """Scales [in] worth trying: a^alpha, and a^alpha / w^(1 - alpha) with w the weights' mean share of their row."""

    kinds = 2

    def __init__(self, weights: Sequence[torch.Tensor], magnitude: torch.Tensor, steps: int) -> None:
        self.steps = steps
        self.activation = magnitude.clamp(min=1e-8)
        shares, rows = torch.zeros_like(magnitude), 0
        for w in weights:
            size = w.abs()
            shares += (size / size.amax(dim=1, keepdim=True).clamp(min=1e-8)).sum(dim=0)
            rows += len(w)
        self.share = (shares / rows).clamp(min=1e-8)

    def scale(self, kind: int, step: int) -> torch.Tensor:
        """Of the first or second kind, with alpha = step / steps."""
        alpha = step / self.steps
        scale = self.activation.pow(alpha)
        return (scale if kind == 0 else scale / self.share.pow(1 - alpha)).clamp(min=1e-4)


def _average_tied(scale: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """Geometric mean over the channels that must share a scale."""
    count = int(tie.max()) + 1
    sums = torch.zeros(count, device=scale.device).index_add_(0, tie, scale.log())
    sizes = torch.zeros(count, device=scale.device).index_add_(0, tie, torch.ones_like(scale))
    return (sums / sizes).exp()[tie]


def search_clip(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    full: torch.Tensor | None = None,
    steps: int = 10,
    smallest: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far to shrink each group's range, float32 [out, groups], 1 where clipping does not pay; and the squared
    output error a token of every row [out] with that.

    A group is judged by the diagonal block of H that belongs to its columns, so groups are independent; the
    whole matrix is checked afterwards with the full H, row by row, and a row that got worse keeps its full range.

    Args:
        weight: [out, in] float32, already scaled. hessian: in the coordinates of ``weight`` [in, in].
        full: the rows' loss without clipping [out], where it is known.
    """
    columns = weight.shape[1]
    width = grid.columns(columns)
    count = columns // width
    blocks = torch.stack(  # [groups, group_size, group_size]
        [hessian[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(count)]
    )
    chunk = max(1, CHUNK // columns)
    with bfloat16_operands(weight.device):
        best = torch.cat([_clip_rows(part, blocks, grid, steps, smallest) for part in weight.split(chunk)])
    ones = torch.ones(columns, device=weight.device)
    if full is None:
        full = row_loss(weight, ones, hessian, grid)
    clipped = row_loss(weight, ones, hessian, grid, best)
    return torch.where((clipped < full)[:, None], best, torch.ones_like(best)), torch.minimum(full, clipped)


def _clip_rows(
    weight: torch.Tensor, blocks: torch.Tensor, grid: Grid, steps: int, smallest: float
) -> torch.Tensor:
    """The best shrink of each group of some rows [rows, groups], judged by ``blocks`` [groups, size, size]."""
    count, width, _ = blocks.shape
    groups = weight.view(-1, count, width)  # [rows, groups, group_size]
    low, high = groups.amin(dim=-1).clamp(max=0.0), groups.amax(dim=-1).clamp(min=0.0)
    best = torch.ones_like(low)
    best_loss = torch.full_like(low, float("inf"))
    for step in range(steps + 1):
        shrink = 1.0 - step * (1.0 - smallest) / steps
        error = nearest_values(groups, *fit_range(low * shrink, high * shrink, grid), grid).sub_(groups)
        by_group = error.transpose(0, 1).contiguous()  # [groups, rows, group_size]
        loss = torch.bmm(by_group, blocks).mul_(by_group).sum(dim=-1).t()  # [rows, groups]
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, shrink, best)
    return best


def solve_awq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
    *,
    clip: bool,
    full: torch.Tensor | None = None,
) -> tuple[Quantized, torch.Tensor]:
    """Round ``weight * scale`` [out, in] on grids clipped for ``hessian`` (given in unscaled coordinates). ``full``:
    what :func:`row_loss` gives for ``scale``, where it is known.

    Returns:
        The result, and the squared output error a token of every row [out].
    """
    scaled = weight.to(torch.float32) * scale
    if not clip:
        return round_to_grid(scaled, grid), row_loss(weight, scale, hessian, grid) if full is None else full
    shrink, loss = search_clip(scaled, hessian / torch.outer(scale, scale), grid, full=full)
    return round_to_grid(scaled, grid, shrink), loss
