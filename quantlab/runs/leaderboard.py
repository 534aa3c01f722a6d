"""The leaderboard: `results/leaderboard.csv`, rebuilt from every finished run and never appended to, so two runs that
end together lose nothing.

Rows that do not differ significantly from the best in execution accuracy share its `tie_group`: an exact two-sided
McNemar test (McNemar 1947) on the sample ids that both runs scored, at 5 %.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantlab.paths import atomic_writer
from quantlab.registry.tasks import task_columns
from quantlab.runs.run import Run, read_runs, verdicts
from quantlab.stats import flips, mcnemar_exact

# Name and meaning of the columns that every run has, before and after those of the tasks.
BEFORE_TASKS = {
    "run_id": "directory of the run under `runs/`",
    "finished_at": "when it finished, UTC",
    "model": "what was measured or quantized",
    "parent": "the run or model that it was made from, and is compared with",
    "stage": "base, student or quantized",
    "method": "how weights were rounded",
    "bits": "width of a code",
    "group_size": "columns that share a scale; -1: per channel",
    "format": "what the checkpoint is written in",
    "params": "parameters of the original model",
    "size_bytes": "bytes of the weight files",
    "bits_per_weight": "bits of the weight files over the original parameters",
    "calibration": "text that it was calibrated on, rows x tokens, digest of the rows",
}
AFTER_TASKS = {
    "work_seconds": "seconds that making the checkpoint took",
    "device": "where it was measured",
    "recipe_digest": "names the recipe",
    "model_digest": "names the model's configuration and weights",
    "data_digest": "names the data of all tasks",
    "quantlab_version": "version that measured it",
}
LATE = {column.name: column.meaning for column in task_columns() if column.late}
MEANINGS = (
    BEFORE_TASKS
    | {column.name: column.meaning for column in task_columns() if not column.late}
    | AFTER_TASKS
    | LATE
)
COLUMNS = tuple(MEANINGS)


def rebuild_leaderboard(results_dir: Path) -> list[dict[str, Any]]:
    """Write `results_dir/leaderboard.csv` from every done run; returns its rows, best execution accuracy first."""
    with FileLock(results_dir / ".leaderboard.lock"):  # else a table built earlier could replace a newer one
        return _rebuild(results_dir)


def _rebuild(results_dir: Path) -> list[dict[str, Any]]:
    runs = read_runs(results_dir)
    rows = [{column: run.row.get(column) for column in COLUMNS} for run in runs]
    _mark_ties(runs, rows)
    rows.sort(key=_rank)
    with atomic_writer(results_dir / "leaderboard.csv") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return rows


def _mark_ties(runs: list[Run], rows: list[dict[str, Any]]) -> None:
    """tie_group "best" for rows that a paired test cannot tell from the best row scored on the same data."""
    for row in rows:
        row["tie_group"] = None
    keys = [run.record.get("data", {}).get("text2sql", run.row.get("data_digest")) for run in runs]
    for key in set(keys):
        group = [i for i, row in enumerate(rows) if keys[i] == key and row["ex"] is not None]
        if not group:
            continue
        answers = {i: verdicts(runs[i]) for i in group}
        best = max(group, key=lambda i: float(rows[i]["ex"]))
        for i in group:
            shared = answers[best].keys() & answers[i].keys()
            if i == best or (shared and mcnemar_exact(*flips(answers[best], answers[i])) > 0.05):
                rows[i]["tie_group"] = "best"


def _rank(row: Mapping[str, Any]) -> tuple[float, float, str]:
    ex, ppl = row.get("ex"), row.get("ppl")
    return (-float(ex) if ex is not None else 1.0, float(ppl) if ppl is not None else math.inf, row["run_id"])


def cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
