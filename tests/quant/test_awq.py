"""AWQ's searches: never worse than rounding, better where channels differ, exact when folded."""

import pytest
import torch

from quantlab.models.scale_folding import LinearPair, NormFold, ScaleFolds
from quantlab.quant.block import BlockView, NormInput
from quantlab.quant.grid import Grid, layer_loss, round_to_grid
from quantlab.quant.hessian import InputHessian
from quantlab.quant.methods.awq import quantize_block
from quantlab.quant.methods.awq_search import Realize, search_clip, search_scales, solve_awq
from quantlab.quant.methods.rtn import quantize_block as round_block

GRID = Grid(3, 32, False)


def outlier_problem(seed: int = 0, out: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, second moments and magnitudes of inputs whose channels differ in size by a factor of 50."""
    seeded = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 64, generator=seeded) * torch.logspace(-1, 0.7, 64)
    return torch.randn(out, 64, generator=seeded) / 8, x.t() @ x / 600, x.abs().mean(dim=0)


def loss(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, clip: bool) -> float:
    solved, reported = solve_awq(weight, hessian, scale, GRID, clip=clip)
    found = layer_loss(weight, solved.dequantize() / scale, hessian).item()
    assert reported.sum().item() == pytest.approx(found, rel=1e-4)
    return found


def test_search_pays_and_never_harms() -> None:
    weight, hessian, magnitude = outlier_problem()
    scale, known = search_scales([weight], [hessian], magnitude, [GRID])
    plain = layer_loss(weight, round_to_grid(weight, GRID).dequantize(), hessian).item()
    scaled, clipped = loss(weight, hessian, scale, False), loss(weight, hessian, scale, True)
    assert known[0].sum().item() == pytest.approx(scaled, rel=1e-4)
    assert scaled < 0.9 * plain
    assert clipped <= scaled


def test_no_layer_of_a_group_gets_worse() -> None:
    first, hessian, magnitude = outlier_problem()
    second = torch.randn(16, 64, generator=torch.Generator().manual_seed(9)) * torch.logspace(1, -1, 64)
    scale, _ = search_scales([first, second], [hessian] * 2, magnitude, [GRID] * 2)
    for weight in (first, second):
        plain = layer_loss(weight, round_to_grid(weight, GRID).dequantize(), hessian).item()
        assert loss(weight, hessian, scale, False) <= plain


def test_clip_is_never_worse_by_row() -> None:
    weight, hessian, _ = outlier_problem(seed=4)
    weight[:, 3] *= 20  # outliers that widen a group's range
    shrink, _ = search_clip(weight, hessian, GRID)
    error_full = weight - round_to_grid(weight, GRID).dequantize()
    error_clip = weight - round_to_grid(weight, GRID, shrink).dequantize()
    full = ((error_full @ hessian) * error_full).sum(dim=1)
    clip = ((error_clip @ hessian) * error_clip).sum(dim=1)
    assert (clip <= full).all() and clip.sum() < full.sum()
    assert shrink.min() >= 0.5 and shrink.max() <= 1


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_realized_scales_are_what_the_norm_divides_by(offset: float) -> None:
    seeded = torch.Generator().manual_seed(1)
    weight = torch.rand(64, generator=seeded).to(torch.bfloat16)
    realize = Realize(weight, torch.bfloat16, offset)
    scale = realize(torch.rand(64, generator=seeded) + 0.5)
    stored = realize.folded(scale)
    assert stored.dtype == torch.bfloat16
    assert torch.allclose((stored.float() + offset) * scale, weight.float() + offset, rtol=1e-6)


def block_view() -> BlockView:
    seeded = torch.Generator().manual_seed(5)

    def matrix(out: int, columns: int) -> torch.Tensor:
        return torch.randn(out, columns, generator=seeded) / 8

    def moments(names: list[str], width: int) -> InputHessian:
        x = torch.randn(500, width, generator=seeded) * torch.logspace(-1, 0.5, width)
        return InputHessian(names, x.t() @ x / 500, x.abs().mean(dim=0), 500)

    weights = {
        "attn.q_proj": matrix(64, 64), "attn.k_proj": matrix(32, 64), "attn.v_proj": matrix(32, 64),
        "attn.o_proj": matrix(64, 64),
        "mlp.gate_proj": matrix(96, 64), "mlp.up_proj": matrix(96, 64), "mlp.down_proj": matrix(64, 96),
    }  # fmt: skip
    groups = [
        moments(["attn.q_proj", "attn.k_proj", "attn.v_proj"], 64), moments(["attn.o_proj"], 64),
        moments(["mlp.gate_proj", "mlp.up_proj"], 64), moments(["mlp.down_proj"], 96),
    ]  # fmt: skip
    feeds = NormInput(torch.rand(64, generator=seeded).to(torch.bfloat16) + 0.5, 0.0)
    # two value heads of 16, each for two query heads
    values = torch.arange(64) // 32 * 16 + torch.arange(64) % 16
    structure = ScaleFolds(
        (NormFold("norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), ()),),
        (
            LinearPair("attn.v_proj", "attn.o_proj", values),
            LinearPair("mlp.up_proj", "mlp.down_proj", torch.arange(96)),
        ),
    )
    return BlockView(weights, groups, structure, {"norm": feeds}, {"norm.weight": feeds.weight})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [3, 4])
def test_block_never_worse_than_rounding_in_any_layer(width: int, symmetric: bool) -> None:
    view, grid = block_view(), Grid(width, 32, symmetric, zero_min=1)
    chosen = [dict.fromkeys(view.stored, grid)]
    (awq,), (rtn,) = quantize_block(view, chosen), round_block(view, chosen)
    assert set(awq.loss) == set(view.stored)
    for name, value in awq.loss.items():
        assert value <= rtn.loss[name] * (1 + 1e-5), name
    assert sum(awq.loss.values()) < 0.9 * sum(rtn.loss.values())
    assert set(awq.replaced) == {"norm.weight"}


def test_without_scale_search_nothing_else_changes() -> None:
    view = block_view()
    (result,) = quantize_block(view, [dict.fromkeys(view.stored, GRID)], scale_search=False)
    assert result.replaced == {}
