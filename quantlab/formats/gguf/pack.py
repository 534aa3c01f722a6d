"""Codes and scales of a block type to its bytes, and back.

``pack`` and ``unpack`` are exact inverses on the bytes; ``Blocks.dequantize`` computes in float32, in the order of
operations of the ``gguf`` package (and of llama.cpp), so that values agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantlab.registry.block_types import BlockType


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix. ``codes`` uint8 [rows, columns]; ``d`` float32 [rows, blocks], values that float16 holds, and
    ``dmin`` likewise where the type has minima; ``scales`` and ``minima`` int16 [rows, groups], where the type has
    integer ones."""

    kind: BlockType
    codes: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def steps(self) -> torch.Tensor:
        """What one level is worth in each group, float32 [rows, groups]."""
        return _spread(self.d, self.scales)

    def offsets(self) -> torch.Tensor | None:
        """What is taken off every value of a group, float32 [rows, groups]; None where nothing is."""
        return None if self.dmin is None else _spread(self.dmin, self.minima)

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [rows, columns]."""
        rows, columns = self.codes.shape
        steps, offsets = self.steps()[..., None], self.offsets()
        values = code_levels(self.codes, self.kind).view(rows, -1, self.kind.group) * steps
        if offsets is not None:
            values -= offsets[..., None]
        return values.view(rows, columns)

    def split(self, sizes: Sequence[int]) -> list[Blocks]:
        """Cut along the rows into parts of so many."""
        names = ("codes", "d", "dmin", "scales", "minima")
        held = (getattr(self, name) for name in names)
        cut = [[None] * len(sizes) if part is None else part.split(list(sizes)) for part in held]
        return [Blocks(self.kind, *parts) for parts in zip(*cut, strict=True)]


def _spread(d: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
    if integers is None:
        return d
    rows, blocks = d.shape
    return (d[..., None] * integers.view(rows, blocks, -1).to(torch.float32)).view(rows, -1)


def code_levels(codes: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The levels, float32, that ``codes`` (of any shape) stand for."""
    if kind.table:
        return torch.tensor(kind.table, dtype=torch.float32, device=codes.device)[codes.long()]
    return codes.to(torch.float32).add_(kind.low)


def pack(blocks: Blocks) -> torch.Tensor:
    """The bytes of a matrix, uint8 [rows, row_bytes], as they stand in a file."""
    kind = blocks.kind
    rows, columns = blocks.codes.shape
    kind.row_bytes(columns)
    count = columns // kind.block
    codes = blocks.codes.view(rows, count, kind.block)
    fields = {plane.field: _pack_plane(codes, plane.shift, plane.bits, plane.stride) for plane in kind.planes}
    if kind.bits == 8:  # stored as signed bytes, two's complement
        fields["qs"] = (codes.to(torch.int16) + kind.low).to(torch.int8).view(torch.uint8)
    fields["d"] = _half(blocks.d)
    if blocks.dmin is not None:
        fields["dmin"] = _half(blocks.dmin if kind.min_range else -blocks.dmin)
    if blocks.scales is not None:
        minima = None if blocks.minima is None else blocks.minima.view(rows, count, -1)
        fields["scales"] = _pack_scales(blocks.scales.view(rows, count, -1), minima, kind)
    return torch.cat([fields[name] for name, _ in kind.fields], dim=-1).view(rows, -1)


def unpack(packed: torch.Tensor, kind: BlockType) -> Blocks:
    """The inverse of :func:`pack`: ``packed`` uint8 [rows, row_bytes].

    Raises:
        ValueError: a row is not made of whole blocks.
    """
    rows, size = packed.shape
    if size % kind.bytes:
        raise ValueError(
            f"rows of {size} bytes are not whole blocks of {kind.bytes}, of which {kind.name} is made"
        )
    parts = packed.view(rows, -1, kind.bytes).split([size for _, size in kind.fields], dim=-1)
    fields = {name: part for (name, _), part in zip(kind.fields, parts, strict=True)}
    if kind.bits == 8:
        codes = (fields["qs"].contiguous().view(torch.int8).to(torch.int16) - kind.low).to(torch.uint8)
    else:
        codes = torch.zeros(rows, size // kind.bytes, kind.block, dtype=torch.uint8, device=packed.device)
        for plane in kind.planes:
            codes |= _unpack_plane(fields[plane.field], plane.bits, plane.stride) << plane.shift
    dmin = scales = minima = None
    if kind.minimum:
        dmin = _float(fields["dmin"]) if kind.min_range else -_float(fields["dmin"])
    if kind.scale_range is not None:
        scales, minima = _unpack_scales(fields["scales"], kind)
        scales = scales.reshape(rows, -1)
        minima = None if minima is None else minima.reshape(rows, -1)
    return Blocks(kind, codes.view(rows, -1), _float(fields["d"]), dmin, scales, minima)


def _half(values: torch.Tensor) -> torch.Tensor:
    """float32 [rows, blocks] as the bytes of float16, uint8 [rows, blocks, 2]."""
    return values.to(torch.float16).reshape(-1).view(torch.uint8).view(*values.shape, 2)


def _float(field: torch.Tensor) -> torch.Tensor:
    return field.reshape(-1).view(torch.float16).view(field.shape[:-1]).to(torch.float32)


def _pack_plane(codes: torch.Tensor, shift: int, bits: int, stride: int) -> torch.Tensor:
    """Some bits of codes uint8 [rows, blocks, block] as the bytes of a field; see :class:`Plane`."""
    a_byte = 8 // bits
    parts = ((codes >> shift) & (2**bits - 1)).view(*codes.shape[:2], -1, a_byte, stride)
    found = torch.zeros_like(parts[..., 0, :])
    for j in range(a_byte):
        found |= parts[..., j, :] << (bits * j)
    return found.reshape(*codes.shape[:2], -1)


def _unpack_plane(field: torch.Tensor, bits: int, stride: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device)[:, None]
    parts = field.reshape(*field.shape[:2], -1, 1, stride) >> shifts & (2**bits - 1)
    return parts.reshape(*field.shape[:2], -1)


def _pack_scales(scales: torch.Tensor, minima: torch.Tensor | None, kind: BlockType) -> torch.Tensor:
    """Integer scales and minima int16 [rows, blocks, groups] as the bytes of the field ``scales``."""
    if kind.name == "Q6_K":
        return scales.to(torch.int8).view(torch.uint8)
    if kind.name == "Q3_K":  # the low four bits of two scales a byte, then the high two bits of four
        all_bits = (scales + 32).to(torch.uint8)
        low, high = all_bits & 15, all_bits >> 4
        first = low[..., :8] | low[..., 8:] << 4
        second = high[..., :4] | high[..., 4:8] << 2 | high[..., 8:12] << 4 | high[..., 12:] << 6
        return torch.cat([first, second], dim=-1)
    assert minima is not None
    scale, minimum = scales.to(torch.uint8), minima.to(torch.uint8)
    if kind.name == "Q2_K":
        return scale | minimum << 4
    # Six bits of the first four scales and minima; above them the high bits of the last four, whose low bits follow.
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    third = scale[..., 4:] & 15 | (minimum[..., 4:] & 15) << 4
    return torch.cat([first, second, third], dim=-1)


def _unpack_scales(field: torch.Tensor, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind.name == "Q6_K":
        return field.contiguous().view(torch.int8).to(torch.int16), None
    if kind.name == "Q3_K":
        low = torch.cat([field[..., :8] & 15, field[..., :8] >> 4], dim=-1)
        high = torch.cat([field[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        return (low | high << 4).to(torch.int16) - 32, None
    if kind.name == "Q2_K":
        return (field & 15).to(torch.int16), (field >> 4).to(torch.int16)
    first, second, third = field.split(4, dim=-1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return scales.to(torch.int16), minima.to(torch.int16)
