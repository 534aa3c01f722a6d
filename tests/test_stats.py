"""Intervals and tests against values from the literature and from scipy's definitions."""

from __future__ import annotations

import pytest

from quantlab.evals import run_task
from quantlab.progress import Silent
from quantlab.registry import load
from quantlab.registry.tasks import TASKS
from quantlab.stats import mcnemar_exact, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3; so are the next three
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == (pytest.approx(low, abs=5.1e-5), pytest.approx(high, abs=5.1e-5))


def test_wilson_stays_inside_and_is_symmetric() -> None:
    for n in (1, 7, 112):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0.0 <= low <= k / n <= high <= 1.0
            assert wilson(n - k, n) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_mcnemar() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(1, 9) == mcnemar_exact(9, 1) == pytest.approx(2 * 11 / 1024)


def test_every_task_of_the_table_is_there() -> None:
    for task in TASKS.values():
        assert callable(load(task.run))


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(Exception, match="did you mean 'perplexity'"):
        run_task("perplexty", None, None, progress=Silent())  # type: ignore[arg-type]
