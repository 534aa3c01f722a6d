"""Intervals and tests.

Shares of right answers: the Wilson score interval (Wilson 1927) for one share, the exact McNemar test (McNemar 1947)
for two models scored on the same items. Means over windows of a text: Student's t interval, windows taken as
independent. It needs no seed, and unlike a percentile bootstrap it does not come out too narrow where windows are few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

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


@lru_cache
def student_t_95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t with `freedom` degrees of freedom, 1 or more.

    P(|T| <= t) is a finite sum for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), solved by
    halving; beyond 200 the first terms of the expansion around the normal quantile (26.7.5) are exact to 1e-6.
    """
    if freedom > 200:
        z = Z_95
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, 13.0  # the quantile of one degree is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) for Student's t."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):  # the exponents of the cosine
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """(low, high): the 95 % t interval of the mean of independent values; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = student_t_95(count - 1) * math.sqrt(variance / count)
    return mean - half, mean + half


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """(low, high): the 95 % interval of exp(mean(after) - mean(before)) for losses of the same windows, in nats a
    token: of a perplexity ratio. Paired, since what makes a window hard makes it hard for both; None for fewer than
    two."""
    found = mean_interval([b - a for a, b in zip(before, after, strict=True)])
    return None if found is None else (_exp(found[0]), _exp(found[1]))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
