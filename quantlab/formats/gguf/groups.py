"""Block types as groups of integer codes, and back, without rounding anything again.

Blocks of 32 columns with one float16 scale hold a group of 32, and a larger one as several blocks of one scale. ``d *
level`` is exactly ``scale * (code - zero)`` for the level ``code - zero``, so that Q5_0, whose levels go from -16 to
15, holds every 4-bit grid with integer zeros, and Q4_0 every one of 3 bits. Q4_1 and Q5_1 store ``-scale * zero`` in
float16 instead of the zero, which is exact for some zeros only.

The other way the scales of super-blocks are float16 numbers times small integers, which float16 seldom holds, and
their minima are no whole number of steps.
"""

from __future__ import annotations

import torch

from quantlab.formats.codes import Codes, refit, rounding_error, zeros_for
from quantlab.formats.gguf.pack import Blocks, code_levels
from quantlab.registry.block_types import BLOCK_TYPES, BlockType

# Types with one scale a block, least bits first.
SIMPLE: tuple[BlockType, ...] = tuple(
    sorted(
        (kind for kind in BLOCK_TYPES.values() if kind.scale_range is None and not kind.table),
        key=lambda kind: kind.bits_per_weight,
    )
)
LARGEST_ZERO = 2**15  # steps; a group so far from zero is not one of integer zeros but of chance


def codes_of(blocks: Blocks) -> Codes:
    """The integer codes of blocks.

    Raises:
        ValueError: their minima are not a whole number of steps, or a scale is no number.
    """
    kind, scales, offsets = blocks.kind, blocks.steps(), blocks.offsets()
    codes, bits, zero = blocks.codes, kind.bits, -kind.low
    if kind.table:  # unevenly spaced, but at whole numbers
        codes, bits, zero = (code_levels(codes, kind).to(torch.int16) + 128).to(torch.uint8), 8, 128
    zeros = torch.full(scales.shape, zero, dtype=torch.int32)
    if not bool(scales.isfinite().all()) or (offsets is not None and not bool(offsets.isfinite().all())):
        raise ValueError("it holds a scale that is no number: the file is damaged")
    if offsets is not None:
        steps = torch.where(scales == 0, torch.ones_like(scales), scales)
        found = (offsets / steps).round()
        whole = (found * scales == offsets) & (found.abs() <= LARGEST_ZERO)
        if not bool(whole.all()):
            share = 1 - whole.to(torch.float64).mean().item()
            raise ValueError(
                f"the minima of {share:.1%} of its groups are no whole number of steps, as zeros of integer codes are"
            )
        zeros = found.to(torch.int32)
    group_of = torch.arange(codes.shape[1]) // kind.group
    return Codes(codes, scales.contiguous(), zeros, group_of, bits)


def block_error(
    scales: torch.Tensor, zeros: torch.Tensor, low: torch.Tensor, high: torch.Tensor, kind: BlockType
) -> float | None:
    """How far a scale or minimum of groups is off in blocks of a type of :data:`SIMPLE`, relative to itself: float16
    does not hold every one. None where the codes do not hold the levels from ``low`` to ``high``. All [out, groups]."""
    if not kind.minimum:
        if int(low.min()) < kind.low or int(high.max()) > kind.low + kind.top:
            return None
        return rounding_error(scales, torch.float16)
    fitted = zeros_for(zeros, low, high, kind.bits, symmetric=False)
    if fitted is None:
        return None
    return max(rounding_error(scales, torch.float16), rounding_error(fitted * scales, torch.float16))


def blocks_of(held: Codes, kind: BlockType) -> Blocks:
    """The same weights in blocks of a type of :data:`SIMPLE`, but for what :func:`block_error` says.

    Raises:
        ValueError: as :func:`no_blocks`, or the codes do not hold them.
    """
    if reason := no_blocks(held):
        raise ValueError(reason)
    # Symmetric codes of as many bits stand for the levels of every type without minima.
    fitted = refit(held, kind.bits, symmetric=not kind.minimum)
    if fitted is None:
        raise ValueError(f"its levels are beyond the codes of {kind.name}")
    repeat = held.width // kind.group
    d = fitted.scales.repeat_interleave(repeat, dim=1)
    offsets = (fitted.zeros * fitted.scales).repeat_interleave(repeat, dim=1)
    return Blocks(kind, fitted.codes, d, offsets if kind.minimum else None)


def no_blocks(held: Codes) -> str:
    """Why groups cannot be blocks of 32 columns; empty where they can."""
    if not held.ordered:
        return "its columns are out of order (act_order), and blocks are neighbouring columns"
    if held.columns % 32:
        return f"its {held.columns} inputs are not divisible by 32, the least block of a GGUF file"
    if held.width % 32:
        return f"its groups of {held.width} columns are not made of whole blocks of 32"
    return ""
