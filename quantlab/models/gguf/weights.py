"""Tensors of a GGUF file as the model they are of has them: decoded when they are read, llama.cpp's changes undone.

``gguf.quants.dequantize`` decodes blocks of quantized numbers to float32 in NumPy. Only the rows that are asked for are
read and decoded, some at a time, so that no more than one tensor is ever in memory. No torch.

llama.cpp pairs the numbers that its rotary embedding turns together as neighbours, transformers half a head apart; so
the rows of Llama's query and key matrices are stored in the former's order. In a head of ``d`` rows, row ``2 i + j`` of
the file is row ``j d/2 + i`` of the model (``LlamaModel.permute`` of ``convert_hf_to_gguf.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import DataError
from quantlab.models.gguf.header import Header, Stored, ggml_type, stamp_of

PIECE = 2**22  # numbers that are decoded together


@dataclass(frozen=True)
class GgufTensor:
    """Reads one tensor. ``shape`` is the model's, ``start`` its first byte in ``file``, ``kind`` its ggml type.
    ``head``: rows of a head where heads are reordered, else 0. ``shift``: what is to be taken from every value.
    ``stamp``: time and size of the file when its header was read."""

    file: Path
    stamp: tuple[int, int]
    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    head: int = 0
    shift: float = 0.0

    def read(self, rows: slice | None = None) -> NDArray[np.float32]:
        """float32 [``shape``], or only contiguous ``rows`` of it.

        Raises:
            DataError: the file cannot be read, or changed since it was opened.
        """
        count = self.shape[0] if len(self.shape) > 1 else 1
        width = math.prod(self.shape) // count
        first, last, _ = rows.indices(self.shape[0]) if rows is not None else (0, self.shape[0], 1)
        last = max(first, last)
        if len(self.shape) == 1:  # a row that is read whole
            return self._decoded(0, 1, width)[0][first:last]
        if not self.head:
            found = self._decoded(first, last, width)
        else:
            places = self._places(first, last)
            lowest = int(places.min()) if len(places) else 0
            highest = int(places.max()) + 1 if len(places) else 0
            found = self._decoded(lowest, highest, width)[places - lowest]
        return found.reshape(last - first, *self.shape[1:])

    def packed(self) -> NDArray[np.uint8]:
        """The blocks of a matrix as the file has them, uint8 [rows, row_bytes], its rows in the model's order.

        Raises:
            DataError: as :meth:`read`.
        """
        rows = math.prod(self.shape[:-1])
        found = self._bytes(0, rows, self.shape[-1])
        return found[self._places(0, rows)] if self.head else found

    def _places(self, first: int, last: int) -> NDArray[np.int64]:
        """Rows of the file that hold rows ``first`` to ``last`` of the model."""
        head, inside = np.divmod(np.arange(first, last), self.head)
        half, place = np.divmod(inside, self.head // 2)
        found: NDArray[np.int64] = head * self.head + 2 * place + half
        return found

    def _decoded(self, first: int, last: int, width: int) -> NDArray[np.float32]:
        """Rows of the file, float32 [last - first, width]."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        found = np.empty((last - first, width), np.float32)
        step = max(1, PIECE // width)
        with np.errstate(all="ignore"):  # NaN is told by who looks for it
            for row in range(first, last, step):
                data = self._bytes(row, min(row + step, last), width)
                values = dequantize(data, GGMLQuantizationType(self.kind))
                np.subtract(values, self.shift, out=found[row - first : row - first + len(data)])
        return found

    def _bytes(self, first: int, last: int, width: int) -> NDArray[np.uint8]:
        """Rows of the file as they are, uint8 [last - first, row_bytes]."""
        _, block, block_bytes = ggml_type(self.kind, self.name)
        row_bytes = width // block * block_bytes
        try:
            if stamp_of(self.file) != self.stamp:
                raise DataError(f"{self.file} changed while it was in use")
            with self.file.open("rb") as stream:
                stream.seek(self.start + first * row_bytes)
                data = np.frombuffer(stream.read((last - first) * row_bytes), np.uint8)
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror or error}") from error
        if len(data) < (last - first) * row_bytes:
            raise DataError(f"{self.file} ends early, inside {self.name}")
        return data.reshape(last - first, row_bytes)


def whole(header: Header, stored: Stored) -> GgufTensor:
    """A tensor as the file has it."""
    return GgufTensor(header.file, header.stamp, stored.name, stored.kind, stored.shape, stored.start)
