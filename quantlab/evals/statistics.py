"""Intervals and tests for shares of right answers.

The Wilson score interval (Wilson 1927) for one share and the exact McNemar test (McNemar 1947) for two models scored on
the same items live with the leaderboard, in `quantlab.results`, and are offered here again.
"""

from __future__ import annotations

from quantlab.results import flips, mcnemar_exact, wilson

__all__ = ["flips", "mcnemar_exact", "wilson"]
