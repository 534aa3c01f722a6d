"""Any task of EleutherAI's lm-evaluation-harness, on the model that is already loaded.

`lm-eval:<name>` runs through `simple_evaluate`. The task files of `include_path` and quantlab's own
(`lm_eval_tasks`) are read first; the harness's thousands are not scanned unless the name is not among them, which
saves several seconds.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.evals.lm_eval_tasks import FOLDER, OWN
from quantlab.models.load import LoadedModel
from quantlab.paths import find_source, nearest
from quantlab.progress import Progress
from quantlab.registry.tasks import LmEvalOptions
from quantlab.runs.run import VERDICTS, Sample, TaskResult


def evaluate(
    subject: LoadedModel, options: LmEvalOptions, *, baseline: LoadedModel | None = None, progress: Progress
) -> TaskResult:
    """Metrics as the harness names them ("acc", "acc_stderr", …), one sample a document with its own score."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MachineError(
            f"lm-eval:{options.task} needs lm-eval: {error}", hint="pip install lm-eval"
        ) from error
    manager = task_manager(
        options.task, options.include_path, options.prompt.model_dump(exclude_defaults=True)
    )
    with progress.task(f"lm-eval:{options.task}"), _stdout_to_stderr():
        language_model = HFLM(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            batch_size=options.batch_size,
            device=subject.device,
        )
        try:
            found = lm_eval.simple_evaluate(
                model=language_model,
                tasks=[options.task],
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
        except (OSError, ValueError, KeyError, FileNotFoundError) as error:
            raise DataError(f"lm-eval:{options.task} fails: {error}") from error
    if not found:
        raise DataError(f"lm-eval:{options.task} gave no result")
    metrics, samples = flatten(found, options.task)
    details = {
        "lm_eval": lm_eval.__version__,
        "limit": options.limit,
        "versions": dict(found.get("versions") or {}),
    }
    return TaskResult(f"lm-eval:{options.task}", metrics, samples, details)


def task_manager(task: str, include_path: str | None, prompt: dict[str, Any] | None = None) -> Any:
    """A TaskManager that knows `task`, with the harness's own tasks only where they are needed. `prompt`: how
    quantlab's own Text2SQL tasks are to ask, where not as they do by themselves."""
    from lm_eval.tasks import TaskManager

    folders = [FOLDER]
    if include_path is not None:
        folders.append(find_source(include_path))  # the last one wins where two define a task
        if not folders[-1].is_dir():
            raise RecipeError(f"include_path {include_path} is not a directory")
    paths = [str(folder) for folder in folders]
    metadata = {"prompt": prompt} if prompt and task.startswith(OWN) else None
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if task in manager.all_tasks:
        return manager
    manager = TaskManager(include_path=paths, include_defaults=True)
    if task not in manager.all_tasks:
        near = nearest(task, manager.all_tasks)
        raise RecipeError(
            f"lm-eval has no task {task!r}" + (f" in {include_path} or of its own" if include_path else ""),
            hint=f"did you mean {near}?" if near else "set include_path to the directory of its YAML file",
        )
    return manager


def flatten(found: Any, task: str) -> tuple[dict[str, float | int | str | None], list[Sample]]:
    """The harness's results as metrics and samples; "acc,none" becomes "acc", other filters stay in the name."""
    scores = found["results"].get(task)
    if scores is None:  # a group: the harness reports it under its own heading
        scores = (found.get("groups") or {}).get(task, {})
    metrics: dict[str, float | int | str | None] = {}
    for key, value in scores.items():
        name = key.removesuffix(",none").replace(",", "_")
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics[name] = value
    samples = [
        _sample(f"{name}:{row.get('doc_id', index)}", row)
        for name, rows in (found.get("samples") or {}).items()
        for index, row in enumerate(rows)
    ]
    metrics["items"] = len(samples)
    return metrics, samples


def _sample(identity: str, row: dict[str, Any]) -> Sample:
    scores = {name: row[name] for name in row.get("metrics", ()) if isinstance(row.get(name), int | float)}
    output = row.get("filtered_resps", "")
    if isinstance(output, list) and len(output) == 1 and isinstance(output[0], str):
        output = output[0]  # what the model wrote, not a list of it
    verdict, _, why = str(row.get("verdict", "")).partition(": ")  # quantlab's own tasks say it themselves
    if verdict not in VERDICTS:
        right = next((scores[name] for name in ("acc", "exact_match", "acc_norm") if name in scores), None)
        verdict = "ok" if right is None or right >= 1 else "wrong"
        why = "" if verdict == "ok" else f"expected {row.get('target', '')}"
    return Sample(identity, str(row.get("doc", "")), str(output), verdict, why, {"scores": scores})


@contextlib.contextmanager
def _stdout_to_stderr() -> Any:
    """The harness prints; stdout belongs to quantlab's own summary."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
