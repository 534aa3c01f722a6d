"""`quantlab quantize`: recipes → checkpoints → measurements of what was saved → leaderboard.

Everything that can be refused is refused before anything heavy is imported: recipes, data, the model's files, the shape
of its layers, the output directories. Then one call quantizes by all recipes (sharing the calibration pass), and each
checkpoint is reloaded from disk and measured. The untouched model is the baseline; it is measured once, as a run
of its own (the `none` recipe among those given, an earlier run, or one that is added here).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.commands.calibration import in_short, previews
from quantlab.commands.defaults import note_texts, settle, settle_texts
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.measure import Entry, Evaluator
from quantlab.commands.planned_run import (
    COMPARED,
    PlannedRun,
    check_data,
    check_weights,
    find_baseline,
    open_model,
    plan_work,
    refuse_existing,
    serves_as_baseline,
    start_run,
    stored_as,
)
from quantlab.errors import DataError, RecipeError
from quantlab.models.provenance import provenance
from quantlab.models.safetensors.files import ModelFiles
from quantlab.paths import slug
from quantlab.progress import Progress, default_progress
from quantlab.quant.checkpoint_paths import tidy
from quantlab.quant.jobs import described
from quantlab.quant.pipeline import Job, Outcome, Settings, check, quantize
from quantlab.recipe.load import Recipe, find_recipe, load_recipe
from quantlab.recipe.quantize import QuantizeRecipe, usable
from quantlab.registry.formats import Readers, readers
from quantlab.registry.tasks import task_of
from quantlab.report.model_card import write_model_card
from quantlab.runs.leaderboard import rebuild_leaderboard
from quantlab.runs.run import Run

USUAL_SIZE = 128  # what `group_size: auto` comes to for most models


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    model: str
    out: Path | None = None
    results: Path = Path("results")
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    evaluate: bool = True
    resume: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    memory_limit: int | None = None  # bytes
    save_statistics: Path | None = None
    save_imatrix: Path | None = None
    statistics: Path | None = None
    verify: bool = True


@dataclass
class Item:
    """One recipe on its way: where its checkpoint goes, its run, and what is left to do."""

    work: PlannedRun
    out: Path | None  # None: the model itself
    solve: bool = True
    measure: bool = True
    outcome: Outcome | None = None

    @property
    def recipe(self) -> QuantizeRecipe:
        assert isinstance(self.work.recipe, QuantizeRecipe)
        return self.work.recipe


def run(names: Sequence[str], options: Options, *, as_json: bool = False) -> None:
    """The verb: do the work, then print the ranked table (or one JSON document) on stdout."""
    recipes = load_recipes(names, options.overrides)
    with stdout_is_stderr():
        summary = quantize_and_measure(recipes, options, default_progress())
    show(summary, as_json=as_json)
    fail_for(summary)


def fail_for(summary: Mapping[str, Any]) -> None:
    """Leave with the exit code of bad data where something could not be measured, after everything else was shown."""
    if summary.get("errors"):
        for message in summary["errors"]:
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(DataError.exit_code)


def show(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    if summary["status"] == "dry-run":
        for item in summary["plan"]:
            print(f"{item['recipe']}: {', '.join(item['steps']) or 'nothing left to do'}; run {item['run_id']}"
                  + (f"; checkpoint {item['checkpoint']}" if item["checkpoint"] else ""))  # fmt: skip
        for found in summary["calibration"]:
            print("\n".join(in_short(found)))
        return
    if summary["rows"]:
        from quantlab.report.leaderboard import print_table

        print_table(summary["rows"])
    for name, chosen in summary.get("types", {}).items():
        from quantlab.quant.mixed_precision.choose_types import table

        print("\n".join([f"types of {name}: {table(chosen)[0]}", *table(chosen)[1:]]))
    for name, path in summary["checkpoints"].items():
        print(f"checkpoint of {name}: {path} ({summary['readers'][name]})")
    if summary["leaderboard"]:
        print(f"leaderboard: {summary['leaderboard']}")


def load_recipes(names: Sequence[str], overrides: Sequence[str]) -> list[tuple[str, QuantizeRecipe]]:
    """The recipes with the overrides. Of several recipes, those whose method has no use for a key go without it, as
    long as one has: `--set calibration.rows=64` may be said of `rtn-int4 gptq-int4`."""
    paths = [find_recipe(name) for name in names]
    plain = [_only_quantize(path, load_recipe(path)) for path in paths]
    if any(override.startswith("method=") for override in overrides):
        return [(n, _only_quantize(p, load_recipe(p, overrides))) for n, p in zip(names, paths, strict=True)]
    found = []
    for name, path, recipe in zip(names, paths, plain, strict=True):
        mine = [
            o for o in overrides if usable(o, recipe.method) or not any(usable(o, r.method) for r in plain)
        ]
        found.append((name, _only_quantize(path, load_recipe(path, mine))))
    return found


def _only_quantize(path: Path, recipe: Recipe) -> QuantizeRecipe:
    if not isinstance(recipe, QuantizeRecipe):
        raise RecipeError(f"{path}: kind: {recipe.kind} is not for `quantlab quantize`")
    return recipe


def quantize_and_measure(
    recipes: Sequence[tuple[str, QuantizeRecipe]], options: Options, progress: Progress
) -> dict[str, Any]:
    """Everything between the command line and its last line; returns the summary."""
    check_device(options.device)
    files = open_model(options.model, progress)
    if said := note_texts([recipe for _, recipe in recipes], files, measured=options.evaluate):
        progress.note(said)
    trust = options.trust_remote_code
    for _, recipe in recipes:
        check_data(settle_texts(recipe, files), files, measured=options.evaluate)
    written = recipes
    recipes = [(name, settle(recipe, files, trust)) for name, recipe in written]
    for (name, recipe), (_, before) in zip(recipes, written, strict=True):
        # a misfit is the first thing to know, before what is in the way
        check(recipe, files, trust_remote_code=trust)
        _note_layers(name, before, recipe, files, progress)
    items = plan_items(recipes, options, files)
    for item in items:
        if item.solve and item.out is not None:
            check(item.recipe, files, item.out, trust)
    check_weights(files)
    if options.dry_run:
        found = previews([item.recipe for item in items if item.solve], files, trust)
        plan = [_steps(item) for item in items]
        return {"status": "dry-run", "model": options.model, "plan": plan, "calibration": found}
    _solve(items, files, options, progress)
    rows, board, errors = _measure(items, options, progress) if options.evaluate else ([], None, [])
    for item in items:
        if item.out is not None:
            write_model_card(item.out, next((r for r in rows if r["run_id"] == item.work.run_id), None))
    return {
        "status": "done",
        "model": options.model,
        "rows": rows,
        "errors": errors,
        "leaderboard": str(board) if board else None,
        "checkpoints": {item.work.name: str(item.out) for item in items if item.out is not None},
        "readers": {item.work.name: _readers(item).text for item in items if item.out is not None},
        "shared_calibration": [i.work.name for i in items if i.outcome and i.outcome.shared_calibration],
        "types": {item.work.name: made for item in items if (made := _types(item))},
        "skipped": [i.work.name for i in items if not i.solve and not i.measure],
    }


def _note_layers(
    name: str, written: QuantizeRecipe, recipe: QuantizeRecipe, files: ModelFiles, progress: Progress
) -> None:
    """Say which layers stay in 16 bits, where any do, and a group size or format that was chosen for the model."""
    said = described(recipe, files)
    sized = written.group_size == "auto" and recipe.group_size != USUAL_SIZE
    if sized or len(said) > 1 or written.format != recipe.format:
        for line in said:
            progress.note(f"{Path(name).name.removesuffix('.yaml')}, {recipe.format}: {line}")


def check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise RecipeError(f"--device {device}: expected auto, cpu, cuda, or cuda:<number>")


def plan_items(
    recipes: Sequence[tuple[str, QuantizeRecipe]], options: Options, files: ModelFiles
) -> list[Item]:
    """Names, run ids and directories of every recipe, refused where something is in the way; baseline runs first."""
    items: list[Item] = []
    labels: set[str] = set()
    for number, (name, recipe) in enumerate(recipes):
        if any(recipe.digest() == earlier.digest() for _, earlier in recipes[:number]):
            raise RecipeError(f"{name}: this recipe is given twice")
        label = find_recipe(name).stem if Path(name).suffix != ".yaml" else Path(name).stem
        if options.overrides or label in labels:
            label = f"{label}-{recipe.digest()[:6]}"
        labels.add(label)
        items.append(_item(label, recipe, options, files, alone=len(recipes) == 1))
    if options.evaluate:
        for item in list(items):
            if not item.work.is_baseline and set(COMPARED) & set(item.recipe.evaluate):
                items = _with_baseline(item, items, options, files)
    return sorted(items, key=lambda item: not item.work.is_baseline)


def _item(label: str, recipe: QuantizeRecipe, options: Options, files: ModelFiles, *, alone: bool) -> Item:
    work = plan_work(label, recipe, options.model, files, options.results, measured=options.evaluate)
    plain = recipe.method == "none"
    work.row["params"] = files.params if files.quantized is None else None
    if plain:
        work.row.update(stored_as(files), parent=provenance(files.path).get("parent"))
    else:
        work.row.update(
            stage="quantized",
            parent=options.model,
            method=recipe.method,
            bits=recipe.target_bits or _bits_of_size(recipe, files) or recipe.bits,
            group_size=recipe.group_size,
            format=recipe.format,
        )
    folder = (
        options.out
        if alone and options.out
        else (options.out or Path("checkpoints") / slug(options.model)) / label
    )
    item = Item(work, None if plain else folder, solve=not plain, measure=options.evaluate)
    _settle(item, options)
    return item


def _bits_of_size(recipe: QuantizeRecipe, files: ModelFiles) -> float | None:
    """What a size that a recipe allows comes to, in bits a parameter."""
    return None if recipe.size is None else round(8 * recipe.size / max(files.params, 1), 2)


def _settle(item: Item, options: Options) -> None:
    """Decide what is left to do for an item, and refuse what is in its way."""
    out, work = item.out, item.work
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        made = provenance(out)
        if not options.resume:
            goes_on = "pass --resume to continue, or " if made else "pass "
            raise RecipeError(f"{out} is not empty", hint=f"{goes_on}another --out")
        if (made.get("recipe_digest"), made.get("parent_digest")) != (
            work.row["recipe_digest"],
            work.files.digest,
        ):
            raise RecipeError(
                f"{out} contains a checkpoint from another recipe or model",
                hint="pass another --out",
            )
        item.solve = False
        tidy(out)  # what a kill between naming the checkpoint and cleaning up left behind
    found = work.existing() if options.evaluate else None
    if found is None:
        return
    if not options.resume and not work.is_baseline:  # the untouched model's run is reused, not refused
        refuse_existing(work, found)
    item.measure = not found.done or item.solve  # a checkpoint made anew is measured anew


def _with_baseline(item: Item, items: list[Item], options: Options, files: ModelFiles) -> list[Item]:
    """Make sure that a baseline run for `item` is among the items, or finished already."""
    if any(other.work.is_baseline and serves_as_baseline(other.recipe, item.recipe) for other in items):
        return items
    if find_baseline(item.work, files.digest):
        return items
    recipe = QuantizeRecipe(
        method="none", dtype=item.recipe.dtype, evaluate=item.recipe.evaluate, tasks=item.recipe.tasks
    )
    return [*items, _item("none", recipe, options, files, alone=False)]


def _solve(items: Sequence[Item], files: ModelFiles, options: Options, progress: Progress) -> None:
    todo = [item for item in items if item.solve and item.out is not None]
    if not todo:
        return
    jobs = [Job(item.work.name, item.recipe, item.out) for item in todo if item.out is not None]
    with progress.task("quantizing"):
        outcomes = quantize(
            jobs,
            files,
            progress=progress,
            settings=Settings(
                device=options.device,
                resume=options.resume,
                trust_remote_code=options.trust_remote_code,
                memory_limit=options.memory_limit,
                save_statistics=options.save_statistics,
                save_imatrix=options.save_imatrix,
                statistics=options.statistics,
                verify=options.verify,
                early=True,  # plans are made from headers
            ),
        )
    for item, outcome in zip(todo, outcomes, strict=True):
        item.outcome = outcome


def _measure(
    items: Sequence[Item], options: Options, progress: Progress
) -> tuple[list[dict[str, Any]], Path, list[str]]:
    """Measure what is left, rebuild the leaderboard after every run; returns the rows of these runs, ranked, and what
    could not be measured."""
    bench = Evaluator(options.device, options.trust_remote_code, progress)
    for item in items:
        if not item.measure:
            progress.note(f"{item.work.name}: measured already, run {item.work.run_id}")
    todo = [(item, _open_run(item, options)) for item in items if item.measure]
    dtype = next((entry.work.recipe.dtype for _, entry in todo), "auto")
    bench.take_turns([entry for _, entry in todo], (options.model, dtype))
    used: set[str] = set()
    entries = {item.work.run_id: entry for item, entry in todo}
    for item in items:
        baseline = None if item.work.is_baseline else find_baseline(item.work, item.work.files.digest)
        used |= {item.work.run_id} | ({baseline.run_id} if baseline else set())
        if entry := entries.get(item.work.run_id):
            compared = None if item.work.is_baseline else options.model
            bench.measure(entry.work, entry.run, entry.ref, baseline, compared)
            rebuild_leaderboard(options.results)
    rows = rebuild_leaderboard(options.results)
    return [row for row in rows if row["run_id"] in used], options.results / "leaderboard.csv", bench.errors


def _open_run(item: Item, options: Options) -> Entry:
    """The run of an item that is to be measured: an interrupted one again, or a new one."""
    existing = item.work.existing()
    anew = existing is None or existing.done or item.solve
    run = start_run(item.work) if existing is None or anew else existing
    _note_outcome(run, item)
    return Entry(item.work, run, options.model if item.out is None else item.out)


def _note_outcome(run: Run, item: Item) -> None:
    """Into run.json: where the checkpoint is and what making it took."""
    if item.out is None:
        run.row["work_seconds"] = 0.0
        return
    made = provenance(item.out)
    run.row["work_seconds"] = made.get("seconds")
    run.record["checkpoint"] = str(item.out)
    run.record["calibration"] = made.get("calibration")
    run.row["calibration"] = calibration_name(made)
    run.record["shared_calibration"] = made.get("shared_calibration", False)
    run.save()


def _readers(item: Item) -> Readers:
    """Who reads an item's checkpoint."""
    made = provenance(item.out) if item.out is not None else {}
    return readers(item.recipe.format, str(made.get("experts_unread") or ""))


def _types(item: Item) -> dict[str, Any]:
    """Which block types were chosen for an item's checkpoint; empty where the recipe names them."""
    made = provenance(item.out) if item.out is not None and item.recipe.opens_types else {}
    return dict(made.get("types") or {})


def calibration_name(made: Mapping[str, Any]) -> str | None:
    """The text that a checkpoint was calibrated on, by source, size and content, or the importance matrix in its place;
    None without one."""
    found = made.get("calibration")
    if not found:
        return None
    if "imatrix" in found:
        return f"{found['imatrix']}#{found['digest'][:8]}"
    return f"{found['source']} {found['rows']}x{found['seq_len']}#{found['digest'][:8]}"


def _steps(item: Item) -> dict[str, Any]:
    tasks = [t for t in item.recipe.evaluate if not (item.work.is_baseline and task_of(t).needs_baseline)]
    steps = (["quantize"] if item.solve else []) + (tasks if item.measure else [])
    return {
        "recipe": item.work.name,
        "steps": steps,
        "run_id": item.work.run_id,
        "checkpoint": str(item.out) if item.out else None,
    }
