"""Grids: exact cases, degenerate groups, and the promise that scales survive any 16-bit dtype."""

import pytest
import torch

from quantlab.quant.grid import Grid, fit, layer_loss, round_to_grid, storable_scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_error_is_at_most_one_step(width: int, symmetric: bool) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(width))
    grid = Grid(width, 32, symmetric, zero_min=1)
    quantized = round_to_grid(weight, grid)
    step = quantized.scales[:, quantized.group_of]
    # Half a step inside the range; the ends may lose up to a step to the rounding of scale and zero.
    assert ((quantized.dequantize() - weight).abs() <= 1.05 * step).all()
    assert quantized.codes.max() <= grid.max_code


def test_zero_group_is_exact() -> None:
    weight = torch.zeros(4, 32)
    for symmetric in (True, False):
        assert torch.equal(round_to_grid(weight, Grid(4, 16, symmetric)).dequantize(), weight)


def test_zero_min_is_kept() -> None:
    """All weights positive: the range starts at zero, whose code would be 0."""
    weight = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    assert (round_to_grid(weight, Grid(4, 32, False, zero_min=1)).zeros >= 1).all()
    assert (round_to_grid(weight, Grid(4, 32, False, zero_min=0)).zeros == 0).all()


def test_scales_are_exact_in_both_half_precisions() -> None:
    scales = storable_scales(torch.logspace(-7, 3, 500))
    assert torch.equal(scales.to(torch.float16).to(torch.float32), scales)
    assert torch.equal(scales.to(torch.bfloat16).to(torch.float32), scales)


def test_one_group_a_row() -> None:
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    quantized = round_to_grid(weight, Grid(8, -1, True))
    assert quantized.scales.shape == (4, 1)
    assert (quantized.dequantize() - weight).abs().max() < 0.03


def test_fit_shrinks_the_range() -> None:
    groups = torch.tensor([[-1.0, 1.0]])
    full, _ = fit(groups, Grid(4, 2, True))
    half, _ = fit(groups, Grid(4, 2, True), shrink=0.5)
    assert half.item() == pytest.approx(full.item() / 2, rel=0.01)


def test_layer_loss_is_the_output_error() -> None:
    seeded = torch.Generator().manual_seed(2)
    weight, near, x = (torch.randn(5, 8, generator=seeded) for _ in range(3))
    hessian = x.t() @ x / len(x)
    direct = ((x @ (weight - near).t()) ** 2).sum() / len(x)
    assert torch.allclose(layer_loss(weight, near, hessian), direct, rtol=1e-5)
