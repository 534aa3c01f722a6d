"""One look at every stored weight for NaN and infinity, the last check before any work (no torch).

A floating-point number is NaN or infinite when all bits of its exponent are set (IEEE 754; float8 E4M3 has one pattern
for NaN and none for infinity, arXiv:2209.05433), so bytes are compared and nothing is converted. Files are read in
pieces, at the speed of the disk.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

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
    for file in files.weight_files:
        found = file.stat()
        bad = _first_bad(file, found.st_mtime_ns, found.st_size)
        if bad is not None:
            raise DataError(
                f"{files.name}: {bad}", hint="fetch it again, or look at how it was trained and saved"
            )


@lru_cache(maxsize=1024)
def _first_bad(file: Path, mtime: int, size: int) -> str | None:
    """What is wrong with the first bad tensor of a file; its time and size are part of the key, so that a file is read
    once a process unless it changes."""
    for info in sorted(read_header(file).values(), key=lambda info: info.start):
        if info.dtype in EXPONENTS and (places := _nonfinite(info)):
            count, first = places
            index = [int(i) for i in np.unravel_index(first, info.shape)] if info.shape else []
            values = "value is" if count == 1 else "values are"
            return f"{file.name}: {count} {values} NaN or infinite in {info.name}, the first at {index}"
    return None


def _nonfinite(info: TensorInfo) -> tuple[int, int] | None:
    """How many numbers of a tensor are not finite, and the place of the first; None where all are."""
    kind, mask = EXPONENTS[info.dtype]
    bits = kind(mask)
    count, first = 0, -1
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            for start in range(0, info.count, PIECE):
                size = min(PIECE, info.count - start) * bits.nbytes
                piece = np.frombuffer(stream.read(size), dtype=np.dtype(kind).newbyteorder("<"))
                bad = (piece & bits) == bits
                if bad.any():
                    first = start + int(bad.argmax()) if first < 0 else first
                    count += int(bad.sum())
    except OSError as error:
        raise DataError(f"cannot read {info.file}: {error.strerror or error}") from error
    return (count, first) if count else None
