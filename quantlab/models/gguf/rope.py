"""How positions are stretched, from a GGUF file's keys and its tables of frequencies (no torch).

llama.cpp stores the result where Hugging Face's configuration has the rule: Llama 3's factors by frequency lie in a
tensor ``rope_freqs``, LongRoPE's in ``rope_factors_short`` and ``rope_factors_long``. The latter are the rule. For the
former the rule is found that gives them (arXiv:2407.21783; transformers, ``modeling_rope_utils.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlab.errors import DataError
from quantlab.models.gguf.facts import Facts
from quantlab.models.gguf.weights import GgufTensor

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (FREQUENCIES, SHORT, LONG)
# low_freq_factor, high_freq_factor, original context of every Llama 3.1 to 3.3; the factor differs.
LLAMA3 = (1.0, 4.0, 8192)
KEPT = 1e-3  # relative difference of factors that are the same rule's


def rope_keys(facts: Facts, head: int, tables: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """``rope_theta`` and, where positions are stretched, ``rope_scaling``. ``head``: numbers of a head that are
    rotated, ``tables``: readers of the tensors that the file has of :data:`TABLES`.

    Raises:
        DataError: a stretching that transformers has no rule for.
    """
    theta = facts.number("rope.freq_base", 10000.0)
    found: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    kind = facts.text("rope.scaling.type", "linear")
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0)) or 1.0
    original = facts.count("rope.scaling.original_context_length", facts.count("context_length"))
    if SHORT in tables and LONG in tables:
        short, long = (_factors(facts, name, head, tables[name]) for name in (SHORT, LONG))
        scaling: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        return found | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if FREQUENCIES in tables and factor == 1.0:
        factors = _factors(facts, FREQUENCIES, head, tables[FREQUENCIES])
        return found | {"rope_scaling": _llama3(facts, factors, theta, head)}
    if factor == 1.0 or (kind == "none" and FREQUENCIES not in tables):
        return found
    if FREQUENCIES in tables:
        kind = f"{kind} and by {FREQUENCIES}"
    if kind == "linear":
        return found | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return found | {"rope_scaling": scaling}
    raise DataError(
        f"{facts.called}: positions are stretched as {kind[:60]!r}, expected none, linear or yarn"
    )


def _factors(facts: Facts, name: str, head: int, table: GgufTensor) -> list[float]:
    values = table.read() if table.shape == (head // 2,) else np.zeros(1)
    if not (np.isfinite(values) & (values > 0)).all():
        raise DataError(
            f"{facts.called}: {name} is {list(table.shape)}, expected {head // 2} positive numbers"
        )
    return [float(str(np.float32(value))) for value in values]


def _llama3(facts: Facts, factors: list[float], theta: float, head: int) -> dict[str, Any] | None:
    """The rule of Llama 3 that gives the ``factors`` by which each frequency is divided; None where all are 1."""
    factor = round(max(factors), 4)
    if factor == 1.0:
        return None
    low, high, original = LLAMA3
    for place, stored in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * place / head)
        smooth = (original / wavelength - low) / (high - low)
        expected = 1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1))
        if abs(stored - expected) > KEPT * expected:
            raise DataError(
                f"{facts.called}: the frequencies in {FREQUENCIES} follow no rule that is known: number {place} is "
                f"divided by {stored:g}, by Llama 3's rule it is {expected:g}"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
