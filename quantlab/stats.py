"""Intervals and tests for shares of right answers.

The Wilson score interval (Wilson 1927) for one share, the exact McNemar test (McNemar 1947) for two models scored on
the same items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Z_95 = 1.959963984540054  # two-sided 95 % of a standard normal


def flips(parent: Mapping[str, bool], child: Mapping[str, bool]) -> tuple[int, int]:
    """(lost, gained): items right in the parent and wrong in the child, and the other way, on shared ids."""
    shared = parent.keys() & child.keys()
    lost = sum(parent[key] and not child[key] for key in shared)
    gained = sum(child[key] and not parent[key] for key in shared)
    return lost, gained


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact p-value that `lost` and `gained` flips are equally likely (binomial, p = 1/2)."""
    n, k = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / (1 << n))


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
