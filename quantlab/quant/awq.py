"""AWQ: scale the channels that matter up before rounding, and undo it in the operation before.

Lin et al.: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024,
arXiv:2306.00978. A per-channel scale s leaves ``W x = (W diag(s)) (diag(s)^-1 x)`` unchanged in exact arithmetic,
but the rounding error of channel j is divided by ``s_j``. Section 3.2 searches ``s = a^alpha`` (``a`` mean absolute
activation) over alpha in [0, 1]; the authors' code divides by the weights' own size as well, and both
families are tried here. The clip search of the authors' code (shrinking a group's range) follows.

The loss of a candidate is its exact mean squared output error over the calibration tokens, written with the
second moments: ``tr((W - W') H (W - W')^T)``, so no candidate runs the model again. A candidate that makes any of
the layers sharing the scale worse than plain rounding is dropped; ``s = 1`` is always among the candidates, so
the result is never worse than round-to-nearest for any layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quantlab.quant.grid import Grid, Quantized, layer_loss, round_to_grid


def search_scales(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    magnitude: torch.Tensor,
    grid: Grid,
    *,
    steps: int = 20,
    tie: torch.Tensor | None = None,
    realize: Realize | None = None,
) -> torch.Tensor:
    """The scale per input channel, float32 [in], for layers that share one input.

    Args:
        weights: matrices [out_i, in], float32.
        hessian: second moments of the shared input [in, in].
        magnitude: mean absolute activation per channel [in].
        steps: how many alphas between 0 and 1.
        tie: int64 [in], channels with the same number must share a scale (grouped-query attention);
            None leaves every channel free.
        realize: maps a wished scale to the one that the preceding operation can undo exactly in its
            own dtype (a normalisation's bfloat16 weight, say); None takes the wish as it is.

    Returns:
        All ones where no candidate beats plain rounding.
    """
    ones = torch.ones_like(magnitude)
    # Errors of different layers are weighed by the energy of their outputs, so that none drowns the others.
    energy = [layer_loss(w, torch.zeros_like(w), hessian).clamp(min=1e-20) for w in weights]
    plain = [layer_loss(w, round_to_grid(w, grid).dequantize(), hessian) for w in weights]
    best, best_loss = ones, sum((p / e).item() for p, e in zip(plain, energy, strict=True))
    for candidate in candidates(weights, magnitude, steps):
        scale = candidate if tie is None else _average_tied(candidate, tie)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if realize is not None:
            scale = realize(scale)
        if not torch.isfinite(scale).all() or (scale <= 0).any():
            continue
        losses = [
            layer_loss(w, round_to_grid(w * scale, grid).dequantize() / scale, hessian) for w in weights
        ]
        if any(bool(loss > p) for loss, p in zip(losses, plain, strict=True)):
            continue
        total = sum((loss / e).item() for loss, e in zip(losses, energy, strict=True))
        if total < best_loss:
            best, best_loss = scale, total
    return best


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


def candidates(
    weights: Sequence[torch.Tensor], magnitude: torch.Tensor, steps: int
) -> Iterator[torch.Tensor]:
    """Scales [in] worth trying: a^alpha, and a^alpha / w^(1 - alpha) with w the weights' mean share of their row."""
    a = magnitude.clamp(min=1e-8)
    stacked = torch.cat([w.abs() for w in weights])  # [sum out, in]
    w = (stacked / stacked.amax(dim=1, keepdim=True).clamp(min=1e-8)).mean(dim=0).clamp(min=1e-8)
    for step in range(1, steps + 1):
        alpha = step / steps
        yield a.pow(alpha).clamp(min=1e-4)
        yield (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=1e-4)


def _average_tied(scale: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """Geometric mean over the channels that must share a scale."""
    count = int(tie.max()) + 1
    sums = torch.zeros(count, device=scale.device).index_add_(0, tie, scale.log())
    sizes = torch.zeros(count, device=scale.device).index_add_(0, tie, torch.ones_like(scale))
    return (sums / sizes).exp()[tie]


def search_clip(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, steps: int = 10, smallest: float = 0.5
) -> torch.Tensor:
    """How far to shrink each group's range, float32 [out, groups], 1 where clipping does not pay.

    A group is judged by the diagonal block of H that belongs to its columns, so groups are independent; the
    whole matrix is checked afterwards with the full H, row by row, and a row that got worse keeps its full range.

    Args:
        weight: [out, in] float32, already scaled. hessian: in the coordinates of ``weight`` [in, in].
    """
    rows, columns = weight.shape
    width = grid.columns(columns)
    count = columns // width
    blocks = torch.stack(
        [hessian[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(count)]
    )
    best = torch.ones(rows, count, device=weight.device)
    best_loss = torch.full((rows, count), float("inf"), device=weight.device)
    for step in range(steps + 1):
        shrink = 1.0 - step * (1.0 - smallest) / steps
        error = (weight - round_to_grid(weight, grid, shrink).dequantize()).reshape(rows, count, width)
        loss = (torch.einsum("rgi,gij->rgj", error, blocks) * error).sum(dim=-1)  # [out, groups]
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, torch.full_like(best, shrink), best)
    full = _row_loss(weight, round_to_grid(weight, grid).dequantize(), hessian)
    clipped = _row_loss(weight, round_to_grid(weight, grid, best).dequantize(), hessian)
    return torch.where((clipped < full)[:, None], best, torch.ones_like(best))


def solve_awq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, grid: Grid, *, clip: bool
) -> Quantized:
    """Round ``weight * scale`` [out, in] on grids clipped for ``hessian`` (given in unscaled coordinates)."""
    scaled = weight.to(torch.float32) * scale
    if not clip:
        return round_to_grid(scaled, grid)
    return round_to_grid(scaled, grid, search_clip(scaled, hessian / torch.outer(scale, scale), grid))


def _row_loss(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = weight - approximation
    return ((error @ hessian) * error).sum(dim=1)
