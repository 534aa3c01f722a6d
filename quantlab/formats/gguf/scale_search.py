"""Scales and minima of blocks that minimise the weighted squared error of the weights.

For the values x_i of a group, weights w_i and the levels l_i of their codes, a block type stands for ``s l_i - m``.
Given the levels, the best (s, m) solve a 2 by 2 least squares problem; given (s, m), the best levels are the nearest.
From each of a set of starting ranges the two are alternated, and the best is kept: no step makes the error larger, so
the result is not worse than the best range of the set.

In a super-block ``s = d a`` and ``m = dmin b`` with small integers a and b of each group, which are then found
together with d and dmin: for fixed levels the error is a quadratic function of (d, dmin) over the whole super-block
and of (a, b) in each group, so each group moves to the best of its neighbouring integers, (d, dmin) to their least
squares solution, the levels to the nearest, and again. What float16 makes of d and dmin is part of every step; the
best step is kept.

Everything is held transposed, [columns, rows], as the column solver holds it: sums over a group are then sums over
whole vectors of rows. Callers bound the memory by the rows they hand over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantlab.formats.gguf.levels import Levels
from quantlab.formats.gguf.plain_rounding import half
from quantlab.registry.block_types import BlockType

# Of the largest integer, for the group of the largest step.
SHARES = (1.0, 0.86, 0.93, 1.1, 1.25, 1.5, 2.0, 3.0)
SMALLEST = 1e-30  # a step below this is none
MARGIN = 0.02  # share of a group's error that a larger step has to save
ROUNDS = 2  # of alternation of real steps and levels from the best start
STORED_ROUNDS = 4  # of what the file holds and levels


@dataclass(frozen=True)
class Fitted:
    """Scales of some columns, [.., rows]: ``d`` and ``dmin`` float32 [blocks, rows] (values that float16 holds),
    ``scales`` and ``minima`` float32 [groups, rows] (integers), as the type has them."""

    d: torch.Tensor
    dmin: torch.Tensor | None
    scales: torch.Tensor | None
    minima: torch.Tensor | None

    def steps(self) -> torch.Tensor:
        """What one level is worth, float32 [groups, rows]."""
        return _times(self.d, self.scales)

    def offsets(self) -> torch.Tensor | None:
        """What is taken off each value, float32 [groups, rows]."""
        return None if self.dmin is None else _times(self.dmin, self.minima)

    def block(self, number: int) -> Fitted:
        """One block of several."""

        def part(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            size = len(values) // len(self.d)
            return values[number * size : (number + 1) * size]

        return Fitted(self.d[number : number + 1], part(self.dmin), part(self.scales), part(self.minima))


def _times(d: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
    if integers is None:
        return d
    blocks, rows = d.shape
    return (d[:, None] * integers.view(blocks, -1, rows)).view(-1, rows)


def fit(x: torch.Tensor, kind: BlockType, importance: torch.Tensor | None = None) -> Fitted:
    """Scales for weights ``x`` float32 [columns, rows], transposed, of whole blocks.

    Args:
        importance: weight of each column's squared error, [columns], positive (:func:`positive`); None weighs all
            alike.

    Raises:
        ValueError: the weights hold NaN or infinities, or values beyond what the type can hold.
    """
    columns, rows = x.shape
    kind.row_bytes(columns)
    if not torch.isfinite(x.abs().amax()):
        raise ValueError("the weights hold NaN or infinity")
    groups = x.reshape(-1, kind.group, rows)  # [groups, group, rows]
    weights = None if importance is None else importance.view(-1, kind.group, 1)
    search = _Search(groups, weights, kind)
    steps, offsets = search.free()
    found = (
        search.in_blocks(steps, offsets)
        if kind.scale_range is None
        else search.in_super_blocks(steps, offsets)
    )
    if not torch.isfinite(found.d).all() or (found.dmin is not None and not torch.isfinite(found.dmin).all()):
        raise ValueError(f"the weights reach {float(x.abs().amax()):.3g}, more than {kind.name} holds")
    return found


def positive(importance: torch.Tensor) -> torch.Tensor:
    """Importance [columns], float32, of mean 1. Columns of none get a little, so that a group whose columns never fire
    keeps its values."""
    found = importance.to(torch.float32)
    floor = 1e-4 * found.mean()
    found = found.clamp(min=floor) if floor > 0 else torch.ones_like(found)
    return found / found.mean()


def inverse(step: torch.Tensor) -> torch.Tensor:
    """``1 / step``, 0 where there is none."""
    return torch.where(step.abs() < SMALLEST, 0.0, 1.0 / step)


def nearest(x: torch.Tensor, grid: Levels, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The levels nearest to ``x`` [groups, group, rows], for a step and an offset of each group, [groups, rows]."""
    steps = inverse(step)[:, None]
    return grid.nearest(x * steps if offset is None else (x + offset[:, None]).mul_(steps))


@dataclass
class _Sums:
    """Weighted sums over a group, [groups, rows]: of ``l``, ``l l``, ``l x``; those of 1 and x do not change."""

    level: torch.Tensor | None
    square: torch.Tensor
    product: torch.Tensor


class _Search:
    """The search over one tile: ``x`` [groups, group, rows], ``weights`` [groups, group, 1] or None."""

    def __init__(self, x: torch.Tensor, weights: torch.Tensor | None, kind: BlockType) -> None:
        self.x, self.weights, self.kind = x, weights, kind
        self.grid = Levels(kind, x.device)
        self.wx = x if weights is None else x * weights
        self.sum_xx = (self.wx * x).sum(dim=1)
        self.sum_x = self.wx.sum(dim=1) if kind.minimum else None
        self.sum_1 = (
            torch.full_like(x[:, 0], float(kind.group))
            if weights is None
            else weights.sum(dim=1).expand_as(x[:, 0])
        )
        # A super-block's minima are not negative; Q4_1 and Q5_1 take any.
        self.least = 0.0 if kind.min_range else -float("inf")

    def levels(self, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        return nearest(self.x, self.grid, step, offset)

    def sums(self, levels: torch.Tensor) -> _Sums:
        product = (levels * self.wx).sum(dim=1)
        weighted = levels if self.weights is None else levels * self.weights
        level = weighted.sum(dim=1) if self.kind.minimum else None
        return _Sums(level, (weighted * levels).sum(dim=1), product)

    def solve(self, sums: _Sums) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The least squares step and offset of each group."""
        if sums.level is None:
            return _ratio(sums.product, sums.square), None
        assert self.sum_x is not None
        determinant = self.sum_1 * sums.square - sums.level**2
        step = _ratio(self.sum_1 * sums.product - sums.level * self.sum_x, determinant)
        offset = (step * sums.level - self.sum_x) / self.sum_1
        if self.kind.min_range:
            bound = offset < 0
            step = torch.where(bound, _ratio(sums.product, sums.square), step)
            offset = offset.masked_fill(bound, 0.0)
        return step, offset

    def loss(self, sums: _Sums, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """The squared error of each group, less that of zeros, which does not depend on the grid."""
        found = step * (step * sums.square - 2 * sums.product)
        if offset is not None:
            assert self.sum_x is not None and sums.level is not None
            found += offset * (2 * self.sum_x + offset * self.sum_1 - 2 * step * sums.level)
        return found

    def error(self, levels: torch.Tensor, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """The squared error of each group, [groups, rows]; the levels are used up."""
        levels.mul_(step[:, None])
        if offset is not None:
            levels.sub_(offset[:, None])
        difference = levels.sub_(self.x)
        square = difference * difference
        return (square if self.weights is None else square.mul_(self.weights)).sum(dim=1)

    def starts(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Steps and offsets to begin with: so many steps to the range, or to the largest value on either side."""
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        if self.kind.minimum:
            least, most = self.x.amin(dim=1), self.x.amax(dim=1)
            if self.kind.min_range:
                least = least.clamp(max=0.0)
            middle, span = (least + most) / 2, (most - least).clamp(min=0.0)
            for steps in _counts(self.kind.top, self.kind.bits):
                step = span / steps
                offset = -least if steps < self.kind.top else step * (self.kind.top / 2) - middle
                found.append((step, offset.clamp(min=self.least)))
            return [*found[:-1], (span / self.kind.top, -least)]  # the plain range
        index = self.x.abs().argmax(dim=1, keepdim=True)
        largest = self.x.gather(1, index)[:, 0]  # with its sign
        low, high = self.kind.levels
        for end in (low, high):  # the level that the largest value gets
            signs = _counts(abs(end), self.kind.bits, 6.0 if self.kind.table else 0.5)
            found += [(largest / (steps if end > 0 else -steps), None) for steps in signs]
        return [*found, (largest / low, None)]  # the plain range

    def free(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best step and offset of every group as real numbers."""
        best: tuple[torch.Tensor, torch.Tensor | None] | None = None
        least = torch.full_like(self.x[:, 0], float("inf"))
        for step, offset in self.starts():
            for _ in range(2):
                sums = self.sums(self.levels(step, offset))
                step, offset = self.solve(sums)
            loss = self.loss(sums, step, offset)
            if best is None:
                best, least = (step, offset), loss
                continue
            better = loss < least
            if self.kind.scale_range is not None:  # a larger step makes those of its super-block coarser
                better &= (step.abs() <= best[0].abs()) | (loss < least - MARGIN * (self.sum_xx + least))
            best, least = _keep(better, (step, offset), best), torch.where(better, loss, least)
        assert best is not None
        for _ in range(ROUNDS):
            best = self.solve(self.sums(self.levels(*best)))
        return best

    def in_blocks(self, step: torch.Tensor, offset: torch.Tensor | None) -> Fitted:
        """Step and offset as float16 holds them, alternated with the levels from there on, and from the plain range."""
        best: tuple[torch.Tensor, torch.Tensor | None] | None = None
        least = torch.full_like(step, float("inf"))
        for start in ((step, offset), self.starts()[-1]):
            step, offset = start
            for _ in range(STORED_ROUNDS):
                step, offset = half(step), None if offset is None else half(offset)
                levels = self.levels(step, offset)
                sums = self.sums(levels)
                error = self.error(levels, step, offset)
                best = (step, offset) if best is None else _keep(error < least, (step, offset), best)
                least = torch.minimum(error, least)
                step, offset = self.solve(sums)
                if offset is not None:  # the best one beside the step as it will be stored
                    offset = self._offset(sums, half(step))
        assert best is not None
        return Fitted(best[0], best[1], None, None)

    def in_super_blocks(self, step: torch.Tensor, offset: torch.Tensor | None) -> Fitted:
        """Integer scales and minima of the groups under one ``d`` and ``dmin`` a super-block: from those that the
        group of the largest step asks for, and from what is best among some more for the levels as they are."""
        sums = self.sums(self.levels(step, offset))
        first = self._under(step, offset, SHARES[0], sums)
        other, least = first, self._total(self.loss(sums, first.steps(), first.offsets()))
        for share in SHARES:
            for sign in (1, -1) if offset is None else (1,):
                tried = self._under(step, offset, sign * share, sums)
                loss = self._total(self.loss(sums, tried.steps(), tried.offsets()))
                other, least = _keep_fitted(loss < least, tried, other), torch.minimum(loss, least)
        best, error = self._descend(first)
        again, lower = self._descend(other)
        return _keep_fitted(lower < error, again, best)

    def _under(self, step: torch.Tensor, offset: torch.Tensor | None, share: float, sums: _Sums) -> Fitted:
        """Integers for steps and offsets, where the largest step gets ``share`` of the largest integer or, beyond 1,
        is cut down to it; minima for the steps as they then are."""
        kind = self.kind
        assert kind.scale_range is not None
        low, high = kind.scale_range
        by_block = step.view(-1, kind.block // kind.group, step.shape[-1])
        if offset is None or kind.min_range is None:
            largest = by_block.gather(1, by_block.abs().argmax(dim=1, keepdim=True))[:, 0]
            d = half(largest / (low * share))
            return Fitted(d, None, _integers(step, d, kind.scale_range), None)
        d = half(by_block.amax(dim=1) / (high * share))
        dmin = half(offset.view(by_block.shape).amax(dim=1) / (kind.min_range[1] * min(share, 1.0)))
        scales = _integers(step, d, kind.scale_range)
        return Fitted(d, dmin, scales, _integers(self._offset(sums, _times(d, scales)), dmin, kind.min_range))

    def _offset(self, sums: _Sums, step: torch.Tensor) -> torch.Tensor:
        """The least squares offset beside a step that is given."""
        assert sums.level is not None and self.sum_x is not None
        return (step * sums.level - self.sum_x) / self.sum_1

    def _total(self, groups: torch.Tensor) -> torch.Tensor:
        """Sums over the groups of each super-block, [blocks, rows]."""
        return groups.view(-1, self.kind.block // self.kind.group, groups.shape[-1]).sum(dim=1)

    def _descend(self, found: Fitted) -> tuple[Fitted, torch.Tensor]:
        """Levels, integers, d and dmin in turn; the best of all steps, and its error [blocks, rows]."""
        best, least = found, torch.full_like(found.d, float("inf"))
        for _ in range(STORED_ROUNDS):
            step, offset = found.steps(), found.offsets()
            levels = self.levels(step, offset)
            sums = self.sums(levels)
            error = self._total(self.error(levels, step, offset))
            best, least = _keep_fitted(error < least, found, best), torch.minimum(error, least)
            found = self._refit(sums, self._neighbours(sums, found))
        return best, least

    def _neighbours(self, sums: _Sums, held: Fitted) -> Fitted:
        """The integers around each group's least squares scale that give the least error for these levels."""
        kind = self.kind
        assert kind.scale_range is not None and held.scales is not None
        best = (held.scales, held.minima)
        least = self.loss(sums, held.steps(), held.offsets())
        ideal = _integers(self.solve(sums)[0], held.d, kind.scale_range)
        for move in (-1, 0, 1):
            scales = (ideal + move).clamp(*kind.scale_range)
            minima, step = None, _times(held.d, scales)
            if held.dmin is not None and kind.min_range is not None:
                minima = _integers(self._offset(sums, step), held.dmin, kind.min_range)
            tried = Fitted(held.d, held.dmin, scales, minima)
            loss = self.loss(sums, step, tried.offsets())
            best = _keep(loss < least, (scales, minima), best)
            least = torch.minimum(loss, least)
        return Fitted(held.d, held.dmin, *best)

    def _refit(self, sums: _Sums, held: Fitted) -> Fitted:
        """The least squares ``d`` and ``dmin`` of every super-block for these levels and integers, as float16."""
        scales, minima, d, dmin = held.scales, held.minima, held.d, held.dmin
        assert scales is not None
        a, e = self._total(scales * scales * sums.square), self._total(scales * sums.product)
        if minima is None or dmin is None:
            return Fitted(half(torch.where(a > 0, e / a.clamp(min=1e-38), d)), None, scales, None)
        assert sums.level is not None and self.sum_x is not None
        b = self._total(scales * minima * sums.level)
        c, f = self._total(minima * minima * self.sum_1), self._total(minima * self.sum_x)
        determinant = a * c - b * b
        sound = determinant > 1e-6 * a * c
        safe = determinant.masked_fill(~sound, 1.0)
        # where only one of them can be told, d is fitted alone
        new_d = torch.where(
            sound, (c * e - b * f) / safe, torch.where(a > 0, (e + dmin * b) / a.clamp(min=1e-38), d)
        )
        new_dmin = torch.where(sound, (b * e - a * f) / safe, dmin)
        negative = (new_d < 0) | (new_dmin < 0)
        return Fitted(
            half(torch.where(negative, d, new_d)), half(torch.where(negative, dmin, new_dmin)), scales, minima
        )


# By bits: by how many steps more than there are levels a range is cut to begin with, the largest values being cut off
# then, and how many such numbers of steps are tried.
CLIPPED = {2: 4.0, 3: 5.0, 4: 5.0, 5: 4.0, 6: 2.0, 8: 2.0}
STARTS = {2: 12, 3: 6, 4: 6, 5: 6, 6: 6, 8: 6}


def _counts(levels: int, bits: int, share: float = 1.0) -> list[float]:
    """Numbers of steps that a range is cut into to begin with: from one less than there are to ``share`` of the usual
    ones more, and last as many as there are."""
    first, count = levels - 1, STARTS[bits]
    return [*(first + (1 + share * CLIPPED[bits]) * i / (count - 1) for i in range(count)), levels]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-38), 0.0)


def _integers(values: torch.Tensor, d: torch.Tensor, bounds: tuple[int, int]) -> torch.Tensor:
    """``values`` [groups, rows] over their super-block's ``d`` [blocks, rows], as whole numbers within bounds."""
    blocks, rows = d.shape
    found = (values.view(blocks, -1, rows) * inverse(d)[:, None]).round_().clamp_(*bounds)
    return found.view(-1, rows)


_Parts = tuple[torch.Tensor, torch.Tensor | None]


def _keep(better: torch.Tensor, new: _Parts, old: _Parts) -> _Parts:
    """The new parts where they are better."""
    return tuple(None if o is None else torch.where(better, n, o) for n, o in zip(new, old, strict=True))  # type: ignore[return-value]


def _keep_fitted(better: torch.Tensor, new: Fitted, old: Fitted) -> Fitted:
    """Super-blocks of the new one where it is better, [blocks, rows]."""

    def groups(n: torch.Tensor | None, o: torch.Tensor | None) -> torch.Tensor | None:
        if n is None or o is None:
            return None
        blocks, rows = better.shape
        return torch.where(better[:, None], n.view(blocks, -1, rows), o.view(blocks, -1, rows)).view(-1, rows)

    return Fitted(
        torch.where(better, new.d, old.d),
        None if new.dmin is None or old.dmin is None else torch.where(better, new.dmin, old.dmin),
        groups(new.scales, old.scales),
        groups(new.minima, old.minima),
    )
