"""FP8 weights: nearest values against brute force, no NaN whatever comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.quant.block import BlockView
from quantlab.quant.grid import SMALLEST_SCALE, Grid
from quantlab.quant.methods.fp8 import LARGEST, solve_fp8

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES = ALL[~ALL.isnan()].unique()  # -0 and 0 are one


def check(weight: torch.Tensor) -> None:
    found = solve_fp8(weight)
    assert (
        found.codes.dtype == torch.float8_e4m3fn and found.bits == 8 and found.scales.dtype == torch.float32
    )
    assert torch.equal(found.scales, found.scales.to(torch.bfloat16).float())
    assert torch.equal(found.scales, found.scales.to(torch.float16).float())
    values = found.dequantize()
    assert torch.isfinite(values).all() and (found.scales > 0).all()
    wanted = weight.float() / found.scales
    distance = (wanted[..., None] - VALUES).abs().amin(dim=-1)
    assert torch.equal((wanted - found.codes.float()).abs(), distance)  # nothing is nearer


def test_every_value_of_the_format_is_hit() -> None:
    assert len(VALUES) == 253 and VALUES.max() == LARGEST
    found = solve_fp8(VALUES[None] * 2.0**-4)
    assert torch.equal(found.scales, torch.tensor([[2.0**-4]]))
    assert torch.equal(found.codes.float(), VALUES[None])


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_finite_weights(rows: list[list[float]]) -> None:
    check(torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 2.0**-24, 1e-6, 1.0, 6e4, 1e38])
def test_rows_of_any_size(size: float, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).mul(size).to(dtype)
    weight = torch.nan_to_num(weight)
    weight[0] = 0
    check(weight)
    assert not solve_fp8(weight).codes[0].float().any()


def test_the_error_is_that_of_three_bits_of_mantissa() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    found = solve_fp8(weight)
    normal = weight.abs() >= 2.0**-6 * found.scales
    normal &= weight.abs() < 440 * found.scales  # where the rounded scale cuts nothing off
    assert ((found.dequantize() - weight).abs() / weight.abs())[normal].max() <= 1 / 16
    assert (found.dequantize() - weight).norm() / weight.norm() < 0.03
    assert (found.scales > SMALLEST_SCALE).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve_fp8(weight)


def test_a_block_keeps_its_order_of_layers() -> None:
    from quantlab.quant.methods.fp8 import quantize_block

    stored = {name: torch.randn(4, 8) for name in ("b", "a")}
    (result,) = quantize_block(BlockView(stored), [dict.fromkeys(stored, Grid(8, -1, True))])
    assert list(result.quantized) == ["b", "a"] and not result.loss
    for name, weight in stored.items():
        assert torch.equal(result.quantized[name].codes.float(), solve_fp8(weight).codes.float())
