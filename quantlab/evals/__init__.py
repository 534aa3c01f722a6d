"""What can be measured. One line a task; nothing is imported until it is asked for.

Every task is `evaluate(subject, options, *, baseline, progress) -> TaskResult`, its options are the
pydantic model of the same name in `quantlab.recipe`, and its mathematics is in plain functions beside it. Tasks in
`IN_TURN` load their models themselves, all of a run together: `measure(contestants, baseline, options, ...)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantlab.errors import RecipeError
from quantlab.paths import nearest

if TYPE_CHECKING:
    from quantlab.models.load import Subject
    from quantlab.progress import Progress
    from quantlab.runs.run import TaskResult

TASKS: dict[str, str] = {
    "perplexity": "quantlab.evals.perplexity:evaluate",
    "text2sql": "quantlab.evals.text2sql:evaluate",
    "fidelity": "quantlab.evals.kl_divergence:evaluate",
    "lm-eval": "quantlab.evals.harness:evaluate",  # `lm-eval:<name>`, the name travels in the options
}

IN_TURN: dict[str, str] = {"speed": "quantlab.evals.speed:measure"}
NEEDS_BASELINE = frozenset({"fidelity"})


def run_task(
    task: str, subject: Subject, options: Any, *, baseline: Subject | None = None, progress: Progress
) -> TaskResult:
    """Score `subject` on one entry of a recipe's `evaluate`; `options` is `recipe.tasks.of(task)`."""
    name = task.partition(":")[0]
    if name not in TASKS:
        near = nearest(name, TASKS)
        raise RecipeError(f"unknown task {task!r}" + (f"; did you mean {near!r}?" if near else ""))
    module, _, function = TASKS[name].partition(":")
    result: TaskResult = getattr(importlib.import_module(module), function)(
        subject, options, baseline=baseline, progress=progress
    )
    return result
