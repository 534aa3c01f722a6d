"""What a run leaves behind: samples, `run.json`, the log, and the leaderboard rebuilt from every `run.json`.

A run is a directory `results/runs/<run-id>/` with `recipe.yaml`, `run.json`, `samples/<task>.jsonl` and
`log.jsonl`. `run.json` is written when the run starts (status "running") and again when it ends ("done");
only done runs have a row. The leaderboard is never appended to, it is rebuilt, so two runs that end together
lose nothing. Each file is written beside its place and renamed into it.

Rows that do not differ significantly from the best in execution accuracy share its `tie_group`: an exact two-sided
McNemar test (McNemar 1947) on the sample ids that both runs scored, at 5 %.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.paths import atomic_write_text, atomic_writer, file_digest
from quantlab.registry.tasks import task_columns, task_of
from quantlab.textfile import json_objects, read_json

# Columns that tasks fill in.
MEASURED = tuple(column.name for column in task_columns() if not column.derived)

VERDICTS = ("ok", "wrong", "error", "timeout", "unparsed")


@dataclass
class Sample:
    """One scored item. `verdict` is one of VERDICTS; `why` explains anything but "ok"; `extra` is task-specific."""

    id: str
    input: str
    output: str
    verdict: str
    why: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} is not one of {', '.join(VERDICTS)}")


@dataclass
class TaskResult:
    """What a task returns: `metrics` (names of COLUMNS go to the leaderboard), samples, and free details."""

    task: str
    metrics: dict[str, float | int | str | None]
    samples: list[Sample] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def write_jsonl(path: Path, rows: Iterable[Sample | Mapping[str, Any]]) -> int:
    """Write one JSON object a line, beside and renamed; returns how many."""
    count = 0
    with atomic_writer(path) as stream:
        for row in rows:
            content = asdict(row) if isinstance(row, Sample) else dict(row)
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; DataError names the file and the line that is not a JSON object."""
    return [row for _, row in json_objects(path)]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Run:
    """One recipe applied to one model, as a directory. `record` is the content of run.json."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory = directory
        self.record = record

    @classmethod
    def start(cls, directory: Path, recipe_yaml: str, row: Mapping[str, Any]) -> Run:
        """Open the directory: recipe.yaml and a run.json with status "running" and the row as known so far."""
        run = cls(directory, {"status": "running", "started_at": now(), "row": dict(row), "tasks": {}})
        atomic_write_text(directory / "recipe.yaml", recipe_yaml)
        run.save()
        return run

    @classmethod
    def read(cls, directory: Path) -> Run:
        path = directory / "run.json"
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("row"), dict):
            raise DataError(f"{path}: not a run record")
        return cls(directory, record)

    @property
    def run_id(self) -> str:
        return self.directory.name

    @property
    def done(self) -> bool:
        return self.record.get("status") == "done"

    @property
    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = self.record["row"]
        return row

    def save(self) -> None:
        content = json.dumps(_finite(self.record), ensure_ascii=False, indent=1, allow_nan=False)
        atomic_write_text(self.directory / "run.json", content + "\n")

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"at": now(), "event": event, **fields}, ensure_ascii=False, default=str)
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def add(self, result: TaskResult) -> None:
        """Keep a task's result: its samples in a file, its metrics in the row where COLUMNS has them.

        A harness (`lm-eval:…`) names metrics as it likes, so its numbers stay out of the row.
        """
        if result.samples:
            write_jsonl(self._samples_file(result.task), result.samples)
        self.record["tasks"][result.task] = {"metrics": result.metrics, "details": result.details}
        if not task_of(result.task).named:
            self.row.update({key: result.metrics[key] for key in MEASURED if key in result.metrics})
        self.save()

    def samples(self, task: str) -> list[dict[str, Any]]:
        path = self._samples_file(task)
        return read_jsonl(path) if path.exists() else []

    def drop_samples(self) -> None:
        """Replace the samples by what is still needed without them: a digest of each file, and who was right, by id."""
        kept: dict[str, Any] = self.record.setdefault("samples", {})
        for task in self.record["tasks"]:
            path = self._samples_file(task)
            if path.exists():
                scored = _verdicts(read_jsonl(path))
                kept[task] = {
                    "digest": file_digest(path)[:16],
                    "right": [key for key, ok in scored.items() if ok],
                    "wrong": [key for key, ok in scored.items() if not ok],
                }
        self.save()
        shutil.rmtree(self.directory / "samples", ignore_errors=True)

    def _samples_file(self, task: str) -> Path:
        return self.directory / "samples" / f"{task.replace(':', '-').replace('/', '-')}.jsonl"

    def finish(self, **fields: Any) -> None:
        """Mark done: the row now counts."""
        self.row.update(fields)
        self.row["finished_at"] = now()
        self.record["status"] = "done"
        self.save()


def read_runs(results_dir: Path) -> list[Run]:
    """Every done run under `results_dir/runs`, in the order they finished. Unreadable records are DataErrors."""
    directories = sorted((results_dir / "runs").glob("*/run.json"))
    runs = [run for run in (Run.read(path.parent) for path in directories) if run.done]
    return sorted(runs, key=lambda run: (str(run.row.get("finished_at", "")), run.run_id))


def verdicts(run: Run, task: str = "text2sql") -> dict[str, bool]:
    """Sample id → answered correctly, for the samples that count (an empty gold result is no evidence)."""
    rows = run.samples(task)
    if rows:
        return _verdicts(rows)
    kept = run.record.get("samples", {}).get(task, {})  # of a run whose samples were dropped
    return dict.fromkeys(kept.get("right", []), True) | dict.fromkeys(kept.get("wrong", []), False)


def _verdicts(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    scored = (row for row in rows if row.get("extra", {}).get("evidence", True))
    return {str(row["id"]): row["verdict"] == "ok" for row in scored}


def _finite(value: Any) -> Any:
    """JSON has no infinity: a diverged perplexity is stored as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
