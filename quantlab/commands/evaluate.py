"""`quantlab evaluate`: measure a model or checkpoint as it is stored, with or without a baseline to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.commands.defaults import note_texts, settle
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.measure import TRANSFORMERS, Entry, Evaluator
from quantlab.commands.planned_run import (
    COMPARED,
    PlannedRun,
    check_weights,
    find_baseline,
    open_model,
    plan_work,
    refuse_existing,
    start_run,
    stored_as,
)
from quantlab.commands.predictions import text2sql_overrides
from quantlab.commands.quantize import calibration_name, check_device, fail_for, show
from quantlab.errors import RecipeError
from quantlab.models.provenance import provenance
from quantlab.models.safetensors.files import ModelFiles
from quantlab.progress import Progress, default_progress
from quantlab.recipe.load import EvaluateRecipe, parse_recipe
from quantlab.registry import load
from quantlab.runs.leaderboard import rebuild_leaderboard
from quantlab.runs.run import Run

DEFAULT_TASKS = ("perplexity", "text2sql", "speed")


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    tasks: tuple[str, ...] = ()
    baseline: str | None = None
    data: str | None = None
    rules: tuple[str, ...] = ()
    runtime: str | None = None
    results: Path = Path("results")
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    resume: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False


def run_either(
    model: str | None,
    predictions: Path | None,
    judge: Path | None,
    options: Options,
    *,
    as_json: bool = False,
) -> None:
    """Measure a model, or score predictions: exactly one of the two is given."""
    if (model is None) == (predictions is None):
        raise RecipeError(
            "a model and --predictions at once" if model is not None else "nothing to evaluate",
            hint="quantlab evaluate MODEL, or quantlab evaluate --predictions FILE --data FILE",
        )
    if predictions is None:
        if judge is not None:
            raise RecipeError("--judge goes with --predictions")
        assert model is not None
        run(model, options, as_json=as_json)
        return
    unused = [
        name for name in ("baseline", "runtime", "dry_run", "trust_remote_code") if getattr(options, name)
    ]
    if unused:
        raise RecipeError(
            f"--{unused[0].replace('_', '-')} has no meaning with --predictions: no model is loaded"
        )
    from quantlab.commands import predictions as written

    written.run(
        predictions,
        written.Options(
            options.data,
            options.rules,
            judge,
            options.tasks,
            options.results,
            options.overrides,
            options.resume,
        ),
        as_json=as_json,
    )


def run(model: str, options: Options, *, as_json: bool = False) -> None:
    """The verb."""
    with stdout_is_stderr():
        summary = evaluate(model, options, default_progress())
    if as_json:
        print_json(summary)
    else:
        show(summary, as_json=False)
    fail_for(summary)


def evaluate(model: str, options: Options, progress: Progress) -> dict[str, Any]:
    """Everything between the command line and its last line; returns the summary."""
    check_device(options.device)
    tasks = options.tasks or (*DEFAULT_TASKS, *(("fidelity",) if options.baseline else ()))
    recipe = _recipe(tasks, options)
    if "fidelity" in recipe.evaluate and options.baseline is None:
        parent = provenance(Path(model)).get("parent") or "MODEL"
        raise RecipeError(
            "--task fidelity compares with the unquantized model", hint=f"add --baseline {parent}"
        )
    files = open_model(model, progress)
    if recipe.runtime != TRANSFORMERS:
        load("quantlab.models.llama_cpp:gguf_of")(files)
        if options.device.startswith("cuda"):
            raise RecipeError(f"--device {options.device}: {recipe.runtime} computes on the CPU here")
    if said := note_texts([recipe], files):
        progress.note(said)
    target = _work(files, settle(recipe, files), options)
    found = target.existing()
    if found is not None and not options.resume:
        refuse_existing(target, found)
    baseline, works = _baseline(target, options, progress)
    works.append(target)
    for work in works:
        check_weights(work.files)
    if options.dry_run:
        plan = [
            {"recipe": w.model, "steps": list(w.recipe.evaluate), "run_id": w.run_id, "checkpoint": None}
            for w in works
        ]
        return {"status": "dry-run", "model": model, "plan": plan}
    bench = Evaluator(options.device, options.trust_remote_code, progress)
    runs = [work.existing() or start_run(work) for work in works]
    entries = [Entry(work, run, work.model) for work, run in zip(works, runs, strict=True) if not run.done]
    against = (options.baseline, target.recipe.dtype) if options.baseline else None
    bench.take_turns(entries, against)
    for work, run in zip(works, runs, strict=True):
        if run.done:
            progress.note(f"{work.model}: measured already, run {work.run_id}")
        else:
            bench.measure(work, run, work.model, baseline, options.baseline if work is target else None)
        if work is not target:
            baseline = run
    rows = rebuild_leaderboard(options.results)
    shown = {target.run_id} | ({baseline.run_id} if baseline else set())
    return {
        "status": "done",
        "model": model,
        "rows": [row for row in rows if row["run_id"] in shown],
        "errors": bench.errors,
        "leaderboard": str(options.results / "leaderboard.csv"),
        "checkpoints": {},
        "readers": {},
    }


def _recipe(tasks: tuple[str, ...], options: Options) -> EvaluateRecipe:
    text = yaml.safe_dump({"kind": "evaluate", "evaluate": list(tasks)})
    runtime = [f"runtime={options.runtime}"] if options.runtime else []
    recipe = parse_recipe(
        text, "--task", [*options.overrides, *text2sql_overrides(options.data, options.rules), *runtime]
    )
    if not isinstance(recipe, EvaluateRecipe):
        raise RecipeError("--set kind: an evaluation stays an evaluation")
    return recipe


def _baseline(
    target: PlannedRun, options: Options, progress: Progress
) -> tuple[Run | None, list[PlannedRun]]:
    """The baseline's finished run, or else the work that makes one; neither when nothing is compared."""
    compared = [task for task in target.recipe.evaluate if task in COMPARED]
    if options.baseline is None or not compared:
        return None, []
    files = open_model(options.baseline, progress)
    found = find_baseline(target, files.digest)
    if found is not None:
        return found, []
    recipe = target.recipe.model_copy(update={"evaluate": compared, "runtime": TRANSFORMERS})
    assert isinstance(recipe, EvaluateRecipe)
    return None, [_work(files, recipe, options)]


def _work(files: ModelFiles, recipe: EvaluateRecipe, options: Options) -> PlannedRun:
    name = "evaluate" if recipe.runtime == TRANSFORMERS else recipe.runtime
    work = plan_work(name, recipe, files.name, files, options.results)
    work.row.update(stored_as(files), parent=options.baseline if options.baseline != files.name else None)
    made = provenance(files.path)
    if made:
        work.row.update(
            parent=work.row["parent"] or made.get("parent"),
            work_seconds=made.get("seconds"),
            calibration=calibration_name(made),
        )
    return work
