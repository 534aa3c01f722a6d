"""Rounding to the levels of a block type: evenly spaced ones, or those of a table."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch

from quantlab.registry.block_types import BlockType

HALVES = 256  # twice what the levels of a table reach at most


class Levels:
    """The levels of ``kind``, for tensors on ``device``. Levels are float32, codes uint8."""

    def __init__(self, kind: BlockType, device: torch.device) -> None:
        self.kind = kind
        self.low, self.high = (float(level) for level in kind.levels)
        if kind.table:
            codes = torch.tensor(_code_of_half(kind.table), dtype=torch.uint8, device=device)
            self.of_code = torch.tensor(kind.table, dtype=torch.float32, device=device)
            self.of_half = self.of_code[codes.int()]
            self.code_of_level = codes[::2].contiguous()  # from -HALVES / 2 up

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The levels nearest to values in steps of the grid, which are used up."""
        if self.kind.table:
            halves = scaled.mul_(2).ceil_().clamp_(-HALVES, HALVES - 1).add_(HALVES)
            return self.of_half.index_select(0, halves.int().flatten()).view(scaled.shape)
        return scaled.round_().clamp_(self.low, self.high)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes of levels; between those of a table, of the nearest."""
        if self.kind.table:
            index = (levels + HALVES // 2).int().flatten()
            return self.code_of_level.index_select(0, index).view(levels.shape)
        return (levels - self.kind.low).to(torch.uint8)

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels of codes."""
        if self.kind.table:
            return self.of_code.index_select(0, codes.int().flatten()).view(codes.shape)
        return codes.to(torch.float32).add_(self.kind.low)


@lru_cache
def _code_of_half(table: tuple[int, ...]) -> tuple[int, ...]:
    """The code nearest to every half from ``-HALVES / 2`` up. Borders between integers are whole halves, so a value and
    the next half above it are on the same side of each."""
    borders = [low + high for low, high in itertools.pairwise(table)]  # in halves
    return tuple(sum(border < half for border in borders) for half in range(-HALVES, HALVES))
