"""The GPTQ kernel on a GPU against plain arithmetic on the CPU. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from quantlab.quant.grid import Grid, round_to_grid
from quantlab.quant.kernels import available
from quantlab.quant.methods.gptq import inverse_factor
from tests.quant.gptq_replay import replay

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not available("cuda"), reason="no CUDA device, or no Triton for it"
)
KINDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and the inverse's factor [columns, columns] for correlated inputs."""
    seeded = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=seeded) / columns**0.5
    x = torch.randn(2 * columns, columns, generator=seeded) @ (mix + torch.eye(columns))
    factor = inverse_factor(x.t() @ x / len(x), 0.01).contiguous()
    return torch.randn(rows, columns, generator=seeded), factor


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(128, 1024, 128), (128, 1024, 16), (37, 640, 32), (64, 1024, -1), (13, 1000, 40), (32, 1024, 256)],
)
def test_same_decisions_as_the_plain_solver(rows: int, columns: int, group_size: int) -> None:
    from quantlab.quant.kernels.gptq_block import block_columns, row_limits, solve_columns_cuda

    weight, factor = problem(rows, columns)
    grids = [Grid(bits, group_size, symmetric, 1) for bits, symmetric in KINDS]
    width, order = grids[0].columns(columns), torch.arange(columns)
    w = weight.repeat(len(grids), 1)
    found = solve_columns_cuda(w.cuda(), factor.cuda(), order.cuda(), grids)
    codes, scales, zeros, loss = (t.cpu() for t in found)
    limits, block = row_limits(grids, rows, "cpu"), block_columns(width, columns)
    verdict = replay(w, factor, limits, codes, scales, zeros, width=width, block=block, slack=1e-3)
    print(f"{int(verdict.ties.sum())} ties among {codes.numel()} codes")
    assert verdict.wrong == 0
    assert verdict.ties.sum() < 1e-3 * codes.numel()
    torch.testing.assert_close(loss, verdict.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("tile_rows", "warps"), [(8, 2), (16, 4), (32, 4), (16, 8)])
def test_one_block_to_the_last_bit(tile_rows: int, warps: int) -> None:
    """No matrix product in between, so nothing may differ: a fused or an approximate operation would show."""
    from quantlab.quant.kernels.gptq_block import gptq_block, row_limits

    weight, factor = problem(125, 128)
    limits = row_limits([Grid(bits, 32, symmetric) for bits, symmetric in KINDS], 125, "cpu")
    w = weight.repeat(len(KINDS), 1)
    scales, zeros = torch.empty(1000, 4), torch.empty(1000, 4, dtype=torch.int32)
    inputs = [t.cuda() for t in (w, factor, limits, scales, zeros)]
    found = gptq_block(*inputs, width=32, tile_rows=tile_rows, warps=warps)
    codes, errors, _ = (t.cpu() for t in found)
    scales, zeros = inputs[3].cpu(), inputs[4].cpu()
    verdict = replay(w, factor, limits, codes, scales, zeros, width=32, slack=0)
    assert verdict.wrong == 0 and verdict.ties.sum() == 0
    for j in range(128):
        code, zero, scale = codes[:, j].float(), zeros[:, j // 32].float(), scales[:, j // 32]
        error = (w[:, j] - (code - zero) * scale) / factor[j, j]
        assert torch.equal(errors[:, j], error)
        w[:, j:] -= error[:, None] * factor[j : j + 1, j:]


def test_static_groups_on_another_stream_with_tf32_on() -> None:
    from quantlab.quant.kernels.gptq_block import row_limits, solve_columns_cuda

    weight, factor = problem(256, 512)
    grids = [Grid(4, 64, False)]
    fixed = round_to_grid(weight, grids[0])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    w = weight[:, order]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            static = [(fixed.scales.cuda(), fixed.zeros.cuda())]
            codes = solve_columns_cuda(w.cuda(), factor.cuda(), order.cuda(), grids, static)[0].cpu()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    limits = row_limits(grids, 256, "cpu")
    group_of = order // 64
    verdict = replay(
        w, factor, limits, codes, fixed.scales, fixed.zeros, width=64, group_of=group_of, slack=1e-3
    )
    assert verdict.wrong == 0 and verdict.ties.sum() < 1e-3 * codes.numel()


def test_rows_further_apart_than_32_bits_reach() -> None:
    from quantlab.quant.kernels.gptq_block import gptq_block, row_limits

    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GB of GPU memory")
    weight, factor = problem(20, 32)
    limits = row_limits([Grid(4, 16, True)], 20, "cuda")
    wide = torch.zeros(20, 2**27, dtype=torch.uint8, device="cuda")  # row 16 starts at 2**31
    near = torch.empty(20, 32, dtype=torch.uint8, device="cuda")
    for codes in (near, wide[:, :32]):
        scales, zeros = torch.empty(20, 2).cuda(), torch.empty(20, 2, dtype=torch.int32).cuda()
        gptq_block(weight.cuda(), factor.cuda(), limits, scales, zeros, width=16, codes=codes)
    assert torch.equal(wide[:, :32], near)
