"""GPTQ's column recursion as one Triton kernel launch per block of 128 columns.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1 (the inner loop) with section 3.3, step 2 ("lazy batch
updates", the outer one). Triton: Tillet, Kung, Cox, MAPL 2019.

The recursion is sequential along the columns and independent along the rows. A program takes a tile of rows of the
block, keeps it in registers for all columns, and takes the block's 128 x 128 tile of the inverse's Cholesky factor row
by row through shared memory; the whole tile, 64 KB and the same for all programs, stays in the L1 cache beside it. A
column that is done has no further use, so its error takes its place, and at the end the tile of weights has become
the tile of errors from which one matrix product corrects the columns after the block.

Rows are whatever wants to be solved with one Hessian: the matrices of equal input, and several recipes' copies of
them, since the grid's limits are given per row. Launches are columns / 128 a solve: for Llama-3-8B, whose layers have
three solves of 4,096 columns and one of 14,336, 32 x (3 x 32 + 112) = 6,656 in place of 0.85 million steps of a column
loop (1.2 million with q, k, v, gate and up apart), each of which would be a dozen launches of its own.

Every operation is the plain solver's, in its order and correctly rounded: division instead of a product with the
reciprocal, no fused multiply-add (it would skip a rounding), halves to even. Codes therefore agree with it but for
ties, where the matrix product in between has summed in another order.

Not covered: AMD and Intel GPUs. Not timed on a GPU yet; `benchmarks/gptq_kernel.py` does so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import triton
import triton.language as tl

from quantlab.quant.grid import SEARCHED, SMALLEST_SCALE, Grid, fit, search

BLOCK = 128  # columns a launch solves at most
LARGEST_SCALE = 65280.0

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_LARGEST = tl.constexpr(LARGEST_SCALE)
# Added to |x| < 2**22 in float32 it leaves no bits below one, so the sum is rounded, halves to even, by the adder.
_INTEGERS = tl.constexpr(1.5 * 2**23)


@triton.jit
def _rounded(value, low, high):  # type: ignore[no-untyped-def]
    """Nearest integer between the integers ``low`` and ``high``; clamped first, for the adder's range."""
    return (tl.minimum(tl.maximum(value, low), high) + _INTEGERS) - _INTEGERS


@triton.jit
def _fitted(w, inside, shrink, top, zero_low, zero_high):  # type: ignore[no-untyped-def]
    """`grid.fit` on the columns ``inside`` [BLOCK] of ``w`` [ROWS, BLOCK]: scale and zero, float32 [ROWS]."""
    values = tl.where(inside[None, :], w, 0.0)
    low = tl.minimum(tl.min(values, axis=1), 0.0) * shrink
    high = tl.maximum(tl.max(values, axis=1), 0.0) * shrink
    symmetric = zero_low == zero_high
    high = tl.where(symmetric, tl.maximum(high, -low), high)
    low = tl.where(symmetric, -high, low)
    empty = high - low == 0
    low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
    # bfloat16 is the upper half of a float32. Adding one less than half a step, and one more where the last bit that
    # stays is odd, carries into the upper half exactly where rounding to nearest even goes up.
    bits = tl.math.div_rn(high - low, top).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    scale = bits.to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.maximum(scale, _SMALLEST), _LARGEST)
    return scale, _rounded(tl.math.div_rn(-low, scale), zero_low, zero_high)


@triton.jit
def _searched(w, inside, diagonal, shrinks_ptr, top, zero_low, zero_high, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`grid.search` on the columns ``inside``; ``diagonal`` [BLOCK] of the factor gives their importance."""
    scale, zero = _fitted(w, inside, tl.load(shrinks_ptr), top, zero_low, zero_high)
    least = _cost(w, inside, diagonal, scale, zero, top)
    for step in range(1, SEARCH):
        s, z = _fitted(w, inside, tl.load(shrinks_ptr + step), top, zero_low, zero_high)
        cost = _cost(w, inside, diagonal, s, z, top)
        better = cost < least
        scale, zero = tl.where(better, s, scale), tl.where(better, z, zero)
        least = tl.minimum(cost, least)
    return scale, zero


@triton.jit
def _cost(w, inside, diagonal, scale, zero, top):  # type: ignore[no-untyped-def]
    """What rounding the columns ``inside`` to a grid costs, float32 [ROWS]."""
    s, z = scale[:, None], zero[:, None]
    error = (_rounded(tl.math.div_rn(w, s) + z, 0.0, top[:, None]) - z) * s - w
    error = tl.math.div_rn(error, tl.zeros_like(error) + diagonal[None, :])
    return tl.sum(tl.where(inside[None, :], error * error, 0.0), axis=1)


@triton.jit
def _column(w, codes, j, lane, scale, zero, top, factor_ptr, factor_stride, columns):  # type: ignore[no-untyped-def]
    """Round column ``j`` and correct the later ones of the block: ``w`` and ``codes`` [ROWS, BLOCK] after it."""
    here = (lane == j)[None, :]
    row = factor_ptr + j * factor_stride
    later = tl.load(row + lane, mask=(lane > j) & (lane < columns), other=0.0)[None, :]  # [1, BLOCK]
    diagonal = tl.load(row + j)
    column = tl.sum(tl.where(here, w, 0.0), axis=1)  # [ROWS]; a sum of one value and zeros is exact
    code = _rounded(tl.math.div_rn(column, scale) + zero, 0.0, top)
    diagonal = tl.zeros_like(column) + diagonal
    error = tl.math.div_rn(column - (code - zero) * scale, diagonal)[:, None]
    w = tl.where(here, error, w - error * later)
    return w, tl.where(here, code[:, None], codes)


@triton.jit(do_not_specialize=["rows"])
def _block_kernel(  # type: ignore[no-untyped-def]
    w_ptr,  # float32 [rows, columns]
    factor_ptr,  # float32 [columns, columns], upper
    limits_ptr,  # float32 [3, rows]
    scales_ptr,  # float32 [rows, groups]
    zeros_ptr,  # int32 [rows, groups]
    group_ptr,  # int32 [columns], only where the grids are GIVEN
    shrinks_ptr,  # float32 [SEARCH], only where ranges are searched for
    codes_ptr,  # uint8 [rows, columns]
    errors_ptr,  # float32 [rows, columns]
    loss_ptr,  # float32 [rows], added to
    rows,
    columns,
    w_stride,
    factor_stride,
    scales_stride,
    zeros_stride,
    codes_stride,
    errors_stride,
    GIVEN: tl.constexpr,
    SEARCH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    live = row < rows
    valid = live[:, None] & (lane < columns)[None, :]
    at = row.to(tl.int64)  # stacked recipes have more than 2**31 weights
    w = tl.load(w_ptr + at[:, None] * w_stride + lane[None, :], mask=valid, other=0.0)
    top = tl.load(limits_ptr + at, mask=live, other=1.0)
    codes = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if GIVEN:
        for j in range(0, columns):
            group = tl.load(group_ptr + j)
            scale = tl.load(scales_ptr + at * scales_stride + group, mask=live, other=1.0)
            zero = tl.load(zeros_ptr + at * zeros_stride + group, mask=live, other=0).to(tl.float32)
            w, codes = _column(w, codes, j, lane, scale, zero, top, factor_ptr, factor_stride, columns)
    else:
        zero_low = tl.load(limits_ptr + rows + at, mask=live, other=0.0)
        zero_high = tl.load(limits_ptr + 2 * rows + at, mask=live, other=1.0)
        for group in range(0, columns // WIDTH):
            first = group * WIDTH
            # The group's range is that of the weights as the columns before it have left them.
            inside = (lane >= first) & (lane < first + WIDTH)
            if SEARCH > 1:
                here = lane < columns
                diagonal = tl.load(factor_ptr + lane * (factor_stride + 1), mask=here, other=1.0)
                scale, zero = _searched(w, inside, diagonal, shrinks_ptr, top, zero_low, zero_high, SEARCH)
            else:
                scale, zero = _fitted(w, inside, 1.0, top, zero_low, zero_high)
            for j in range(first, first + WIDTH):
                w, codes = _column(w, codes, j, lane, scale, zero, top, factor_ptr, factor_stride, columns)
            tl.store(scales_ptr + at * scales_stride + group, scale, mask=live)
            tl.store(zeros_ptr + at * zeros_stride + group, zero.to(tl.int32), mask=live)
    tl.store(errors_ptr + at[:, None] * errors_stride + lane[None, :], w, mask=valid)
    loss = tl.load(loss_ptr + at, mask=live, other=0.0) + tl.sum(w * w, axis=1)
    tl.store(loss_ptr + at, loss, mask=live)
    narrow = codes.to(tl.int32).to(tl.uint8)
    tl.store(codes_ptr + at[:, None] * codes_stride + lane[None, :], narrow, mask=valid)


def gptq_block(
    w: torch.Tensor,
    factor: torch.Tensor,
    limits: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    *,
    width: int | None = None,
    group_of: torch.Tensor | None = None,
    shrinks: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    errors: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
    tile_rows: int = 16,
    warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve one block of at most 128 columns; one kernel launch on the current stream.

    The last dimension of every matrix must be contiguous; rows may be strided (a view of columns will do).

    Args:
        w: float32 [rows, columns], corrected by all earlier blocks; not changed.
        factor: float32 [columns, columns], the block's tile of the upper Cholesky factor of the inverse.
        limits: float32 [3, rows], see `row_limits`.
        scales, zeros: float32 and int32 [rows, groups]. Written where ``width`` is given, one group after the other;
            read where ``group_of`` is.
        width: columns a group spans, a divisor of ``columns``: grids are fitted to the weights as corrected.
        group_of: int32 [columns], which grid of ``scales`` and ``zeros`` a column takes.
        shrinks: float32, the ranges to try where grids are fitted: shares of the whole one, that first.
        codes, errors, loss: what to write to (``loss``: to add to), else new ones.
        tile_rows: rows a program solves, a power of two; ``warps`` it runs in (speed only).

    Returns:
        ``codes`` uint8 [rows, columns]; ``errors`` float32 [rows, columns]: ``errors @ factor[block, later]`` is to be
        taken off the columns after the block; ``loss`` float32 [rows], the sum of their squares.
    """
    rows, columns = w.shape
    if (width is None) == (group_of is None):
        raise ValueError("grids are either fitted (width) or given (group_of)")
    if columns > BLOCK or (width is not None and columns % width):
        raise ValueError(
            f"a block has at most {BLOCK} columns and whole groups, not {columns} with {width} a group"
        )
    if any(m.stride(-1) != 1 and m.shape[-1] > 1 for m in (w, factor, scales, zeros)):
        raise ValueError("the kernel reads rows whose elements are next to each other")
    if limits.shape != (3, rows) or not limits.is_contiguous():
        raise ValueError(f"limits must be contiguous and [3, {rows}], see row_limits")
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device) if codes is None else codes
    errors = torch.empty(rows, columns, device=w.device) if errors is None else errors
    loss = torch.zeros(rows, device=w.device) if loss is None else loss
    if rows == 0:
        return codes, errors, loss
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(w.device) if w.is_cuda else nullcontext():
        _block_kernel[(triton.cdiv(rows, tile_rows),)](
            w,
            factor,
            limits,
            scales,
            zeros,
            zeros if group_of is None else group_of,  # any pointer: not read
            scales if shrinks is None else shrinks,
            codes,
            errors,
            loss,
            rows,
            columns,
            w.stride(0),
            factor.stride(0),
            scales.stride(0),
            zeros.stride(0),
            codes.stride(0),
            errors.stride(0),
            GIVEN=group_of is not None,
            SEARCH=1 if shrinks is None else len(shrinks),
            WIDTH=width or 1,
            ROWS=tile_rows,
            BLOCK=BLOCK,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return codes, errors, loss


def solve_columns_cuda(
    w: torch.Tensor,
    factor: torch.Tensor,
    order: torch.Tensor,
    grids: Sequence[Grid],
    static: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    clip_search: bool = False,
    tile_rows: int = 16,
    warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve all columns for several grids of one group width: a launch and a matrix product per block.

    Args:
        w: float32 [rows, in], the rows of each grid in turn, columns in solving order, those of dead channels zero.
            It is used up: what it holds afterwards means nothing.
        factor: float32 [in, in], upper Cholesky factor of the inverse, in solving order.
        order: int64 [in], which column of the matrix each one is (read for static groups only).
        static: scales and zeros [rows of the grid, groups] of each grid, fixed beforehand, of groups in place. Without,
            groups are runs of columns as they stand, and their grids are fitted to the weights as corrected.
        clip_search: fitted grids are those of the range that costs least.

    Returns:
        codes uint8 [rows, in], in solving order; scales float32 and zeros int32 [rows, groups]; ``sum_j e_j^2``
        float32 [rows].
    """
    rows, columns = w.shape
    width, part = grids[0].columns(columns), rows // len(grids)
    if columns % width or any(grid.columns(columns) != width for grid in grids):
        raise ValueError(f"{columns} columns must be whole groups of one width for all grids solved together")
    factor = factor.contiguous()  # LAPACK and cuSOLVER leave it column by column, the kernel reads rows
    limits = row_limits(grids, part, w.device)
    group_of = torch.arange(columns, dtype=torch.int32, device=w.device) // width
    if static is None:
        scales = torch.empty(rows, columns // width, device=w.device)
        zeros = torch.empty(rows, columns // width, dtype=torch.int32, device=w.device)
    else:
        group_of = group_of[order]
        scales = torch.cat([scale for scale, _ in static])
        zeros = torch.cat([zero for _, zero in static]).to(torch.int32)
    step = BLOCK if static is not None else block_columns(width, columns)
    inside = static is None and width <= step  # groups end inside a block: the kernel fits their grids
    shrinks = torch.tensor(SEARCHED, device=w.device) if clip_search and inside else None
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device)
    buffer = torch.empty(rows, min(step, columns), device=w.device)
    loss = torch.zeros(rows, device=w.device)
    with full_precision():
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            groups = slice(start // width, -(-stop // width)) if inside else slice(None)
            if static is None and not inside and start % width == 0:
                for i, grid in enumerate(grids):
                    own, group = slice(i * part, (i + 1) * part), start // width
                    values, span = w[own, start : start + width], slice(start, start + width)
                    if clip_search:
                        importance = torch.diagonal(factor)[span].pow(-2)
                        scales[own, group], zeros[own, group] = search(values, importance, grid)
                    else:
                        scales[own, group], zeros[own, group] = fit(values, grid)
            _, errors, _ = gptq_block(
                w[:, start:stop],
                factor[start:stop, start:stop],
                limits,
                scales[:, groups],
                zeros[:, groups],
                width=width if inside else None,
                group_of=None if inside else group_of[start:stop],
                shrinks=shrinks,
                codes=codes[:, start:stop],
                errors=buffer[:, : stop - start],
                loss=loss,
                tile_rows=tile_rows,
                warps=warps,
            )
            if stop < columns:
                w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes, scales, zeros, loss


def row_limits(grids: Sequence[Grid], rows: int, device: torch.device | str) -> torch.Tensor:
    """What the kernel has to know of each row's grid, float32 [3, grids * rows], ``rows`` of each grid in turn: its
    highest code, its lowest and its highest zero. Only a symmetric grid has the last two equal."""
    limits = []
    for grid in grids:
        middle = (grid.max_code + 1) // 2
        low, high = (middle, middle) if grid.symmetric else (grid.zero_min, grid.max_code)
        limits.append([grid.max_code, low, high])
    each = torch.tensor(limits, dtype=torch.float32, device=device)  # [grids, 3]
    return each.t().repeat_interleave(rows, dim=1).contiguous()


def block_columns(width: int, columns: int) -> int:
    """Columns of a block, at most 128: whole groups, or for larger ones a part that ends where the group ends."""
    if width <= BLOCK:
        return BLOCK // width * width
    if width >= columns:  # one group: it has no end inside
        return BLOCK
    return next(step for step in range(BLOCK, 0, -1) if width % step == 0)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products in float32: TF32's 10-bit mantissas would be a coarser grid than the one solved for."""
    settings = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and refuses to read the old one where a program has set the new one.
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)
