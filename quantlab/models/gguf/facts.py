"""The keys of a GGUF header as checked values (no torch). A key of an architecture is asked for without its prefix:
``embedding_length`` for ``llama.embedding_length``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlab.errors import DataError

LARGEST = 2**31 - 1  # of a count; sizes are compared with the tensors besides


class Facts:
    """``architecture`` is what the file calls itself, ``called`` how messages call the file."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, called: str) -> None:
        self.metadata, self.architecture, self.called = metadata, architecture, called

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; one number a block is as good where all are the same.

        Raises:
            DataError: anything else, or nothing without a ``default``.
        """
        value = self._value(key)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise self._refusal(key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as short as its 32 bits allow: 1e-05 for what float32 makes of it.

        Raises:
            DataError: anything else, or nothing without a ``default``.
        """
        value = self._value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refusal(key, value, "a number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str = "") -> str:
        """A text.

        Raises:
            DataError: anything else.
        """
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._refusal(key, value, "a text")
        return value

    def has(self, key: str) -> bool:
        return self._value(key) is not None

    def flags(self, key: str) -> list[bool] | None:
        """A list of truth values; None where there is none."""
        value = self._value(key)
        return [bool(one) for one in value] if isinstance(value, np.ndarray) else None

    def _value(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def _refusal(self, key: str, value: Any, expected: str) -> DataError:
        said = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return DataError(f"{self.called}: {self.architecture}.{key} {said}, expected {expected}")
