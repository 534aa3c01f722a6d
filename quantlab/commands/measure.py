"""Measuring what is stored: the tasks one by one on a model reloaded from disk, then the baseline comparison."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.commands.planned_run import PlannedRun
from quantlab.errors import NotANumber
from quantlab.evals import passes, run_pass
from quantlab.progress import Progress
from quantlab.recipe.load import EvaluateRecipe, Recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry import load
from quantlab.registry.tasks import SpeedOptions, task_of
from quantlab.runs.run import Run, verdicts
from quantlab.stats import flips, ratio_interval

if TYPE_CHECKING:
    from quantlab.evals.speed import Contestant
    from quantlab.models.load import LoadedModel


TRANSFORMERS = "transformers"  # the runtime of everything but what is asked to be run otherwise


class Evaluator:
    """Where models are measured: the device, the progress, and the baseline model kept loaded between runs."""

    def __init__(self, device: str, trust_remote_code: bool, progress: Progress) -> None:
        self.device = device
        self.trust_remote_code = trust_remote_code
        self.progress = progress
        self.errors: list[str] = []  # measurements that came out as NaN
        self._kept: tuple[tuple[str, str], LoadedModel] | None = None

    def load(self, ref: str | Path, dtype: str, runtime: str = TRANSFORMERS) -> LoadedModel:
        from quantlab.models.load import load_model

        return load_model(
            ref, device=self.device, dtype=dtype, trust_remote_code=self.trust_remote_code, runtime=runtime
        )

    def baseline(self, ref: str, dtype: str) -> LoadedModel:
        """The baseline model, loaded once."""
        if self._kept is None or self._kept[0] != (ref, dtype):
            self._kept = None
            self._kept = ((ref, dtype), self.load(ref, dtype))
        return self._kept[1]

    def release(self) -> None:
        """Let go of the baseline model."""
        self._kept = None
        free_memory()

    def take_turns(self, entries: Sequence[Entry], baseline: tuple[str, str] | None) -> None:
        """Speed, of all models that lack it and want it in the same way: each in a process of its own, taking turns.

        Args:
            baseline: (reference, dtype) of the model that the others are set against, which takes turns too.
        """
        from quantlab.evals.speed import Contestant, measure

        todo = [
            e for e in entries if "speed" in e.work.recipe.evaluate and "speed" not in e.run.record["tasks"]
        ]
        if todo:
            self.release()
        wishes: list[SpeedOptions] = []
        for entry in todo:
            wish = _speed_options(entry)
            wishes += [wish] if wish not in wishes else []
        other = Contestant(baseline[0], baseline[0], baseline[1]) if baseline else None
        for options in wishes:
            same = [entry for entry in todo if _speed_options(entry) == options]
            contestants = [_contestant(entry, other) for entry in same]
            count = len({*contestants, *([other] if other else [])})
            with self.progress.task(f"speed of {count} models"):
                results = measure(
                    contestants, other, options, device=self.device, trust_remote_code=self.trust_remote_code,
                    progress=self.progress,
                )  # fmt: skip
            for entry, result in zip(same, results, strict=True):
                entry.run.add(result)
                entry.run.log("measured", task="speed", metrics=result.metrics)
                if result.metrics["disturbed"]:
                    self.progress.note(
                        f"{entry.work.name}: speed disturbed, other processes took processor time"
                    )

    def measure(
        self,
        work: PlannedRun,
        run: Run,
        ref: str | Path,
        baseline: Run | None,
        baseline_ref: str | None,
        before_end: Callable[[Run], None] | None = None,
    ) -> None:
        """Run the tasks that `run` does not have yet on the model as stored at `ref`, then close the run; `before_end`
        is called just before that."""
        recipe = work.recipe
        todo = [
            task
            for task in recipe.evaluate
            if task not in run.record["tasks"]
            and not task_of(task).in_turn
            and not (task_of(task).needs_baseline and baseline_ref is None)
        ]
        run.record["errors"] = {}
        kept, todo = self._keep_originals(work, run, ref, todo, baseline_ref)
        subject = (
            self.baseline(work.model, recipe.dtype)
            if work.is_baseline
            else self.load(ref, dtype_of(work), runtime_of(recipe))
        )
        run.row.update(
            params=work.row.get("params") or subject.params,
            size_bytes=subject.size_bytes,
            device=", ".join(filter(None, (device_name(subject.device), subject.runtime))),
        )
        run.row["bits_per_weight"] = 8 * subject.size_bytes / run.row["params"]
        run.record["environment"] = environment()
        run.record["data"] = dict(work.data)
        options = {task: recipe.tasks.of(task) for task in todo}
        for tasks in passes(todo, options):
            compared = [task for task in tasks if task_of(task).needs_baseline]
            reference = next((kept[task] for task in compared if task in kept), None)
            if compared and reference is None and baseline_ref is not None:
                reference = self.baseline(baseline_ref, recipe.dtype)
            started = time.perf_counter()
            with self.progress.task(f"{work.name}: {', '.join(tasks)}"):
                results = run_pass(tasks, subject, options, baseline=reference, progress=self.progress)
            seconds = round(time.perf_counter() - started, 3)
            together = {"together": tasks} if len(tasks) > 1 else {}  # the seconds are of all of them
            for task, result in results.items():
                if isinstance(result, NotANumber):
                    self._not_a_number(work, run, task, result)
                    continue
                run.add(result)
                run.log("measured", task=task, seconds=seconds, **together, metrics=result.metrics)
        if baseline is not None:
            run.row.update(compare(run, baseline))
        if before_end is not None:
            before_end(run)
        run.finish()
        del subject
        free_memory()

    def _keep_originals(
        self, work: PlannedRun, run: Run, ref: str | Path, todo: list[str], baseline_ref: str | None
    ) -> tuple[dict[str, Any], list[str]]:
        """What tasks need of the original, where that is left on disk before the model is loaded, and the tasks that
        can be measured. The original is let go of where no task needs more of it."""
        from quantlab.evals.kept_original import Unloaded

        wanting = [task for task in todo if task_of(task).needs_baseline]
        if baseline_ref is None or not wanting:
            return {}, todo
        dtype = work.recipe.dtype
        original = Unloaded(
            baseline_ref,
            dtype,
            self.device,
            lambda wish: (
                self.baseline(baseline_ref, dtype) if wish == dtype else self.load(baseline_ref, wish)
            ),
            self.release,
            self.trust_remote_code,
        )
        subject = Unloaded(
            ref,
            dtype_of(work),
            self.device,
            lambda wish: self.load(ref, wish, runtime_of(work.recipe)),
            trust_remote_code=self.trust_remote_code,
        )
        kept: dict[str, Any] = {}
        for task in wanting:
            if not task_of(task).keeps:
                continue
            keep = load(task_of(task).keeps)
            started = time.perf_counter()
            try:
                found = keep(subject, original, work.recipe.tasks.of(task), self.progress)
            except NotANumber as error:
                self._not_a_number(work, run, task, error)
                todo = [other for other in todo if other != task]
                continue
            if found is not None:
                kept[task] = found
                run.log("original", task=task, seconds=round(time.perf_counter() - started, 3), **found.form)
        if all(task in kept for task in todo if task_of(task).needs_baseline):
            self.release()
        return kept, todo

    def _not_a_number(self, work: PlannedRun, run: Run, task: str, error: NotANumber) -> None:
        """Keep the error with the run and go on with what else there is to measure."""
        run.record["errors"][task] = str(error)
        run.log("error", task=task, message=str(error))
        self.errors.append(f"{work.name}: {error}")
        self.progress.note(f"error: {work.name}: {error}")


@dataclass(frozen=True)
class Entry:
    """A run that is open, and where its model is."""

    work: PlannedRun
    run: Run
    ref: str | Path


def dtype_of(work: PlannedRun) -> str:
    """What the model of a run is loaded in: a checkpoint says itself in which type it computes."""
    recipe = work.recipe
    return "auto" if isinstance(recipe, QuantizeRecipe) and not work.is_baseline else recipe.dtype


def runtime_of(recipe: Recipe) -> str:
    """What computes the model of a run."""
    return recipe.runtime if isinstance(recipe, EvaluateRecipe) else TRANSFORMERS


def _speed_options(entry: Entry) -> SpeedOptions:
    options = entry.work.recipe.tasks.of("speed")
    assert isinstance(options, SpeedOptions)
    return options


def _contestant(entry: Entry, baseline: Contestant | None) -> Contestant:
    from quantlab.evals.speed import Contestant

    one = Contestant(str(entry.ref), entry.work.name, dtype_of(entry.work), runtime_of(entry.work.recipe))
    return baseline if baseline is not None and replace(one, label=baseline.label) == baseline else one


def compare(run: Run, baseline: Run) -> dict[str, Any]:
    """ppl_ratio, the items lost and gained, and tokens per second: the ratio that was taken in turns with the baseline
    times what the baseline's row says, which may have been measured when the machine was faster or slower. So the rows
    of a leaderboard do not contradict each other; what was measured is in the task's own metrics."""
    found: dict[str, Any] = {"parent": baseline.run_id}
    mine, other = run.row.get("ppl"), baseline.row.get("ppl")
    if mine and other:
        found["ppl_ratio"] = mine / other
        if interval := _ppl_ratio_interval(run, baseline):
            found["ppl_ratio_low"], found["ppl_ratio_high"] = interval
    for kind in ("prefill", "decode"):
        ratio, pace = run.row.get(f"{kind}_ratio"), baseline.row.get(f"{kind}_tok_s")
        if ratio and pace:
            found[f"{kind}_tok_s"] = ratio * pace
    before, after = verdicts(baseline), verdicts(run)
    if before and after:
        found["lost"], found["gained"] = flips(before, after)
    return found


def _ppl_ratio_interval(run: Run, baseline: Run) -> tuple[float, float] | None:
    """95 % interval of the ratio of perplexities, paired by window; None where a record has no losses of windows or
    they are of another text."""
    mine, other = (one.record["tasks"].get("perplexity", {}).get("details", {}) for one in (run, baseline))
    if any(mine.get(key) != other.get(key) for key in ("text_digest", "seq_len", "windows")):
        return None
    before, after = other.get("window_nll"), mine.get("window_nll")
    if not before or not after or len(before) != len(after):
        return None
    scored = mine["seq_len"] - 1
    return ratio_interval([value / scored for value in before], [value / scored for value in after])


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def environment() -> dict[str, Any]:
    """Versions that decide numbers, and the machine's kind."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    for package in (
        "torch",
        "transformers",
        "gptqmodel",
        "compressed-tensors",
        "gguf",
        "llama-cpp-python",
        "bitsandbytes",
        "peft",
        "trl",
        "sqlglot",
        "lm-eval",
        "numpy",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def free_memory() -> None:
    gc.collect()
    import torch

    from quantlab.models.memory import trim

    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
