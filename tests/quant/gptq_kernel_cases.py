"""The GPTQ kernel under Triton's interpreter; run by test_gptq_kernel.py in a process of its own.

The name keeps pytest from collecting it elsewhere: TRITON_INTERPRET must be set before Triton is imported, and must not
be for anything else that uses Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from quantlab.quant.block import BlockView
from quantlab.quant.grid import Grid, storable_scales
from quantlab.quant.hessian import InputHessian
from quantlab.quant.kernels import gptq_block as gptq_block_module
from quantlab.quant.kernels.gptq_block import (
    block_columns,
    full_precision,
    gptq_block,
    row_limits,
    solve_columns_cuda,
)
from quantlab.quant.methods import gptq
from quantlab.quant.methods.gptq import inverse_factor, prepare, solve_many
from tests.fake_cuda import fake_cuda, to_cuda, value_of
from tests.quant.gptq_replay import Verdict, replay

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_gptq_kernel.py"

KINDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
tally = {"codes": 0, "ties": 0, "wrong": 0, "of the plain solver's rows": 0, "of them with another tie": 0}


def problem(out: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and second moments [in, in] of correlated inputs."""
    seeded = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=seeded) / 4
    x = torch.randn(2 * columns, columns, generator=seeded) @ (mix + torch.eye(columns))
    return torch.randn(out, columns, generator=seeded), x.t() @ x / (2 * columns)


def check(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int,
    kinds: Sequence[tuple[int, bool]] = KINDS,
    *,
    zero_min: int = 0,
    act_order: Any = False,
    static_groups: bool = False,
    tile_rows: int = 32,
) -> torch.Tensor:
    """All grids stacked in one solve: every decision is the plain one or a tie, and rows without a tie have the plain
    solver's codes, scales and zeros. Returns the codes in place, [grids, out, in]."""
    out, columns = weight.shape
    grids = [Grid(bits, group_size, symmetric, zero_min) for bits, symmetric in kinds]
    width = grids[0].columns(columns)
    prepared = prepare(hessian, width=width, damp=0.01, act_order=act_order)
    order, factor = prepared.order, prepared.factor
    plain = solve_many(
        weight,
        prepared,
        grids,
        in_place=act_order is not True or static_groups,
        static_groups=static_groups,
    )
    expected = [quantized for quantized, _ in plain]
    w = weight.masked_fill(prepared.dead, 0.0)[:, order].repeat(len(grids), 1)
    static = [(q.scales, q.zeros.to(torch.float32)) for q in expected] if static_groups else None
    group_of = order // width if static_groups else None
    codes, scales, zeros, loss = solve_columns_cuda(
        w.clone(), factor, order, grids, static, tile_rows=tile_rows
    )
    limits = row_limits(grids, out, "cpu")
    step = 128 if static_groups else block_columns(width, columns)
    verdict = replay(w, factor, limits, codes, scales, zeros, width=width, group_of=group_of, block=step)
    count(verdict, codes)
    torch.testing.assert_close(loss, verdict.loss, rtol=1e-4, atol=0)

    # The plain solver's results, stacked and in solving order.
    groups = [
        torch.arange(columns // width) if static_groups else q.group_of[order][::width] for q in expected
    ]
    plain_codes = torch.cat([q.codes[:, order] for q in expected])
    plain_scales = torch.cat([q.scales[:, g] for q, g in zip(expected, groups, strict=True)])
    plain_zeros = torch.cat([q.zeros[:, g] for q, g in zip(expected, groups, strict=True)])
    same = (codes == plain_codes).all(dim=1) & (scales == plain_scales).all(dim=1)
    same &= (zeros == plain_zeros).all(dim=1)
    # It sums in another order, so it may have met ties of its own: judged in the same way. Where the two first part,
    # both judgements have computed the same value, which cannot round to both.
    its = replay(
        w, factor, limits, plain_codes, plain_scales, plain_zeros, width=width, group_of=group_of, block=step
    )
    assert its.wrong == 0
    assert (same | (verdict.ties > 0) | (its.ties > 0)).all()
    tally["of the plain solver's rows"] += len(same)
    tally["of them with another tie"] += int((~same).sum())
    return codes[:, torch.argsort(order)].reshape(len(grids), out, columns)


def count(verdict: Verdict, codes: torch.Tensor) -> None:
    tally["codes"] += codes.numel()
    tally["ties"] += int(verdict.ties.sum())
    tally["wrong"] += verdict.wrong
    assert verdict.wrong == 0


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
def test_groups_and_grids(group_size: int) -> None:
    """2, 3, 4 and 8 bits, symmetric and not, stacked in one launch."""
    weight, hessian = problem(8, 256, seed=abs(group_size))
    check(weight, hessian, group_size, zero_min=1, tile_rows=64)


@pytest.mark.parametrize(
    ("out", "columns", "group_size"),
    [
        (5, 176, 16),  # rows and columns that fill no tile
        (3, 200, 40),  # blocks of 120 columns
        (4, 160, 160),  # one group, as large as the matrix, and a block of 32
        (2, 288, 144),  # groups larger than a block and no multiple of it: blocks of 72
        (1, 30, 6),
        (2, 4, 1),
        (3, 33, -1),
    ],
)
def test_odd_sizes(out: int, columns: int, group_size: int) -> None:
    weight, hessian = problem(out, columns, seed=out)
    check(weight, hessian, group_size)


def test_eight_bits_meet_ties() -> None:
    """Many fine steps, summed in blocks other than the plain solver's: the last bits decide somewhere."""
    weight, hessian = problem(64, 320)
    check(weight, hessian, 160, [(8, True)], tile_rows=64)


@pytest.mark.parametrize(
    ("act_order", "static_groups", "group_size"),
    [(True, False, 32), (True, False, -1), ("group", False, 32), (True, True, 32), (True, True, 160)],
)
def test_columns_in_another_order(act_order: Any, static_groups: bool, group_size: int) -> None:
    weight, hessian = problem(4, 160, seed=5)
    check(weight, hessian, group_size, act_order=act_order, static_groups=static_groups)


@pytest.mark.parametrize("zero_min", [0, 1])
def test_zero_rows_dead_channels_and_zero_groups(zero_min: int) -> None:
    weight, hessian = problem(8, 96)
    weight[3] = 0
    weight[4, 32:64] = 0
    weight[5] = weight[5].abs()  # the range's lower end is zero
    weight[6] = -weight[6].abs()
    hessian[5, :] = hessian[:, 5] = 0
    hessian[64:, :] = hessian[:, 64:] = 0
    codes = check(weight, hessian, 32, zero_min=zero_min, tile_rows=64)
    for n, (bits, symmetric) in enumerate(KINDS):
        if symmetric:  # zero is the same code everywhere
            assert (codes[n, 3] == 2 ** (bits - 1)).all() and (codes[n, :, 5] == 2 ** (bits - 1)).all()


def test_weights_beyond_the_scales() -> None:
    """Scales end at 2**-17 and 65280; what lies beyond is clamped as in the plain solver."""
    weight, hessian = problem(8, 32)
    check(weight * torch.logspace(-30, 12, 8)[:, None], hessian, 16)


def test_halves_go_to_the_even_code() -> None:
    """Inputs without correlation: nothing is corrected, and the weights lie exactly between two codes."""
    weight = torch.arange(-7, 8).repeat(2)[None].repeat(4, 1) + 0.5  # up to 7.5, so the scale is 1
    weight[1] *= -1
    weight[2] *= 2.0**-9
    scales, zeros = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
    limits = row_limits([Grid(4, 15, True)], 4, "cpu")
    codes, _, _ = gptq_block(weight, torch.eye(30), limits, scales, zeros, width=15, tile_rows=4)
    value = weight / torch.tensor([1, 1, 2.0**-9, 1])[:, None] + 8
    assert torch.equal(codes.float(), value.round().clamp(0, 15))


def test_scales_round_to_the_even_bfloat16() -> None:
    """Ranges of three times what lies exactly between two bfloat16 values, and their neighbours in float32."""
    middle = (torch.arange(128, 256) + 0.5) / 64  # [128]
    exact = torch.cat([middle, torch.nextafter(middle, torch.zeros(1)), torch.nextafter(middle, middle + 1)])
    weight = torch.zeros(len(exact), 8)
    weight[:, 3] = 3 * exact
    limits = row_limits([Grid(2, 8, False)], len(exact), "cpu")
    scales, zeros = torch.empty(len(exact), 1), torch.empty(len(exact), 1, dtype=torch.int32)
    gptq_block(weight, torch.eye(8), limits, scales, zeros, width=8, tile_rows=128)
    assert torch.equal(scales[:, 0], storable_scales(weight[:, 3] / 3))
    assert torch.equal(scales[:128, 0], storable_scales(middle))
    assert (scales[:128, 0] > middle).any() and (scales[:128, 0] < middle).any()


def test_one_block_leaves_its_input_alone_and_reads_views() -> None:
    weight, hessian = problem(20, 48, seed=2)
    factor = inverse_factor(hessian, 0.01).contiguous()
    wide = torch.full((20, 80), float("nan"))
    wide[:, 16:64] = weight
    before = wide.clone()
    limits = row_limits([Grid(4, 16, True)], 20, "cpu")
    results = []
    for w in (weight, wide[:, 16:64]):
        scales, zeros = torch.empty(20, 3), torch.empty(20, 3, dtype=torch.int32)
        codes, errors, loss = gptq_block(w, factor, limits, scales, zeros, width=16, tile_rows=8)
        results.append((codes, errors, loss, scales, zeros))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(wide.nan_to_num(7), before.nan_to_num(7))
    codes, errors, loss, scales, zeros = results[0]
    approximation = (codes - zeros.repeat_interleave(16, dim=1)) * scales.repeat_interleave(16, dim=1)
    # The recursion is a triangular system: the errors times the factor are what rounding took off the weights.
    torch.testing.assert_close(errors @ factor, weight - approximation, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, errors.square().sum(dim=1))


@pytest.mark.parametrize(("group_size", "act_order"), [(16, False), (32, True), (-1, False), (192, False)])
def test_ranges_are_searched_for_as_the_plain_solver_does(group_size: int, act_order: Any) -> None:
    weight, hessian = problem(24, 192, seed=5)
    weight[:, ::40] *= 4  # outliers, which a narrower range cuts off
    grids = [Grid(3, group_size, True), Grid(3, group_size, False), Grid(4, group_size, True)]
    prepared = prepare(hessian, width=grids[0].columns(192), act_order=act_order)
    w = weight[:, prepared.order].repeat(len(grids), 1)
    codes, scales, _, loss = solve_columns_cuda(
        w.clone(), prepared.factor, prepared.order, grids, clip_search=True, tile_rows=32
    )
    plain = solve_many(weight, prepared, grids, in_place=act_order is not True, clip_search=True)
    whole = solve_columns_cuda(w, prepared.factor, prepared.order, grids, tile_rows=32)
    groups = [q.group_of[prepared.order][:: grids[0].columns(192)] for q, _ in plain]
    # A range that costs as little as another to the last bit may be either; all that follows in a row then differs.
    same = (scales == torch.cat([q.scales[:, g] for (q, _), g in zip(plain, groups, strict=True)])).all(dim=1)
    same &= (codes == torch.cat([q.codes[:, prepared.order] for q, _ in plain])).all(dim=1)
    assert same.float().mean() > 0.9, same.float().mean()
    assert loss.sum() < 0.97 * whole[3].sum()
    assert (scales < whole[1]).float().mean() > 0.5


def test_no_rows() -> None:
    codes, scales, _, loss = solve_columns_cuda(
        torch.empty(0, 32), torch.eye(32), torch.arange(32), [Grid(4, 16, True)]
    )
    assert codes.shape == (0, 32) and scales.shape == (0, 2) and loss.shape == (0,)


def test_refusals() -> None:
    w, eye = torch.randn(4, 32), torch.eye(32)
    limits = row_limits([Grid(4, 16, True)], 4, "cpu")
    scales, zeros = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="either fitted"):
        gptq_block(w, eye, limits, scales, zeros)
    with pytest.raises(ValueError, match="whole groups"):
        gptq_block(w, eye, limits, scales, zeros, width=24)
    with pytest.raises(ValueError, match="at most 128"):
        gptq_block(torch.randn(4, 256), torch.eye(256), limits, scales, zeros, width=16)
    with pytest.raises(ValueError, match="next to each other"):
        gptq_block(torch.randn(32, 4).t(), eye, limits, scales, zeros, width=16)
    with pytest.raises(ValueError, match="row_limits"):
        gptq_block(w, eye, limits[:, :3], scales, zeros, width=16)
    for grids in ([Grid(4, 24, True)], [Grid(4, 16, True), Grid(4, 32, True)]):
        with pytest.raises(ValueError, match="whole groups of one width"):
            solve_columns_cuda(w, eye, torch.arange(32), grids)


def test_blocks_end_where_groups_end() -> None:
    for width in range(1, 400):
        for groups in (1, 3):
            step = block_columns(width, width * groups)
            assert 1 <= step <= 128
            assert groups == 1 or step % width == 0 or width % step == 0


def test_the_judge_sees_one_other_code() -> None:
    weight, hessian = problem(4, 32, seed=3)
    grids = [Grid(4, 16, False)]
    prepared, limits = prepare(hessian, width=16), row_limits(grids, 4, "cpu")
    codes, scales, zeros, _ = solve_columns_cuda(
        weight.clone(), prepared.factor, prepared.order, grids, tile_rows=4
    )
    for row, column in ((0, 0), (1, 17), (3, 31)):
        other = codes.clone()
        other[row, column] = other[row, column] ^ 1
        assert replay(weight, prepared.factor, limits, other, scales, zeros, width=16).wrong >= 1
    for wrong_scales, wrong_zeros in ((scales * (1 + 2**-7), zeros), (scales, zeros ^ 1)):
        verdict = replay(weight, prepared.factor, limits, codes, wrong_scales, wrong_zeros, width=16)
        assert verdict.wrong >= 4


def test_tf32_is_off_inside_and_as_before_after() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="inside"), full_precision():
            assert settings.fp32_precision == "ieee"
            raise RuntimeError("inside")
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize(("act_order", "static_groups"), [(False, False), ("group", False), (True, True)])
def test_the_way_to_the_kernel_stays_on_the_device(
    act_order: Any, static_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only GPUs run of the method, with the interpreter for a GPU: it works on the values that tensors hold."""
    weight, hessian = problem(8, 128, seed=6)
    grids = [Grid(4, 32, True, 1), Grid(3, 32, False), Grid(4, -1, True)]
    kernel = gptq_block_module._block_kernel

    class OnValues:
        def __getitem__(self, tiles: Any) -> Any:
            return lambda *args, **options: kernel[tiles](*map(value_of, args), **options)

    monkeypatch.setattr(gptq_block_module, "_block_kernel", OnValues())
    monkeypatch.setattr(gptq, "available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)

    def solved(place: Any) -> Any:
        moments = InputHessian(["a", "b"], place(hessian), place(torch.ones(128)), 1)
        view = BlockView({"a": place(weight[:5]), "b": place(weight[5:])}, [moments])
        chosen = [dict.fromkeys(view.stored, grid) for grid in grids]
        return gptq.quantize_block(view, chosen, act_order=act_order, static_groups=static_groups)

    here = solved(lambda tensor: tensor)
    with fake_cuda():
        there = solved(to_cuda)
    for one, other in zip(there, here, strict=True):
        assert one.loss == other.loss
        for name, expected in other.quantized.items():
            for part in ("codes", "scales", "zeros", "group_of"):
                found = getattr(one.quantized[name], part)
                assert found.is_cuda and torch.equal(found.value, getattr(expected, part))


def test_total() -> None:
    """Last in the file: what all solves above came to."""
    print("\n" + ", ".join(f"{number} {name}" for name, number in tally.items()))
    assert tally["codes"] > 80_000 and tally["wrong"] == 0
    assert tally["ties"] < 1e-4 * tally["codes"]
