"""GPTQ: rounding column by column, each error spread over the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1. For a layer ``y = W x`` with second moments
``H = X^T X / n`` it minimises ``tr((W - Q) H (W - Q)^T)`` greedily: column j is rounded, and what its rounding
adds to the error is taken off the later columns along row j of the upper Cholesky factor U of ``H^-1 = U^T U``.

Rows are independent of each other, so several layers of one input, and several bit widths of each, are solved as one
tall matrix. It is held transposed, [in, rows]: the loop over columns then works on contiguous memory. Corrections reach
the columns ahead at once inside ``LEAF`` columns, and by products beyond them, which is the same algebra as updating
everything at once.

The loss needs no further product: with ``e_j = (w_j - q_j) / U_jj`` the recursion gives
``tr(E (H + l I) E^T) = sum_j e_j^2``, from which the damping's share ``l |E|^2`` is taken off.

``act_order`` takes the columns with the largest ``H_jj`` first (the paper's follow-up in its repository); groups are
then runs of that order, and ``group_of`` says which column went where. With ``static_groups`` the groups stay in place,
on grids fixed from the weights as they were. ``act_order="group"`` also keeps the groups in place, but orders whole
groups, and the columns inside each: most of the gain, and a checkpoint that any kernel reads at full speed.

On NVIDIA GPUs the loop over columns is a fused kernel (``kernels/gptq_block.py``); here is the plain one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from quantlab.quant.block import BlockResult, BlockView, join, split
from quantlab.quant.grid import Grid, Quantized, fit, search
from quantlab.quant.hessian import InputHessian, mirror, strips
from quantlab.quant.kernels import available

ActOrder = bool | Literal["group"]
PANEL = 1024  # columns of a Hessian that are factorised at once
TALL = 8192  # rows solved at once: more take memory and save no time
LEAF = 8  # columns corrected one by one before a product carries their errors on


@dataclass(frozen=True)
class Prepared:
    """A Hessian made ready to be solved with, for every grid of one group width.

    ``order`` int64 [in]: columns as they are solved; ``dead`` bool [in]: channels that never fired; ``factor`` float32
    [in, in], upper, in solving order; ``damping``: what was added to the diagonal.
    """

    order: torch.Tensor
    dead: torch.Tensor
    factor: torch.Tensor
    damping: float


def prepare(
    hessian: torch.Tensor, *, width: int, damp: float = 0.01, act_order: ActOrder = False
) -> Prepared:
    """Order and factorise second moments ``hessian`` [in, in], symmetric, positive semi-definite.

    Args:
        width: columns a group. damp: share of the mean diagonal added to the diagonal; doubled until the
            factorisation succeeds.

    Raises:
        ValueError: the Hessian stays indefinite however much it is damped (it holds NaN or infinities).
    """
    diagonal = torch.diagonal(hessian)
    dead = diagonal == 0
    if dead.all():  # no token ever came here: every weight is as important as any other
        dead = torch.zeros_like(dead)
        hessian, diagonal = torch.eye(len(hessian), device=hessian.device), torch.ones_like(diagonal)
    order = column_order(diagonal, width, act_order)
    back = order.flip(0)  # what is factorised has its rows and columns reversed
    reversed_hessian = hessian[back[:, None], back]
    if dead.any():
        index = torch.nonzero(dead[back])[:, 0]
        reversed_hessian[index, index] = 1.0
    factor, damping = _damped_factor(reversed_hessian, damp)
    return Prepared(order, dead, factor, damping)


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse, ``(H + l I)^-1 = U^T U`` with ``l = damp * mean(diag H)``.

    Raises:
        ValueError: as :func:`prepare`.
    """
    return _damped_factor(hessian.flip(0, 1), damp)[0]


def _damped_factor(matrix: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """The factor U of :func:`inverse_factor` and ``l``, from H with rows and columns reversed (used up).

    With J the reversal, ``J (H + l I) J = L L^T`` gives ``H + l I = V V^T`` for the upper triangular ``V = J L J``,
    hence ``U = V^-1``: one factorisation and one triangular inverse, and H is never inverted. All of it happens in
    place, so that the widest layer of a model costs one more matrix of its H's size and not four. Too little damping
    for float32 shows as a failed factorisation; it is then doubled, at most 12 times.
    """
    if not torch.isfinite(matrix.sum(dim=1)).all():
        raise ValueError("the second moments hold NaN or infinite values: the model's activations overflow")
    diagonal = torch.diagonal(matrix)
    plain, mean = diagonal.clone(), float(diagonal.mean())
    for _ in range(12):
        diagonal.copy_(plain + damp * mean)
        if _factorise(matrix):
            matrix.tril_()
            _reverse(matrix.view(-1))
            _invert_upper(matrix)
            return matrix, damp * mean
        mirror(matrix.t())  # the lower half is spoilt, the upper one is still H
        damp *= 2
    raise ValueError("the second moments are not positive definite, even strongly damped")


def _factorise(matrix: torch.Tensor) -> bool:
    """Cholesky's factor of a symmetric matrix into its lower half, in place: that of a leading half, what follows from
    it below, that of the rest. False where it is not positive definite. Above the diagonal the matrix stays as it was.
    """
    n = len(matrix)
    if n <= PANEL:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower + matrix.triu(1))
        return not failed
    half = n // 2
    first, below, rest = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not _factorise(first):
        return False
    below.copy_(torch.linalg.solve_triangular(first.t(), below, upper=True, left=False))
    for strip in strips(n - half):  # of the rest's lower half
        square, rows = rest[strip, strip], below[strip]
        square.copy_((square - rows @ rows.t()).tril_() + square.triu(1))
        if strip.start:
            rest[strip, : strip.start].addmm_(rows, below[: strip.start].t(), alpha=-1)
    return _factorise(rest)


def _reverse(values: torch.Tensor, piece: int = 1 << 20) -> None:
    """Reverse a vector in place; for all of a matrix's numbers that reverses its rows and its columns."""
    count = len(values)
    for start in range(0, count // 2, piece):
        stop = min(start + piece, count // 2)
        front, back = values[start:stop], values[count - stop : count - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _invert_upper(upper: torch.Tensor, smallest: int = 256) -> None:
    """Invert an upper triangular matrix in place: ``[[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]]``."""
    n = len(upper)
    if n <= smallest:
        eye = torch.eye(n, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    half = n // 2
    _invert_upper(upper[:half, :half], smallest)
    _invert_upper(upper[half:, half:], smallest)
    corner = upper[:half, half:]
    corner.copy_((upper[:half, :half] @ corner).neg_() @ upper[half:, half:])


def solve_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: ActOrder = False,
    static_groups: bool = False,
    clip_search: bool = False,
    block: int = 128,
) -> Quantized:
    """Quantize one layer, or several of equal input stacked along their rows.

    Args:
        weight: [out, in], any float dtype; finite.
        hessian: second moments of the input, [in, in], symmetric, positive semi-definite.
        damp: share of the mean diagonal added to the diagonal.
        static_groups: with ``act_order=True``, keep groups in place, on grids of the weights as they are.
        clip_search: search for the range of each group.
        block: columns solved between two updates of the rest (speed only, the result is the same algebra).

    Raises:
        ValueError: as :func:`prepare`.
    """
    prepared = prepare(hessian, width=grid.columns(weight.shape[1]), damp=damp, act_order=act_order)
    found = solve_many(
        weight,
        prepared,
        [grid],
        in_place=act_order is not True or static_groups,
        static_groups=static_groups,
        clip_search=clip_search,
        block=block,
    )
    return found[0][0]


def solve_many(
    weight: torch.Tensor,
    prepared: Prepared,
    grids: Sequence[Grid],
    *,
    in_place: bool,
    static_groups: bool = False,
    clip_search: bool = False,
    block: int = 128,
) -> list[tuple[Quantized, torch.Tensor]]:
    """Solve ``weight`` [out, in] on several grids at once. Their groups nest (on GPUs: are of one width).

    Args:
        in_place: groups are the columns' own (in order, ``act_order="group"``, static groups) rather than runs of
            the solving order.

    Returns:
        For each grid the result, and the squared output error a token of every row, float32 [out].
    """
    rows, columns = weight.shape
    widths = [grid.columns(columns) for grid in grids]
    if not nest(widths):
        raise ValueError(f"groups of {widths} columns do not nest: such grids are not solved together")
    at_once = max(1, TALL // len(grids))
    if rows > at_once and not available(weight.device):
        tiles = [
            solve_many(
                tile,
                prepared,
                grids,
                in_place=in_place,
                static_groups=static_groups,
                clip_search=clip_search,
                block=block,
            )
            for tile in weight.split(at_once)
        ]
        return [
            (join([solved for solved, _ in of]), torch.cat([loss for _, loss in of]))
            for of in zip(*tiles, strict=True)
        ]
    order, dead = prepared.order, prepared.dead
    parts = [slice(i * rows, (i + 1) * rows) for i in range(len(grids))]
    importance = torch.diagonal(prepared.factor).pow(-2) if clip_search else None  # [in], in solving order
    static = None
    if static_groups:
        whole = weight.to(torch.float32).masked_fill(dead, 0.0)
        static = [
            _in_place(whole, width, grid, clip_search) for width, grid in zip(widths, grids, strict=True)
        ]
    # Where a channel is dead any value is as good, and zero widens no range.
    if available(weight.device):
        from quantlab.quant.kernels.gptq_block import solve_columns_cuda

        # [grids * out, in]
        w = weight.to(torch.float32).masked_fill(dead, 0.0)[:, order].repeat(len(grids), 1)
        codes, scales, zeros, loss = solve_columns_cuda(
            w, prepared.factor, order, grids, static, clip_search=clip_search
        )
        codes = codes.t()
        fitted = [(scales[part].t(), zeros[part].t()) for part in parts]
    else:
        w = weight.to(torch.float32).t()[order]  # [in, out]
        w[dead[order]] = 0.0
        w = w.repeat(1, len(grids)) if len(grids) > 1 else w
        codes, fitted, loss = _solve_columns(w, prepared.factor, order, grids, static, importance, block)
    del w
    back = torch.argsort(order)
    found = []
    for part, grid, width, (scales, zeros) in zip(parts, grids, widths, fitted, strict=True):
        group_of = torch.arange(columns, device=weight.device) // width
        if not in_place:
            group_of = group_of[back]
        elif static is None:  # whole groups were ordered: the k-th one solved goes back to where it stands
            placed = torch.argsort(order[::width] // width)
            scales, zeros = scales[placed], zeros[placed]
        solved = Quantized(
            codes[back, part].t().contiguous(),
            scales.t().contiguous(),
            zeros.t().to(torch.int32).contiguous(),
            group_of,
            grid.bits,
        )
        moved = squared_distance(weight, solved, dead)
        found.append((solved, (loss[part] - prepared.damping * moved).clamp(min=0.0)))
    return found


def _solve_columns(
    w: torch.Tensor,
    factor: torch.Tensor,
    order: torch.Tensor,
    grids: Sequence[Grid],
    static: Sequence[tuple[torch.Tensor, torch.Tensor]] | None,
    importance: torch.Tensor | None,
    block: int,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The recursion on ``w`` float32 [in, rows] (overwritten), rows being those of each grid in turn.

    A block of columns is solved by halves: the left one, one product that takes its errors off the right one, the right
    one. Halves end in leaves of a few columns, each inside one group of every grid; there everything is divided by the
    group's scale once, so that a column takes four passes: round, clamp, subtract, and off the leaf's later columns.

    ``static``: scales and zeros [out, groups] of each grid, of groups in place. ``importance`` [in]: of each column,
    where ranges are searched for.

    Returns:
        codes uint8 [in, rows]; of each grid scales and zeros float32 [groups, out]; ``sum_j e_j^2`` float32 [rows].
    """
    columns, rows = w.shape
    out = rows // len(grids)
    parts = [slice(i * out, (i + 1) * out) for i in range(len(grids))]
    widths = [grid.columns(columns) for grid in grids]
    nested = sorted({width for width in widths if width < columns})
    if nested:
        block = max(nested[-1], block - block % nested[-1])  # a group never straddles two blocks
    leaf = 1 if static is not None else math.gcd(LEAF, *nested)
    units = [leaf, *nested]  # halves end where these do: a group starts when all of it has been corrected
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=w.device)
    if static is None:
        fitted = [
            (w.new_empty(columns // width, out), w.new_empty(columns // width, out)) for width in widths
        ]
    else:
        fitted = [(scales.t().contiguous(), zeros.t().contiguous()) for scales, zeros in static]
    top = torch.cat([w.new_full((out,), float(grid.max_code)) for grid in grids])  # [rows]
    bottom, loss = torch.zeros_like(top), torch.zeros_like(top)
    scale, zero = torch.empty_like(top), torch.empty_like(top)  # of the groups at hand
    errors = w.new_empty(min(block, columns), rows)
    taken = torch.empty_like(errors)  # codes
    diagonal = torch.diagonal(factor)[:, None]
    origin = order.tolist()

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        for low, middle, high in halves(start, stop, units):
            if middle < high:  # the left half is done: its errors are taken off the right one
                done = errors[low - start : middle - start]
                w[middle:high].addmm_(factor[low:middle, middle:high].t(), done, alpha=-1)
                continue
            for part, grid, width, (scales, zeros) in zip(parts, grids, widths, fitted, strict=True):
                if static is not None:
                    scale[part], zero[part] = (found[origin[low] // width] for found in (scales, zeros))
                elif low % width == 0:  # a new group: its range is that of the weights as corrected so far
                    group = w[low : low + width, part].t()
                    if importance is None:
                        scale[part], zero[part] = fit(group, grid)
                    else:
                        scale[part], zero[part] = search(group, importance[low : low + width], grid)
                    scales[low // width], zeros[low // width] = scale[part], zero[part]
            values, inside = w[low:high], slice(low - start, high - start)
            torch.div(values, scale, out=values).add_(zero)  # in steps of the grid
            ratio = factor[low:high, low:high] / diagonal[low:high]
            rows_of = zip(values.unbind(), taken[inside].unbind(), errors[inside].unbind(), strict=True)
            for j, (value, code, error) in enumerate(rows_of, start=1):  # [rows]
                torch.clamp(torch.round(value, out=code), bottom, top, out=code)
                torch.sub(value, code, out=error)
                if low + j < high:
                    values[j:].addr_(ratio[j - 1, j:], error, alpha=-1)
            errors[inside].mul_(scale).div_(diagonal[low:high])
        done = errors[: stop - start]
        codes[start:stop] = taken[: stop - start]
        loss += done.square().sum(dim=0)
        if stop < columns:
            w[stop:].addmm_(factor[start:stop, stop:].t(), done, alpha=-1)
    return codes, fitted, loss


def _in_place(
    weight: torch.Tensor, width: int, grid: Grid, clip_search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] for ``weight`` [out, in] as it is, in groups of ``width`` columns as they stand.
    All columns count alike in the search: most will have been moved when it is their turn."""
    groups = weight.view(len(weight), -1, width)
    if not clip_search:
        return fit(groups, grid)
    scale, zero = search(groups.flatten(0, 1), weight.new_ones(width), grid)
    return scale.view(len(weight), -1), zero.view(len(weight), -1)


def halves(low: int, high: int, units: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """How columns ``low:high`` are solved: leaves ``(low, high, high)`` of at most ``units[0]`` columns in order, and
    between two halves, each of whole ``units`` where it can be, ``(low, middle, high)``."""
    if high - low <= units[0]:
        yield low, high, high
        return
    unit = max(unit for unit in units if unit < high - low)
    middle = low + unit * -(-(high - low) // (2 * unit))
    yield from halves(low, middle, units)
    yield low, middle, high
    yield from halves(middle, high, units)


def nest(widths: Sequence[int]) -> bool:
    """Whether wider groups are whole numbers of narrower ones, so that one loop over columns solves them all."""
    rising = sorted(set(widths))
    return all(wide % narrow == 0 for narrow, wide in itertools.pairwise(rising))


def squared_distance(
    weight: torch.Tensor, solved: Quantized, dead: torch.Tensor, chunk: int = 512
) -> torch.Tensor:
    """``|w - q|^2`` of every row over the columns that are not ``dead``, float32 [out]; ``chunk`` rows at a time."""
    alive = (~dead).to(torch.float32)
    parts = []
    for start in range(0, len(weight), chunk):
        rows = slice(start, start + chunk)
        part = Quantized(
            solved.codes[rows], solved.scales[rows], solved.zeros[rows], solved.group_of, solved.bits
        )
        parts.append((part.dequantize() - weight[rows]).square_() @ alive)
    return torch.cat(parts)


def column_order(diagonal: torch.Tensor, width: int, act_order: ActOrder = False) -> torch.Tensor:
    """In which order columns are solved, int64 [in], from the Hessian's diagonal [in]; ``width`` columns a group."""
    if act_order is False:
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order is True:
        return torch.argsort(diagonal, descending=True, stable=True)
    energy = diagonal.reshape(-1, width)  # [groups, group_size]
    inside = torch.argsort(energy, dim=1, descending=True, stable=True)
    inside += torch.arange(0, len(diagonal), width, device=diagonal.device)[:, None]
    groups = torch.argsort(energy.amax(dim=1), descending=True, stable=True)
    return inside[groups].reshape(-1)


def quantize_block(
    block: BlockView,
    grids: Sequence[Mapping[str, Grid]],
    *,
    damp: float = 0.01,
    act_order: ActOrder = False,
    static_groups: bool = False,
    clip_search: bool = False,
) -> list[BlockResult]:
    """Every linear that a set of ``grids`` names, on its grid; one result a set. Layers of equal input, and grids of
    equal width, are solved as one matrix."""
    results = [BlockResult() for _ in grids]
    in_place = act_order is not True or static_groups
    for moments in block.moments:
        known = {} if block.cache is None else block.cache
        for names, wanted in alike(moments.layers, grids):
            weight, sizes = block.stack(names), block.rows(names)
            columns = weight.shape[1]
            widths = [grid.columns(columns) for _, grid in wanted]
            # Only ``act_order="group"`` orders differently for different widths; the kernel for GPUs takes one at a
            # time.
            together = act_order != "group" and nest(widths) and not available(weight.device)
            for width in dict.fromkeys(widths[:1] if together else widths):
                chosen = [one for one, own in zip(wanted, widths, strict=True) if together or own == width]
                solved = solve_many(
                    weight,
                    prepared_once(known, moments, width, damp, act_order),
                    [grid for _, grid in chosen],
                    in_place=in_place,
                    static_groups=static_groups,
                    clip_search=clip_search,
                )
                for (i, _), (whole, loss) in zip(chosen, solved, strict=True):
                    parts = zip(names, split(whole, sizes), loss.split(sizes), strict=True)
                    for name, part, share in parts:
                        results[i].quantized[name] = part
                        results[i].loss[name] = share.sum().item()
    return results


def prepared_once(
    known: dict[Any, Any], moments: InputHessian, width: int, damp: float, act_order: ActOrder
) -> Prepared:
    """The Hessian of an input made ready for groups of ``width`` columns, as ``known`` of an earlier solve has it."""
    key = ("gptq", moments.layers[0], damp, act_order, width if act_order == "group" else 0)
    if key not in known:
        known[key] = prepare(moments.hessian, width=width, damp=damp, act_order=act_order)
    found = known[key]
    assert isinstance(found, Prepared)
    return found


def alike(
    layers: Sequence[str], grids: Sequence[Mapping[str, Grid]]
) -> list[tuple[tuple[str, ...], list[tuple[int, Grid]]]]:
    """Layers of one input that are solved as one matrix, and for which results (by number) on which grids: those that
    one set of grids gives the same grid."""
    found: dict[tuple[str, ...], list[tuple[int, Grid]]] = {}
    for number, chosen in enumerate(grids):
        by_grid: dict[Grid, list[str]] = {}
        for name in layers:
            if name in chosen:
                by_grid.setdefault(chosen[name], []).append(name)
        for grid, names in by_grid.items():
            found.setdefault(tuple(names), []).append((number, grid))
    return list(found.items())
