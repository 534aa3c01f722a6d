"""Published evaluators' verdicts beside ours, item by item, and where and why they differ.

The rules themselves are in `quantlab.text2sql.scoring.official.compare`; everything runs in our sandbox.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlab.runs.run import Sample
from quantlab.stats import wilson
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.scoring.databases import Ground
from quantlab.text2sql.scoring.execution import Verdict
from quantlab.text2sql.scoring.official.compare import run_published
from quantlab.text2sql.scoring.official.explain import differences


def beside(
    sandbox: Sandbox, ground: Ground, rule: str, ours: Verdict, item: Item, statement: str
) -> dict[str, Any]:
    """`ok`: the published verdict, None where it cannot be told; `why`: the reasons where ours differs."""
    if ground.reason:
        return {"ok": None, "why": [ground.reason]}
    databases = list(item.extra.get("databases") or ()) if ground.witness is None else []
    golds = ground.golds if rule == "sql-eval" else ground.golds[:1]  # the only one that knows several
    told = []
    for gold in golds:
        published = run_published(
            sandbox,
            [Path(path) for path in databases] or ground.databases,
            rule,
            gold,
            statement,
            question=item.question,
            category=str(item.extra.get("query_category", "")),
        )
        told.append((published, gold))
        if published.verdict:
            break
    published, gold = next((one for one in told if one[0].verdict), told[0])
    return {"ok": published.verdict, "why": differences(rule, ours, published, gold, statement)}


def compare_rule(rule: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """The share by a published rule with its Wilson interval, and the 2×2 table against ours with its reasons."""
    found = [(sample, sample.extra["published"][rule]) for sample in samples if "published" in sample.extra]
    told = [(sample, record) for sample, record in found if record["ok"] is not None]
    right = sum(record["ok"] for _, record in told)
    low, high = wilson(right, len(told))
    reasons: Counter[str] = Counter()
    there: list[str] = []
    here: list[str] = []
    for sample, record in told:
        mine = sample.verdict == "ok"
        if sample.extra["evidence"] and mine != record["ok"]:
            reasons.update(record["why"][:1])
            (here if mine else there).append(sample.id)
    return {
        "accuracy": right / len(told) if told else None,
        "low": low if told else None,
        "high": high if told else None,
        "items": len(told),
        "not_told": len(found) - len(told),
        "not_scored_here": sum(not sample.extra["evidence"] for sample, _ in told),
        "right_there_not_here": there,
        "right_here_not_there": here,
        "reasons": dict(reasons.most_common()),
    }
