"""Intervals and tests for shares of right answers.

The Wilson score interval (Wilson 1927) for one share; the exact McNemar test (McNemar 1947) for two models
scored on the same items lives with the leaderboard, in `quantlab.results`, and is offered here again.
"""

from __future__ import annotations

import math

from quantlab.results import flips, mcnemar_exact

__all__ = ["flips", "mcnemar_exact", "wilson"]

Z_95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """(low, high) of the Wilson score interval for a share of `successes` in `n`; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high
