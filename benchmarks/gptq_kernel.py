"""The Triton kernel of GPTQ on the shapes of Llama-3-8B: time a block, a solve and a model, against a column loop.

    python benchmarks/gptq_kernel.py [--bits 4] [--group-size 128] [--tile-rows 16] [--warps 4] [--recipes 1]
                                     [--json FILE]

For each of a decoder layer's four solves (matrices of equal input stacked along their rows): the kernel's time for one
block of 128 columns, the same block column by column in Python on the same GPU, the whole solve, and the factorisation
of the second moments. Then, for 32 layers and 128 x 2,048 calibration tokens, the matrix-rate floor of the whole work:
its matrix products at the rates that this GPU reaches on large square ones, in bfloat16 (second moments, two forwards)
and in float32 (updates, factorisations). Needs CUDA and Triton; exits with 3 without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantlab.quant.grid import Grid, decode, encode, fit
from quantlab.quant.kernels import available
from quantlab.quant.methods.gptq import inverse_factor

LAYERS, TOKENS = 32, 128 * 2048
SOLVES = {  # rows and columns
    "q, k, v": (4096 + 2 * 1024, 4096),
    "o": (4096, 4096),
    "gate, up": (2 * 14336, 4096),
    "down": (4096, 14336),
}


def milliseconds(work: Callable[[], object], runs: int) -> float:
    """Median time on the GPU, after one run that compiles and allocates."""
    work()
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, 10) * 1000


def column_loop(w: torch.Tensor, tile: torch.Tensor, grid: Grid, width: int) -> torch.Tensor:
    """One block as most implementations solve it: a dozen launches for each column. Errors [rows, columns]."""
    w, errors = w.clone(), torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % width == 0:
            scale, zero = fit(w[:, j : j + width], grid)
        code = encode(w[:, j], scale, zero, grid)
        errors[:, j] = (w[:, j] - decode(code, scale, zero)) / tile[j, j]
        w[:, j:] -= errors[:, j : j + 1] * tile[j : j + 1, j:]
    return errors


def moments(columns: int) -> torch.Tensor:
    """Second moments [columns, columns] of independent inputs, with all eigenvalues at least 1."""
    x = torch.randn(columns // 2, columns, device="cuda")
    return x.t() @ x / len(x) + torch.eye(columns, device="cuda")


def measure(rows: int, columns: int, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Milliseconds: the kernel a block, the column loop a block, the whole solve, the factorisation."""
    from quantlab.quant.kernels.gptq_block import gptq_block, row_limits, solve_columns_cuda

    grids = [Grid(args.bits, args.group_size, symmetric=True)] * args.recipes
    width = min(grids[0].columns(columns), 128)
    hessian = moments(columns)
    factoring = milliseconds(lambda: inverse_factor(hessian, 0.01), 3)
    factor = inverse_factor(hessian, 0.01).contiguous()
    limits = row_limits(grids, rows, "cuda")
    w = torch.randn(rows * args.recipes, columns, device="cuda")
    scales = torch.empty(len(w), 128 // width, device="cuda")
    zeros, order = torch.empty_like(scales, dtype=torch.int32), torch.arange(columns, device="cuda")
    block, tile = w[:, :128], factor[:128, :128]
    shape = {"tile_rows": args.tile_rows, "warps": args.warps}
    spare = gptq_block(block, tile, limits, scales, zeros, width=width, **shape)
    into = dict(zip(("codes", "errors", "loss"), spare, strict=True))
    kernel = milliseconds(
        lambda: gptq_block(block, tile, limits, scales, zeros, width=width, **into, **shape), args.runs
    )
    loop = milliseconds(lambda: column_loop(block, tile, grids[0], width), 3)
    solve = milliseconds(lambda: solve_columns_cuda(w.clone(), factor, order, grids, **shape), 3)
    return kernel, loop, solve, factoring


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tile-rows", type=int, default=16)
    parser.add_argument("--warps", type=int, default=4)
    parser.add_argument("--recipes", type=int, default=1, help="copies stacked along the rows")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA: torch sees no NVIDIA GPU on this machine; nothing was measured", file=sys.stderr)
        sys.exit(3)
    if not available("cuda"):
        print("no Triton for this GPU, or no C compiler: nothing was measured", file=sys.stderr)
        sys.exit(3)

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.bits} bits, {args.recipes} recipe(s)"
    )
    half, single = rate(torch.bfloat16), rate(torch.float32)
    print(f"matrix rates: bfloat16 {half / 1e12:.0f} TFLOP/s, float32 {single / 1e12:.1f} TFLOP/s\n")
    heads = zip(("kernel/block", "loop/block", "ratio", "solve", "factor"), (14, 12, 8, 10, 10), strict=True)
    print(f"{'solve':<10}{'rows':>8}{'columns':>9}" + "".join(f"{head:>{size}}" for head, size in heads))
    kernels = loops = solves = factors = products = 0.0
    numbers: dict[str, Any] = {"bfloat16_flops": half, "float32_flops": single, "solves": {}}
    for name, (rows, columns) in SOLVES.items():
        kernel, loop, solve, factoring = measure(rows, columns, args)
        print(
            f"{name:<10}{rows * args.recipes:>8}{columns:>9}{kernel:>11.3f} ms{loop:>9.1f} ms{loop / kernel:>8.0f}"
            f"{solve:>7.0f} ms{factoring:>7.0f} ms"
        )
        numbers["solves"][name] = {
            "rows": rows * args.recipes, "columns": columns, "kernel_block_ms": kernel, "loop_block_ms": loop,
            "solve_ms": solve, "factor_ms": factoring,
        }  # fmt: skip
        blocks = columns / 128
        kernels, loops = kernels + kernel * blocks, loops + loop * blocks
        solves, factors = solves + solve, factors + factoring
        # Each weight is corrected by half of all columns on average; a factorisation and a triangular inverse.
        products += args.recipes * rows * columns**2 + 2 / 3 * columns**3
    kernels, loops, measured = (n * LAYERS / 1000 for n in (kernels, loops, solves + factors))
    weights = sum(rows * columns for rows, columns in SOLVES.values())
    gathering = 2 * TOKENS * sum(columns**2 for _, columns in SOLVES.values()) * LAYERS / half
    forwards = 2 * 2 * TOKENS * weights * LAYERS / half
    solving = products * LAYERS / single
    floor = gathering + forwards + solving
    numbers["model_seconds"] = {
        "floor": floor, "solving": measured, "solving_floor": solving, "kernel": kernels, "column_loop": loops
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"\n{LAYERS} layers, {TOKENS:,} tokens, in seconds")
    print(f"matrix-rate floor   {floor:8.2f}  ({gathering:.2f} second moments, {forwards:.2f} two forwards,")
    print(f"                              {solving:.2f} solving)")
    print(f"solving, measured   {measured:8.2f}  of which its floor is {solving / measured:.0%}")
    print(f"  the kernel alone  {kernels:8.2f}  {kernels / floor:.1%} of the whole floor")
    print(f"  a column loop     {loops:8.2f}  in the kernel's place, {loops / floor:.0%} of the whole floor")


if __name__ == "__main__":
    main()
