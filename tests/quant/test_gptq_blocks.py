"""The column recursion on block types: against rounding, against its own descent, and at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantlab.formats.gguf.encode import encode
from quantlab.formats.gguf.pack import Blocks, pack, unpack
from quantlab.quant.block import BlockView
from quantlab.quant.grid import Grid, layer_loss
from quantlab.quant.hessian import InputHessian
from quantlab.quant.methods import gptq_blocks, rtn_blocks
from quantlab.quant.methods.gptq_blocks import descend, solve_blocks
from quantlab.registry.block_types import BLOCK_TYPES, BlockType

KINDS = list(BLOCK_TYPES.values())
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def problem(rows: int = 24, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns], and second moments [columns, columns] of correlated, unequal channels."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(2048, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    x *= torch.randn(columns, generator=generator).mul(0.7).exp()
    return weight, x.t() @ x / len(x)


def loss(weight: torch.Tensor, blocks: Blocks, hessian: torch.Tensor) -> float:
    return float(layer_loss(weight, blocks.dequantize(), hessian))


@by_kind
def test_it_beats_rounding_by_importance(kind: BlockType) -> None:
    weight, hessian = problem()
    rounded = loss(weight, encode(weight, kind, torch.diagonal(hessian)), hessian)
    plain = solve_blocks(weight, hessian, kind, sweeps=0)
    swept = solve_blocks(weight, hessian, kind)
    assert torch.equal(pack(unpack(pack(swept), kind)), pack(swept))
    assert loss(weight, swept, hessian) <= loss(weight, plain, hessian) < 0.9 * rounded


def test_every_order_of_columns_that_a_file_can_hold() -> None:
    weight, hessian = problem()
    kind = BLOCK_TYPES["Q3_K"]
    rounded = loss(weight, encode(weight, kind, torch.diagonal(hessian)), hessian)
    for order, static in ((False, False), ("group", False), (False, True), ("group", True), (True, True)):
        solved = solve_blocks(weight, hessian, kind, act_order=order, static_groups=static)  # type: ignore[arg-type]
        assert loss(weight, solved, hessian) < 0.9 * rounded, (order, static)
    with pytest.raises(ValueError, match="need static_groups"):
        solve_blocks(weight, hessian, kind, act_order=True)


@by_kind
def test_descent_never_raises_the_loss(kind: BlockType) -> None:
    weight, hessian = problem()
    found = encode(weight, kind)
    losses = [loss(weight, found, hessian)]
    for _ in range(3):
        found = descend(weight, hessian, found, span=96)
        losses.append(loss(weight, found, hessian))
    assert losses[1] < losses[0] and all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses))


def test_with_independent_channels_nothing_is_passed_on() -> None:
    """With a diagonal Hessian the recursion is rounding by importance, and descent has nothing to do."""
    weight, _ = problem()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.5
    hessian = torch.diag(importance)
    for name in ("Q4_K", "Q5_0", "Q2_K"):
        kind = BLOCK_TYPES[name]
        solved = solve_blocks(weight, hessian, kind, act_order=False, damp=1e-6)
        assert loss(weight, solved, hessian) == pytest.approx(
            loss(weight, encode(weight, kind, importance), hessian), rel=1e-3
        )


@by_kind
def test_dead_channels_and_zero_rows(kind: BlockType) -> None:
    weight, hessian = problem()
    weight[3] = 0
    hessian[:64], hessian[:, :64] = 0, 0
    solved = solve_blocks(weight, hessian, kind)
    values = solved.dequantize()
    assert torch.isfinite(values).all() and values[3].abs().max() == 0
    assert loss(weight, solved, hessian) < loss(weight, encode(weight, kind), hessian)
    nothing = solve_blocks(weight, torch.zeros_like(hessian), kind)
    assert torch.isfinite(nothing.dequantize()).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        solve_blocks(weight, hessian * float("nan"), kind)


def view() -> BlockView:
    weight, hessian = problem()
    moments = InputHessian(["q", "k"], hessian, torch.ones(512), 2048)
    other = InputHessian(["o"], hessian.flip(0, 1), torch.ones(512), 2048)
    return BlockView({"q": weight, "k": 0.5 * weight.flip(0), "o": weight.flip(1)}, [moments, other])


def test_a_block_is_solved_for_several_files_at_once() -> None:
    block = view()
    one = {
        "q": Grid(4, 32, False, type="Q4_K"),
        "k": Grid(4, 32, False, type="Q4_K"),
        "o": Grid(6, 16, True, type="Q6_K"),
    }
    two = {"q": Grid(2, 16, False, type="Q2_K"), "o": Grid(2, 16, False, type="Q2_K")}
    found = gptq_blocks.quantize_block(block, [one, two], act_order="group")
    assert [sorted(result.quantized) for result in found] == [["k", "o", "q"], ["o", "q"]]
    for result, grids in zip(found, (one, two), strict=True):
        alone = gptq_blocks.quantize_block(block, [grids], act_order="group")[0]
        for name, solved in result.quantized.items():
            assert isinstance(solved, Blocks) and solved.kind.name == grids[name].type
            assert torch.equal(pack(solved), pack(alone.quantized[name]))  # type: ignore[arg-type]
            hessian = block.moments[name == "o"].hessian
            assert result.loss[name] == pytest.approx(loss(block.weight(name), solved, hessian))
    plain, weighed = (
        solve(block, [two])[0]
        for solve in (rtn_blocks.quantize_block, rtn_blocks.quantize_block_by_importance)
    )
    assert found[1].loss["q"] < weighed.loss["q"] < plain.loss["q"]
