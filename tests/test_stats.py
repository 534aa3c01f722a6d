"""Intervals and tests against values from the literature and from scipy's definitions."""

from __future__ import annotations

import pytest

from quantlab.evals import run_task
from quantlab.progress import Silent
from quantlab.registry import load
from quantlab.registry.tasks import TASKS
from quantlab.report.cells import divergence, divergence_interval
from quantlab.stats import mcnemar_exact, mean_interval, ratio_interval, student_t_95, wilson


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


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # published tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (30, 2.042), (120, 1.980), (200, 1.972), (1000, 1.962)],
)
def test_student_t(freedom: int, quantile: float) -> None:
    assert student_t_95(freedom) == pytest.approx(quantile, abs=5.1e-4)


def test_student_t_is_smooth_where_the_formula_changes() -> None:
    assert 0 < student_t_95(200) - student_t_95(201) < 1e-4
    assert all(student_t_95(n) > student_t_95(n + 1) for n in range(1, 300))


def test_the_interval_of_a_mean() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)  # 2 ± 4.3027 / sqrt(3)
    assert (low, high) == (pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))
    assert mean_interval([1.0]) is None and mean_interval([]) is None
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)


def test_a_ratio_is_paired_by_window() -> None:
    """Windows differ by nats, the two models by a hundredth: the ratio is known to a per mille."""
    before = [1.0, 5.0, 2.0, 4.0, 3.0]
    after = [value + 0.01 + 0.0001 * number for number, value in enumerate(before)]
    low, high = ratio_interval(before, after) or (0.0, 0.0)
    assert 1.0099 < low < 1.0103 < high < 1.0106
    assert ratio_interval([0.0, 0.0], [800.0, 800.0]) == (float("inf"), float("inf"))
    with pytest.raises(ValueError, match="zip"):
        ratio_interval([1.0], [1.0, 2.0])


def test_a_divergence_is_written_with_its_interval_and_as_noise() -> None:
    row = {"kl_mean": 0.01234, "kl_low": 0.011, "kl_high": 0.0137, "kl_noise": 0.001}
    assert (divergence(row), divergence_interval(row)) == ("0.0123", "0.0123 [0.0110, 0.0137]")
    noisy = {**row, "kl_noise": 0.02}
    assert (divergence(noisy), divergence_interval(noisy)) == (
        "0.0123 noise",
        "0.0123 [0.0110, 0.0137] noise",
    )
    assert (
        divergence({"kl_mean": "0.01234", "kl_low": "", "kl_noise": ""}) == "0.0123"
    )  # of an earlier version
    assert divergence_interval({"kl_mean": "0.01234", "kl_low": ""}) == "0.0123"
    assert divergence({}) == divergence_interval({"kl_mean": ""}) == ""
