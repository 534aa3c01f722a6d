"""What names an importance matrix that stands in place of a calibration text (no torch)."""

from __future__ import annotations

from pathlib import Path

from quantlab.errors import DataError
from quantlab.paths import file_digest


def imatrix_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file_digest(path)[:16]
    except OSError as error:
        raise DataError(
            f"calibration.imatrix: cannot read {path}: {error.strerror or error}",
            hint="give a file of llama-imatrix, or of --save-imatrix",
        ) from error
