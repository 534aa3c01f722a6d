"""Execution accuracy (EX): gold and prediction run on the same database, their results compared.

`judge` gives one of the five verdicts. An item whose gold returns nothing (or does not run) carries no
evidence whatever the prediction does: `evidence` is False, and the caller leaves it out of the share. That
depends on the gold alone, so two models are always scored on the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.text2sql.sandbox.pool import Execution, Sandbox
from quantlab.text2sql.scoring.order_by import Group, OrderPlan, order_plan, tie_groups
from quantlab.text2sql.scoring.result_compare import Comparison, compare


@dataclass(frozen=True)
class Verdict:
    """`verdict`: ok, wrong, error, timeout or unparsed. `evidence`: whether the item says anything about EX."""

    verdict: str
    why: str = ""
    evidence: bool = True
    kind: str = ""  # of the prediction's execution, see sandbox.Execution


@dataclass(frozen=True)
class Gold:
    """A gold query's result, and its tie groups when its order counts."""

    execution: Execution
    groups: list[Group] | None = None
    sorted_by: str = ""

    @property
    def ran(self) -> bool:
        return self.execution.status == "rows"

    @property
    def usable(self) -> bool:
        return self.execution.status == "rows" and len(self.execution.rows) > 0


def run_gold(sandbox: Sandbox, database: Path, sql: str) -> Gold:
    """Run a gold query, and its probe for ties where it sorts."""
    execution = sandbox.run(database, sql, role="gold")
    plan = order_plan(sql) if execution.status == "rows" else None
    probed = sandbox.run(database, plan.probe, role="gold") if plan is not None and plan.probe else None
    return gold_of(execution, plan, probed)


def gold_of(execution: Execution, plan: OrderPlan | None, probed: Execution | None) -> Gold:
    """A gold that has been run, with its tie groups where it sorts; `probed` is the run of its plan's probe."""
    if plan is None:
        return Gold(execution)
    rows = probed.rows if probed is not None and probed.status == "rows" else None
    return Gold(execution, tie_groups(plan, execution.rows, rows), plan.words)


def judge(sandbox: Sandbox, database: Path | Sequence[Path], golds: Sequence[str], predicted: str) -> Verdict:
    """The verdict on one prediction; any of `golds` may be met. An empty prediction is `unparsed`.

    On several databases (witness databases) the same gold must be met on all of them, and the first failure is told.
    """
    databases = [database] if isinstance(database, Path) else list(database)
    runs = [[run_gold(sandbox, path, sql) for sql in golds] for path in databases]
    return judge_against(sandbox, databases, runs, predicted)


def judge_against(
    sandbox: Sandbox, databases: Sequence[Path], runs: Sequence[Sequence[Gold]], predicted: str
) -> Verdict:
    """`judge` with the golds already run: `runs` has a row for each database, in it a Gold for each accepted query."""
    numbers = range(len(runs[0]))
    possible = [
        n for n in numbers if all(golds[n].ran for golds in runs) and any(golds[n].usable for golds in runs)
    ]
    evidence = bool(possible)
    if not predicted.strip():
        return Verdict("unparsed", "no SQL statement in the output", evidence)
    remark = kind = ""
    for at, (path, golds) in enumerate(zip(databases, runs, strict=True), start=1):
        where = f" (witness database {at} of {len(databases)})" if len(databases) > 1 else ""
        execution = sandbox.run(path, predicted, role="prediction")
        kind = execution.kind
        failure = _failed(execution, golds, evidence, where)
        if failure is not None:
            return failure
        if not evidence:
            return _without_evidence([gold for row in runs for gold in row], execution)
        found = {number: compared(golds[number], execution) for number in possible}
        met = [number for number in possible if found[number].equal]
        if not met:
            return Verdict("wrong", found[possible[0]].reason + where, True, kind)
        possible, remark = met, remark or found[met[0]].reason
    return Verdict("ok", remark, True, kind)


def _failed(execution: Execution, golds: Sequence[Gold], evidence: bool, where: str) -> Verdict | None:
    """The verdict on a prediction that gave no rows to compare."""
    if execution.status == "timeout":
        return Verdict("timeout", execution.reason + where, evidence, execution.kind)
    usable = [gold for gold in golds if gold.usable]
    if execution.kind == "too_many_rows" and usable:
        why = f"{execution.reason}, against {len(usable[0].execution.rows)}{where}"
        return Verdict("wrong", why, evidence, execution.kind)
    if execution.status == "error":
        return Verdict("error", execution.reason + where, evidence, execution.kind)
    return None


def compared(gold: Gold, execution: Execution) -> Comparison:
    """A result set against the gold's, by the rules of `compare`."""
    return compare(
        gold.execution.rows,
        execution.rows,
        gold_columns=gold.execution.columns,
        predicted_columns=execution.columns,
        groups=gold.groups,
        sorted_by=gold.sorted_by,
    )


def _without_evidence(golds: Sequence[Gold], execution: Execution) -> Verdict:
    failed = next((gold.execution for gold in golds if gold.execution.status != "rows"), None)
    if failed is not None:
        return Verdict("error", f"not scored: the gold query fails: {failed.reason}", False, execution.kind)
    if execution.rows:
        rows = len(execution.rows)
        return Verdict("wrong", f"not scored: {rows} rows where the gold has none", False, execution.kind)
    return Verdict("error", "not scored: both results are empty, which is no evidence", False, execution.kind)
