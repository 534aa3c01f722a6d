"""The GPTQ solver against the paper's algorithm written naively, against brute force, and at its edges."""

import itertools
from typing import Any

import pytest
import torch

from quantlab.quant.grid import Grid, decode, encode, fit, layer_loss, round_to_grid
from quantlab.quant.methods import gptq
from quantlab.quant.methods.gptq import column_order, inverse_factor, solve_gptq


def problem(
    out: int = 32, columns: int = 64, tokens: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and second moments [in, in] of correlated inputs."""
    seeded = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=seeded) / 4
    x = torch.randn(tokens, columns, generator=seeded) @ (mix + torch.eye(columns))
    return torch.randn(out, columns, generator=seeded), x.t() @ x / tokens


def naive(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, damp: float) -> torch.Tensor:
    """Algorithm 1 with the inverse recomputed for every column (OBS, section 3.1), in float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damp * torch.diagonal(h).mean() * torch.eye(len(h), dtype=torch.float64)
    result = torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % grid.group_size == 0:
            scale, zero = fit(w[:, j : j + grid.group_size].float(), grid)
        inverse = torch.linalg.inv(h[j:, j:])
        value = decode(encode(w[:, j].float(), scale, zero, grid), scale, zero).double()
        result[:, j] = value
        error = (w[:, j] - value) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0][None]
    return result.float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_equals_the_naive_algorithm(width: int, symmetric: bool) -> None:
    weight, hessian = problem()
    grid = Grid(width, 16, symmetric, zero_min=1)
    ours = solve_gptq(weight, hessian, grid, damp=0.01).dequantize()
    theirs = naive(weight, hessian, grid, 0.01)
    # A value halfway between two codes may fall either way in float32: then what follows in its row differs.
    same_rows = (ours - theirs).abs().amax(dim=1) < 1e-4
    assert same_rows.float().mean() > 0.9
    assert layer_loss(weight, ours, hessian) <= 1.02 * layer_loss(weight, theirs, hessian)


@pytest.mark.parametrize("act_order", [False, True, "group"])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_beats_rounding(group_size: int, act_order: Any) -> None:
    weight, hessian = problem(seed=3)
    grid = Grid(3, group_size, True)
    rounded = layer_loss(weight, round_to_grid(weight, grid).dequantize(), hessian)
    solved = layer_loss(weight, solve_gptq(weight, hessian, grid, act_order=act_order).dequantize(), hessian)
    assert solved < 0.8 * rounded


@pytest.mark.parametrize("block", [8, 24, 64, 128])
def test_block_size_changes_nothing(block: int) -> None:
    weight, hessian = problem(seed=1)
    grid = Grid(4, 32, False, zero_min=1)
    whole = solve_gptq(weight, hessian, grid, block=1000).dequantize()
    parts = solve_gptq(weight, hessian, grid, block=block).dequantize()
    assert (whole - parts).abs().amax(dim=1).lt(1e-4).float().mean() > 0.9


def test_brute_force_on_four_columns() -> None:
    """With every code tried, GPTQ lies between round-to-nearest and the optimum."""
    weight, hessian = problem(out=4, columns=4, seed=7)
    grid = Grid(2, 4, True)
    scale, zero = fit(weight, grid)
    best = torch.full((4,), float("inf"))
    for codes in itertools.product(range(4), repeat=4):
        error = weight - decode(torch.tensor(codes, dtype=torch.float32)[None], scale[:, None], zero[:, None])
        best = torch.minimum(best, ((error @ hessian) * error).sum(dim=1))
    solved = layer_loss(weight, solve_gptq(weight, hessian, grid, damp=1e-6).dequantize(), hessian)
    rounded = layer_loss(weight, round_to_grid(weight, grid).dequantize(), hessian)
    assert best.sum() - 1e-4 <= solved <= rounded


def test_act_order_groups_follow_the_order() -> None:
    weight, hessian = problem()
    quantized = solve_gptq(weight, hessian, Grid(4, 16, True), act_order=True)
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    assert torch.equal(quantized.group_of[order], torch.arange(64) // 16)


def test_group_order_leaves_groups_in_place() -> None:
    weight, hessian = problem()
    quantized = solve_gptq(weight, hessian, Grid(4, 16, True), act_order="group")
    assert torch.equal(quantized.group_of, torch.arange(64) // 16)
    # The first group solved has seen no correction: its scales are those of the weights as they were.
    first = int(column_order(torch.diagonal(hessian), 16, "group")[0]) // 16
    scale, _ = fit(weight[:, first * 16 : first * 16 + 16], Grid(4, 16, True))
    assert torch.equal(quantized.scales[:, first], scale)


def test_orders_are_permutations_by_energy() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 4.0])
    assert column_order(diagonal, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert column_order(diagonal, 2, True).tolist() == [3, 1, 5, 4, 2, 0]
    assert column_order(diagonal, 2, "group").tolist() == [3, 2, 1, 0, 5, 4]


def test_dead_channels_cost_nothing() -> None:
    weight, hessian = problem()
    hessian[5, :] = hessian[:, 5] = 0
    for act_order in (False, True):
        quantized = solve_gptq(weight, hessian, Grid(4, 16, True), act_order=act_order).dequantize()
        assert torch.isfinite(quantized).all()
        assert torch.equal(quantized[:, 5], torch.zeros(32))


@pytest.mark.parametrize("size", [5, 64, 129])
def test_factor_in_place_is_that_of_the_inverse(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Small panels, so that a small matrix is factorised in many pieces."""
    monkeypatch.setattr(gptq, "PANEL", 8)
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    hessian = x.t() @ x / len(x)
    kept = hessian.float()
    factor = inverse_factor(kept, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.dist(factor.double().t() @ factor.double(), torch.linalg.inv(damped)) < 1e-4
    assert torch.equal(kept, hessian.float())  # what was given is not used up


def test_a_failed_factorisation_begins_anew_from_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pieces of a matrix of rank 20 fail after the first ones have been overwritten."""
    monkeypatch.setattr(gptq, "PANEL", 8)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = x.t() @ x
    factor, damping = gptq._damped_factor(hessian.float().flip(0, 1), 1e-9)
    assert damping > 1e-9 * hessian.diagonal().mean()
    wanted = hessian + damping * torch.eye(64, dtype=torch.float64)
    # U (H + l I) U^T is the identity, but for what float32 makes of a matrix so nearly singular
    found = factor.double() @ wanted @ factor.double().t()
    assert torch.dist(found, torch.eye(64, dtype=torch.float64)) / 8 < 0.5


def test_singular_moments_are_damped_until_they_hold() -> None:
    weight, _ = problem()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))  # fewer tokens than channels
    hessian = x.t() @ x / 3
    assert torch.isfinite(solve_gptq(weight, hessian, Grid(4, 16, True), damp=1e-9).dequantize()).all()


def test_negative_definite_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-torch.eye(4), 0.01)
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def test_zero_rows_stay_zero() -> None:
    weight, hessian = problem()
    weight[3] = 0
    assert torch.equal(solve_gptq(weight, hessian, Grid(4, 16, True)).dequantize()[3], torch.zeros(64))


def test_stacked_rows_are_independent() -> None:
    weight, hessian = problem()
    grid = Grid(4, 16, True)
    whole = solve_gptq(weight, hessian, grid).codes
    halves = [solve_gptq(part, hessian, grid).codes for part in weight.split(16)]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (3, False), (4, True)])
def test_searched_ranges_cost_less(bits: int, symmetric: bool) -> None:
    seeded = torch.Generator().manual_seed(bits)
    x = torch.randn(400, 128, generator=seeded) @ torch.randn(128, 128, generator=seeded)
    hessian = x.t() @ x / 400
    weight = torch.distributions.StudentT(4.0).sample((64, 128))
    grid = Grid(bits, 32, symmetric)
    losses = {}
    for act_order, static in ((False, False), (True, False), (True, True)):
        for clip in (False, True):
            found = solve_gptq(
                weight, hessian, grid, act_order=act_order, static_groups=static, clip_search=clip
            )
            losses[clip] = layer_loss(weight, found.dequantize(), hessian).item()
        if (bits < 4 and symmetric) or not static:
            assert losses[True] < losses[False], (act_order, static, losses)


def test_the_search_finds_the_best_range_and_prefers_the_whole() -> None:
    from quantlab.quant.grid import SEARCHED, fit, nearest_values, search

    seeded = torch.Generator().manual_seed(0)
    groups, importance = torch.randn(40, 32, generator=seeded), torch.rand(32, generator=seeded)
    grid = Grid(3, 32, False)
    scale, zero = search(groups, importance, grid)
    cost = (nearest_values(groups, scale, zero, grid) - groups).square() @ importance
    each = torch.stack([
        (nearest_values(groups, *fit(groups, grid, shrink), grid) - groups).square() @ importance
        for shrink in SEARCHED
    ])  # fmt: skip
    assert torch.equal(cost, each.amin(dim=0)) and (cost < each[0]).float().mean() > 0.5
    same = search(
        torch.ones(2, 32), importance, grid
    )  # no range of equal weights is better than the whole one
    assert all(torch.equal(one, other) for one, other in zip(same, fit(torch.ones(2, 32), grid), strict=True))
    empty = search(torch.zeros(2, 32), importance, Grid(4, 32, True))
    assert torch.equal(empty[1], torch.full((2,), 8.0))
