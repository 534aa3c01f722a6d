"""Weights to blocks: the scale search, codes to nearest, tile by tile.

``encode`` is what round-to-nearest into a GGUF file is; the column solver (``quant/methods/gptq_blocks.py``) uses the
same search and rounds the codes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantlab.formats.gguf.levels import Levels
from quantlab.formats.gguf.pack import Blocks, pack
from quantlab.formats.gguf.scale_search import Fitted, fit, nearest, positive
from quantlab.registry.block_types import BlockType

TILE = 1 << 18  # weights searched at once; some ten temporaries of this size


def encode(weight: torch.Tensor, kind: BlockType, importance: torch.Tensor | None = None) -> Blocks:
    """The blocks of ``weight`` [rows, columns] that minimise ``sum_ij importance_j (w_ij - q_ij)^2``.

    Args:
        importance: [columns], as mean squared activations; None weighs all columns alike.

    Raises:
        ValueError: rows that are not made of whole blocks, NaN or infinite weights, weights beyond float16's range.
    """
    columns = weight.shape[1]
    kind.row_bytes(columns)
    weights = None if importance is None else positive(importance)
    across = min(columns, max(kind.block, TILE // 64 // kind.block * kind.block))
    down = max(1, TILE // across)
    strips = []
    for tall in weight.split(down):
        tiles = []
        for start in range(0, columns, across):
            part = slice(start, min(start + across, columns))
            x = tall[:, part].t().to(torch.float32).contiguous()  # [columns, rows]
            fitted = fit(x, kind, None if weights is None else weights[part])
            tiles.append(blocks_of(_codes(x, fitted, kind), fitted, kind))
        strips.append(join(tiles, dim=1))
    return join(strips, dim=0)


def encode_rows(
    read: Callable[[slice], torch.Tensor], shape: Sequence[int], kind: BlockType, at_once: int = 2048
) -> torch.Tensor:
    """The bytes of a matrix of ``shape`` that is ``read`` a few rows at a time, uint8 [rows, row_bytes]."""
    parts = [slice(start, min(start + at_once, shape[0])) for start in range(0, shape[0], at_once)]
    return torch.cat([pack(encode(read(part), kind)) for part in parts])


def _codes(x: torch.Tensor, fitted: Fitted, kind: BlockType) -> torch.Tensor:
    """Nearest codes uint8 [columns, rows]."""
    grid = Levels(kind, x.device)
    levels = nearest(x.view(-1, kind.group, x.shape[1]), grid, fitted.steps(), fitted.offsets())
    return grid.codes(levels).view(x.shape)


def blocks_of(codes: torch.Tensor, fitted: Fitted, kind: BlockType) -> Blocks:
    """Transposed codes uint8 [columns, rows] and their scales, as rows of blocks."""
    integers = [
        None if part is None else part.t().to(torch.int16).contiguous()
        for part in (fitted.scales, fitted.minima)
    ]
    dmin = None if fitted.dmin is None else fitted.dmin.t().contiguous()
    return Blocks(kind, codes.t().contiguous(), fitted.d.t().contiguous(), dmin, *integers)


def join(parts: list[Blocks], dim: int) -> Blocks:
    """Matrices beside (1) or below (0) one another as one."""
    if len(parts) == 1:
        return parts[0]

    def together(name: str) -> torch.Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found, dim=dim)

    names = ("codes", "d", "dmin", "scales", "minima")
    return Blocks(parts[0].kind, *(together(name) for name in names))  # type: ignore[arg-type]
