"""Measuring what is stored: the tasks one by one on a model reloaded from disk, then the baseline comparison."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.commands.planned_run import PlannedRun
from quantlab.errors import NotANumber
from quantlab.evals import run_task
from quantlab.progress import Progress
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.tasks import SpeedOptions, task_of
from quantlab.runs.run import Run, verdicts
from quantlab.stats import flips

if TYPE_CHECKING:
    from quantlab.evals.speed import Contestant
    from quantlab.models.load import LoadedModel


class Evaluator:
    """Where models are measured: the device, the progress, and the baseline model kept loaded between runs."""

    def __init__(self, device: str, trust_remote_code: bool, progress: Progress) -> None:
        self.device = device
        self.trust_remote_code = trust_remote_code
        self.progress = progress
        self.errors: list[str] = []  # measurements that came out as NaN
        self._kept: tuple[tuple[str, str], LoadedModel] | None = None

    def load(self, ref: str | Path, dtype: str) -> LoadedModel:
        from quantlab.models.load import load_model

        return load_model(ref, device=self.device, dtype=dtype, trust_remote_code=self.trust_remote_code)

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
        recipe, own_baseline = work.recipe, baseline_ref is None
        subject = (
            self.baseline(work.model, recipe.dtype) if work.is_baseline else self.load(ref, dtype_of(work))
        )
        run.row.update(
            params=work.row.get("params") or subject.params,
            size_bytes=subject.size_bytes,
            device=device_name(subject.device),
        )
        run.row["bits_per_weight"] = 8 * subject.size_bytes / run.row["params"]
        run.record["environment"] = environment()
        run.record["data"] = dict(work.data)
        run.record["errors"] = {}
        for task in recipe.evaluate:
            known = task_of(task)
            if task in run.record["tasks"] or known.in_turn or (known.needs_baseline and own_baseline):
                continue
            reference = (
                self.baseline(baseline_ref, recipe.dtype) if known.needs_baseline and baseline_ref else None
            )
            started = time.perf_counter()
            try:
                with self.progress.task(f"{work.name}: {task}"):
                    result = run_task(
                        task, subject, recipe.tasks.of(task), baseline=reference, progress=self.progress
                    )
            except NotANumber as error:
                self._not_a_number(work, run, task, error)
                continue
            run.add(result)
            seconds = round(time.perf_counter() - started, 3)
            run.log("measured", task=task, seconds=seconds, metrics=result.metrics)
        if baseline is not None:
            run.row.update(compare(run, baseline))
        if before_end is not None:
            before_end(run)
        run.finish()
        del subject
        free_memory()

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


def _speed_options(entry: Entry) -> SpeedOptions:
    options = entry.work.recipe.tasks.of("speed")
    assert isinstance(options, SpeedOptions)
    return options


def _contestant(entry: Entry, baseline: Contestant | None) -> Contestant:
    from quantlab.evals.speed import Contestant

    dtype = dtype_of(entry.work)
    if baseline is not None and (str(entry.ref), dtype) == (str(baseline.ref), baseline.dtype):
        return baseline
    return Contestant(str(entry.ref), entry.work.name, dtype)


def compare(run: Run, baseline: Run) -> dict[str, Any]:
    """ppl_ratio, the items lost and gained, and tokens per second: the ratio that was taken in turns with the baseline
    times what the baseline's row says, which may have been measured when the machine was faster or slower. So the rows
    of a leaderboard do not contradict each other; what was measured is in the task's own metrics."""
    found: dict[str, Any] = {"parent": baseline.run_id}
    mine, other = run.row.get("ppl"), baseline.row.get("ppl")
    if mine and other:
        found["ppl_ratio"] = mine / other
    for kind in ("prefill", "decode"):
        ratio, pace = run.row.get(f"{kind}_ratio"), baseline.row.get(f"{kind}_tok_s")
        if ratio and pace:
            found[f"{kind}_tok_s"] = ratio * pace
    before, after = verdicts(baseline), verdicts(run)
    if before and after:
        found["lost"], found["gained"] = flips(before, after)
    return found


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

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
