"""What can be measured, one file a task. What is known of each is in ``quantlab.registry.tasks``; the mathematics of
a task is in plain functions beside its ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.errors import NotANumber, RecipeError
from quantlab.paths import nearest
from quantlab.registry import load
from quantlab.registry.tasks import TASKS, task_of

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


def passes(entries: Sequence[str], options: Mapping[str, Any]) -> list[list[str]]:
    """The entries in their order, those that one forward pass of the model measures together: tasks that go together,
    on the same windows of a text."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        joint, wish = task_of(entry).together, options[entry]
        text = repr((wish.source, wish.seq_len, wish.kv_cache)) if joint else entry
        found.setdefault((joint, text), []).append(entry)
    return list(found.values())


def run_pass(
    entries: Sequence[str],
    subject: LoadedModel,
    options: Mapping[str, Any],
    *,
    baseline: Any = None,
    progress: Progress,
) -> dict[str, TaskResult | NotANumber]:
    """The results of one of `passes`, by entry; what came out as NaN is the error that says so."""
    if len(entries) > 1:
        joint = load(task_of(entries[0]).together)
        wishes = {entry: options[entry] for entry in entries}
        found: dict[str, TaskResult | NotANumber] = joint(
            subject, wishes, baseline=baseline, progress=progress
        )
        return found
    (entry,) = entries
    try:
        return {entry: run_task(entry, subject, options[entry], baseline=baseline, progress=progress)}
    except NotANumber as error:
        return {entry: error}
