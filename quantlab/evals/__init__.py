"""What can be measured, one file a task. What is known of each is in ``quantlab.registry.tasks``; the mathematics of
a task is in plain functions beside its ``evaluate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantlab.errors import RecipeError
from quantlab.paths import nearest
from quantlab.registry import load
from quantlab.registry.tasks import TASKS

if TYPE_CHECKING:
    from quantlab.models.load import LoadedModel
    from quantlab.progress import Progress
    from quantlab.runs.run import TaskResult


def run_task(
    entry: str, subject: LoadedModel, options: Any, *, baseline: LoadedModel | None = None, progress: Progress
) -> TaskResult:
    """Score `subject` on one entry of a recipe's `evaluate`; `options` is `recipe.tasks.of(entry)`."""
    task = TASKS.get(entry.partition(":")[0])
    if task is None or task.in_turn:
        near = nearest(entry, TASKS)
        raise RecipeError(f"unknown task {entry!r}" + (f"; did you mean {near!r}?" if near else ""))
    result: TaskResult = load(task.run)(subject, options, baseline=baseline, progress=progress)
    return result
