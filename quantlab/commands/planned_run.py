"""A piece of work before it runs: one recipe on one model, its data checked, its run named, what exists already.

A run id is made of the model's and the recipe's name and a hash of what decides the result (recipe, model and data
digest), so the same experiment always has the same directory, and anything that changes it has another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from quantlab import __version__
from quantlab.calibration.documents import identities, read_documents, read_texts
from quantlab.calibration.importance import imatrix_digest
from quantlab.errors import DataError, RecipeError
from quantlab.models.provenance import provenance
from quantlab.models.refusals import refuse_unusable
from quantlab.models.safetensors.files import DTYPE_BYTES, PLAIN_BYTES, ModelFiles, open_files
from quantlab.paths import short_hash, slug
from quantlab.progress import Progress
from quantlab.recipe.base import Calibration
from quantlab.recipe.load import EvaluateRecipe, Recipe, load_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry import load
from quantlab.registry.tasks import TASKS, options_key, task_of
from quantlab.runs.run import Run, read_runs

GGUF_FORMAT = "gguf"  # of a model that is given as a GGUF file, which is the original of what is made from it
# set against the baseline's own numbers
COMPARED = tuple(name for name, task in TASKS.items() if task.compared)


@dataclass(frozen=True)
class PlannedRun:
    """One recipe applied to one model, before it runs. `row` is what the leaderboard knows beforehand."""

    name: str
    recipe: Recipe
    results: Path
    files: ModelFiles
    data: Mapping[str, str]  # task → digest of its data
    model: str
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        return str(self.row["run_id"])

    @property
    def directory(self) -> Path:
        return self.results / "runs" / self.run_id

    @property
    def is_baseline(self) -> bool:
        return isinstance(self.recipe, QuantizeRecipe) and self.recipe.method == "none"

    def existing(self) -> Run | None:
        return Run.read(self.directory) if (self.directory / "run.json").exists() else None


def open_model(ref: str | Path, progress: Progress | None = None) -> ModelFiles:
    """The files of a model that something is to be done with, refused where nothing can be.

    Raises:
        DataError: as ``models.files.open_files`` and ``models.refusals.refuse_unusable``.
    """
    files = open_files(ref)
    refuse_unusable(files)
    if progress is not None and files.found.note:
        progress.note(f"{files.name}: {files.found.note}")
    return files


def check_weights(files: ModelFiles) -> None:
    """Read every weight once, when everything cheaper has been checked. DataError for NaN and infinity."""
    from quantlab.models.finite import refuse_nonfinite

    refuse_nonfinite(files)


def plan_work(
    name: str,
    recipe: Recipe,
    model: str,
    files: ModelFiles,
    results: Path,
    decides: Sequence[str] = (),
    *,
    measured: bool = True,
) -> PlannedRun:
    """Check the data of every task and name the run; `decides` are digests of what else decides the result, `measured`
    says whether the tasks will run. Imports nothing heavy."""
    check_lengths(recipe, files, measured=measured)
    tasks = recipe.evaluate if measured else []
    data = {task: digest for task in tasks if (digest := data_digest(recipe, task))}
    sources = [f"{task}={digest}" for task, digest in sorted(data.items())]
    if isinstance(recipe, QuantizeRecipe) and (digest := looked_at(recipe)):
        sources.append("calibration=" + digest)
    short = short_hash([recipe.digest(), files.digest, *sources, *decides])[:8]
    row = {
        "run_id": f"{slug(model)}-{slug(name)}-{short}",
        "model": model,
        "recipe_digest": recipe.digest(),
        "model_digest": files.digest,
        "data_digest": short_hash(sorted(set(data.values()))) if data else None,
        "quantlab_version": __version__,
    }
    return PlannedRun(name, recipe, results, files, data, model, row)


def check_data(recipe: Recipe, files: ModelFiles, *, measured: bool = True) -> None:
    """Refuse data that is bad, before anything heavy is imported; that of tasks only where they are `measured`."""
    check_lengths(recipe, files, measured=measured)
    for task in recipe.evaluate if measured else []:
        data_digest(recipe, task)
    if isinstance(recipe, QuantizeRecipe):
        looked_at(recipe)


def looked_at(recipe: QuantizeRecipe) -> str:
    """Digest of what a recipe is calibrated on, text or importance matrix; "" where that is nothing. DataError for data
    that is bad, or that is not what the recipe names."""
    if (file := recipe.imatrix_file) is not None:
        found, wanted = imatrix_digest(file), recipe.calibration.imatrix_digest
        if wanted is not None and found != wanted:
            raise DataError(
                f"{file} is another importance matrix than the recipe's: its digest is {found}, not {wanted}",
                hint="give the file that the recipe was made for, or leave calibration.imatrix_digest out",
            )
        return found
    return calibration_digest(recipe.calibration) if recipe.needs_calibration else ""


def check_lengths(recipe: Recipe, files: ModelFiles, *, measured: bool = True) -> None:
    """Refuse windows longer than the model's positions, all at once and with what to set; those of tasks only where
    they are `measured`."""
    longest = files.positions
    if longest is None:
        return
    tasks = recipe.evaluate if measured else []
    wanted = {f"tasks.{key}.seq_len": options.seq_len for key, options in _windowed(recipe, tasks)}
    if isinstance(recipe, QuantizeRecipe) and recipe.needs_calibration:
        wanted["calibration.seq_len"] = recipe.calibration.seq_len
    too_long = {key: value for key, value in wanted.items() if value > longest}
    if too_long:
        raise RecipeError(
            f"{files.name} has {longest} positions; too long: "
            + ", ".join(f"{key} {value}" for key, value in too_long.items()),
            hint=" ".join(f"--set {key}={longest}" for key in too_long),
        )
    for entry in tasks:
        name = entry.partition(":")[0]
        if complaint := TASKS[name].fits(recipe.tasks.of(entry), longest):
            said, (key, value) = complaint
            raise RecipeError(
                f"{files.name} has {longest} positions, {said} of tasks.{options_key(name)}",
                hint=f"--set tasks.{options_key(name)}.{key}={value}",
            )


def _windowed(recipe: Recipe, tasks: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and options of the tasks that are measured on windows of a text."""
    for entry in tasks:
        name = entry.partition(":")[0]
        if TASKS[name].texts:
            yield options_key(name), recipe.tasks.of(entry)


def data_digest(recipe: Recipe, entry: str) -> str:
    """16 hexadecimal characters for the data of a task, "" for a task without. DataError for data that is bad."""
    task, options = task_of(entry), recipe.tasks.of(entry)
    if task.data_digest:
        found: str = load(task.data_digest)(options)
        return found
    texts = [text_digest(getattr(options, key)) for key in task.texts]
    return texts[0] if len(texts) == 1 else short_hash(texts) if texts else ""


def text_digest(source: str) -> str:
    """Digest of a text source; a hub dataset by its name, since fetching it is heavy work."""
    return short_hash([source] if source.startswith("hf:") else read_texts(source))


def calibration_digest(calibration: Calibration) -> str:
    """Digest of the documents of every source; as `text_digest` where that is one of texts."""
    found = [
        short_hash([one.source] if one.source.startswith("hf:") else identities(read_documents(one.source)))
        for one in calibration.sources
    ]
    return found[0] if len(found) == 1 else short_hash(found)


def stored_bits(files: ModelFiles) -> int:
    """Bits of the type that most parameters of a plain model are stored in; of a GGUF file, that of plain weights."""
    if files.plain is not None:
        return 8 * PLAIN_BYTES[files.plain]
    counts: Counter[str] = Counter()
    for tensor in files.tensors.values():
        counts[tensor.dtype] += tensor.count
    return 8 * DTYPE_BYTES.get(counts.most_common(1)[0][0], 2)


def stored_as(files: ModelFiles) -> dict[str, Any]:
    """stage, method, bits, group_size and format of a model as its own files say."""
    config = files.quantized
    made = provenance(files.path)
    if files.encoding is not None:
        width = re.search(r"\d+", files.encoding)
        return {
            "stage": "quantized",
            "method": files.encoding.lower(),
            "bits": int(width[0]) if width else None,
            "format": GGUF_FORMAT,
            "params": files.params,
        }
    if config is None:
        stage = "student" if made.get("kind") == "distill" else "base"
        return {"stage": stage, "method": "none", "bits": stored_bits(files), "params": files.params}
    recipe = made.get("recipe", {})
    kind = str(config.get("quant_method", ""))
    if kind == "bitsandbytes":
        four = bool(config.get("load_in_4bit"))
        found: dict[str, Any] = {
            "method": f"bnb-{config.get('bnb_4bit_quant_type', 'fp4')}" if four else "bnb-int8",
            "bits": 4 if four else 8,
            "group_size": 64 if four else -1,
        }
    else:
        found = {
            "method": recipe.get("method", kind),
            "bits": config.get("bits", recipe.get("target_bits") or recipe.get("bits")),
            "group_size": config.get("group_size", recipe.get("group_size")),
        }
    return {"stage": "quantized", "format": kind, **found}


def serves_as_baseline(candidate: Recipe, recipe: Recipe) -> bool:
    """Whether `candidate` measures the untouched model in the same way wherever `recipe` is compared with it."""
    plain = not isinstance(candidate, QuantizeRecipe) or candidate.method == "none"
    if isinstance(candidate, EvaluateRecipe):
        plain = candidate.runtime == "transformers"
    return (
        plain
        and candidate.dtype == recipe.dtype
        and all(
            task in candidate.evaluate and candidate.tasks.of(task) == recipe.tasks.of(task)
            for task in COMPARED
            if task in recipe.evaluate
        )
    )


def find_baseline(work: PlannedRun, model_digest: str) -> Run | None:
    """A finished run of the untouched model with that digest that serves as the baseline of `work`; for a student,
    also the run that made and measured it."""
    for run in read_runs(work.results):
        measured = run.record.get("output_digest") or run.row.get("model_digest")
        untouched = run.row.get("stage") in ("base", "student") or run.row.get("format") == GGUF_FORMAT
        if measured != model_digest or not untouched:
            continue
        same = all(run.record.get("data", {}).get(t) == work.data[t] for t in COMPARED if t in work.data)
        if same and serves_as_baseline(load_recipe(run.directory / "recipe.yaml"), work.recipe):
            return run
    return None


def start_run(work: PlannedRun) -> Run:
    """The run's directory, opened anew."""
    run = Run.start(work.directory, work.recipe.to_yaml(), work.row)
    run.log("started", model=work.model, recipe=work.name)
    return run


def refuse_existing(work: PlannedRun, found: Run) -> NoReturn:
    """The same recipe, model and data have a run already, and nobody said --resume."""
    state = "was measured already" if found.done else "was started and not finished"
    raise RecipeError(
        f"{work.directory}: this recipe on this model and data {state}",
        hint="pass --resume to skip completed steps, or another --results",
    )
