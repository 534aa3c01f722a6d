"""The rounding of the block types of 32 columns as llama.cpp does it without data: the range of each block, to nearest.

Byte for byte what ``quantize_row_*_ref`` of ``ggml-quants.c`` and ``gguf.quants.quantize`` make of the same numbers.
The codes are found with the scale in float32, which is then stored as float16.
"""

from __future__ import annotations

import torch

from quantlab.formats.gguf.pack import Blocks
from quantlab.registry.block_types import BlockType

TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def round_plainly(weight: torch.Tensor, kind: BlockType) -> Blocks:
    """``weight`` float32 [rows, columns] in one of :data:`TYPES`.

    Raises:
        ValueError: another type, or a row that is not made of whole blocks.
    """
    if kind.name not in TYPES:
        raise ValueError(f"{kind.name} has no plain rounding, only {', '.join(TYPES)} have")
    kind.row_bytes(weight.shape[1])
    blocks = weight.view(len(weight), -1, kind.block)  # [rows, blocks, 32]
    dmin = None
    if kind.name == "Q8_0":
        d = blocks.abs().amax(dim=-1) / 127
        scaled = blocks * _inverse(d)
        size = scaled.abs().floor()  # halves go away from zero, as C's roundf has it
        codes = torch.sign(scaled) * (size + (2 * (scaled.abs() - size)).floor()) - kind.low
    elif kind.minimum:
        low = blocks.amin(dim=-1)
        d = (blocks.amax(dim=-1) - low) / kind.top
        dmin = -low
        codes = ((blocks - low[..., None]) * _inverse(d) + 0.5).trunc()
    else:  # the largest weight gets the lowest level, whichever its sign
        largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))[..., 0]
        d = largest / kind.low
        codes = (blocks * _inverse(d) + (0.5 - kind.low)).trunc()
    codes = codes.clamp(0, kind.top).to(torch.uint8)
    return Blocks(kind, codes.view(weight.shape), half(d), None if dmin is None else half(dmin))


def half(values: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to what float16 holds."""
    return values.to(torch.float16).to(torch.float32)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    """``1 / d`` [rows, blocks, 1], 0 where d is."""
    return torch.where(d == 0, 0.0, 1 / d)[..., None]
