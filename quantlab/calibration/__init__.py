"""Calibration text: sources to documents, to tokens, to rows, the same for the same seed everywhere."""

from quantlab.calibration.documents import SEPARATOR, read_texts
from quantlab.calibration.drawing import digest, token_rows

__all__ = ["SEPARATOR", "digest", "read_texts", "token_rows"]
