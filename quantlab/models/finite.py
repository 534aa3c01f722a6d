"""One look at every stored weight for NaN and infinity, the last check before any work (no torch).

A floating-point number is NaN or infinite when all bits of its exponent are set (IEEE 754; float8 E4M3 has one pattern
for NaN and none for infinity, arXiv:2209.05433), so bytes are compared and nothing is converted. Files are read in
pieces, at the speed of the disk. Of a GGUF file the decoded numbers are looked at, of a block with a NaN for its scale
all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import DataError
from quantlab.models.safetensors.files import ModelFiles, TensorInfo, read_header

# The type that a number's bits are read as, and the bits that are all set in NaN and infinity alone.
EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
PIECE = 2**22  # numbers looked at together


def refuse_nonfinite(files: ModelFiles) -> None:
    """Refuse a model with a NaN or an infinity among its weights.

    Raises:
        DataError: names the file, the tensor, how many values are bad and where the first is.
    """
    for bad in (
        [_first_decoded(files)] if files.encoding is not None else map(_first_stored, files.weight_files)
    ):
        if bad is not None:
            raise DataError(
                f"{files.name}: {bad}", hint="fetch it again, or look at how it was trained and saved"
            )


def _first_decoded(files: ModelFiles) -> str | None:
    """What is wrong with the first bad tensor of a GGUF file, found once."""
    if "nonfinite" not in files.memo:
        files.memo["nonfinite"] = _first(files.tensors.values())
    found: str | None = files.memo["nonfinite"]
    return found


def _first_stored(file: Path) -> str | None:
    found = file.stat()
    return _first_in(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1024)
def _first_in(file: Path, mtime: int, size: int) -> str | None:
    """What is wrong with the first bad tensor of a file; its time and size are part of the key, so that a file is read
    once a process unless it changes."""
    return _first(read_header(file).values())


def _first(tensors: Iterable[TensorInfo]) -> str | None:
    for info in sorted(tensors, key=lambda info: info.start):
        if info.dtype in EXPONENTS and (places := _nonfinite(info)):
            count, first = places
            index = [int(i) for i in np.unravel_index(first, info.shape)] if info.shape else []
            values = "value is" if count == 1 else "values are"
            return f"{info.file.name}: {count} {values} NaN or infinite in {info.name}, the first at {index}"
    return None


def _nonfinite(info: TensorInfo) -> tuple[int, int] | None:
    """How many numbers of a tensor are not finite, and the place of the first; None where all are."""
    kind, mask = EXPONENTS[info.dtype]
    bits = kind(mask)
    count, first, start = 0, -1, 0
    try:
        for piece in _pieces(info, np.dtype(kind).newbyteorder("<")):
            bad = (piece & bits) == bits
            if bad.any():
                first = start + int(bad.argmax()) if first < 0 else first
                count += int(bad.sum())
            start += len(piece)
    except OSError as error:
        raise DataError(f"cannot read {info.file}: {error.strerror or error}") from error
    return (count, first) if count else None


def _pieces(info: TensorInfo, kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The bits of all numbers of a tensor, one after the other."""
    if info.reader is not None:
        rows = max(1, PIECE * info.shape[0] // info.count)
        for start in range(0, info.shape[0], rows):
            yield info.reader.read(slice(start, start + rows)).reshape(-1).view(kind)
        return
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        for start in range(0, info.count, PIECE):
            size = min(PIECE, info.count - start) * kind.itemsize
            yield np.frombuffer(stream.read(size), dtype=kind)
