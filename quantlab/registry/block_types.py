"""The block types of ggml that quantlab writes: one literal table (no torch).

A row of a weight matrix is cut into blocks of ``block`` columns. A block holds one float16 scale ``d`` (and
``dmin``), and where it is a super-block also a small integer scale (and minimum) for each of its groups of ``group``
columns. A weight is

    d * scale * level - dmin * minimum

where ``level`` is ``code + low`` for the stored code of ``bits`` bits, or the entry of ``table`` that the code numbers.
Types without integer scales take 1 for them. Q4_1 and Q5_1 store the smallest value itself, which is ``-dmin``.

Sources: ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp; the k-quants were introduced in its pull request 1684.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Plane(NamedTuple):
    """Some bits of every code of a block, in one field: bits ``shift`` to ``shift + bits`` of the codes. Byte
    ``o * stride + p`` of the field holds, from its lowest bits on, those of columns ``o * stride * k + j * stride + p``
    for ``j`` in ``0 .. k - 1``, where ``k = 8 / bits`` codes fit a byte."""

    field: str
    shift: int
    bits: int
    stride: int


@dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    number: as GGUF files name it. block: columns of a block. group: columns that share a scale and a minimum.
    bits: width of a code. low: the level of code 0. bottom: the least code that is written (Q8_0 uses no -128). table:
    levels by code, where they are not evenly spaced.
    fields: names and bytes of a block's parts, in order. planes: where the codes' bits are.
    scale_range: the integer scales' least and greatest value; None where a scale is ``d`` alone.
    min_range: the same of the integer minima; None where there are none. minimum: whether levels are offset at all.
    fallback: what llama.cpp takes where a row is no multiple of ``block``.
    """

    name: str
    number: int
    block: int
    group: int
    bits: int
    low: int
    fields: tuple[tuple[str, int], ...]
    planes: tuple[Plane, ...]
    scale_range: tuple[int, int] | None = None
    min_range: tuple[int, int] | None = None
    minimum: bool = False
    bottom: int = 0
    table: tuple[int, ...] = ()
    fallback: str = "F16"

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(size for _, size in self.fields)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the greatest level that is written."""
        return (
            (self.table[0], self.table[-1]) if self.table else (self.low + self.bottom, self.low + self.top)
        )

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights.

        Raises:
            ValueError: it is not made of whole blocks.
        """
        if columns % self.block:
            raise ValueError(
                f"{columns} columns are not whole blocks of {self.block}, of which {self.name} is made"
            )
        return columns // self.block * self.bytes


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_NIBBLES = (Plane("qs", 0, 4, 16),)
_FIFTH = (*_NIBBLES, Plane("qh", 4, 1, 1))

BLOCK_TYPES: dict[str, BlockType] = {
    "Q8_0": BlockType(
        "Q8_0", 8, 32, 32, 8, -128, (("d", 2), ("qs", 32)), (Plane("qs", 0, 8, 32),), bottom=1
    ),
    "Q5_1": BlockType(
        "Q5_1", 7, 32, 32, 5, 0, (("d", 2), ("dmin", 2), ("qh", 4), ("qs", 16)), _FIFTH, minimum=True
    ),
    "Q5_0": BlockType("Q5_0", 6, 32, 32, 5, -16, (("d", 2), ("qh", 4), ("qs", 16)), _FIFTH),
    "Q4_1": BlockType("Q4_1", 3, 32, 32, 4, 0, (("d", 2), ("dmin", 2), ("qs", 16)), _NIBBLES, minimum=True),
    "Q4_0": BlockType("Q4_0", 2, 32, 32, 4, -8, (("d", 2), ("qs", 16)), _NIBBLES),
    "IQ4_NL": BlockType("IQ4_NL", 20, 32, 32, 4, 0, (("d", 2), ("qs", 16)), _NIBBLES, table=_IQ4_NL),
    "Q6_K": BlockType(
        "Q6_K", 14, 256, 16, 6, -32,
        (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
        (Plane("ql", 0, 4, 64), Plane("qh", 4, 2, 32)),
        scale_range=(-128, 127), fallback="Q8_0",
    ),
    "Q5_K": BlockType(
        "Q5_K", 13, 256, 32, 5, 0,
        (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
        (Plane("qs", 0, 4, 32), Plane("qh", 4, 1, 32)),
        scale_range=(0, 63), min_range=(0, 63), minimum=True, fallback="Q5_1",
    ),
    "Q4_K": BlockType(
        "Q4_K", 12, 256, 32, 4, 0,
        (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
        (Plane("qs", 0, 4, 32),),
        scale_range=(0, 63), min_range=(0, 63), minimum=True, fallback="Q5_0",
    ),
    "Q3_K": BlockType(
        "Q3_K", 11, 256, 16, 3, -4,
        (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
        (Plane("qs", 0, 2, 32), Plane("hmask", 2, 1, 32)),
        scale_range=(-32, 31), fallback="Q4_0",
    ),
    "Q2_K": BlockType(
        "Q2_K", 10, 256, 16, 2, 0,
        (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)),
        (Plane("qs", 0, 2, 32),),
        scale_range=(0, 15), min_range=(0, 15), minimum=True, fallback="Q4_0",
    ),
}  # fmt: skip

PLAIN_TYPES: dict[str, tuple[int, int]] = {
    "F32": (0, 4),
    "F16": (1, 2),
    "BF16": (30, 2),
}  # number, bytes a weight
