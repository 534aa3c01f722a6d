"""`quantlab distill`: a recipe (or every cell of its sweep) → cleaned rows → a trained student → before and after.

The teacher's answers are in the ledger, the cleaned rows in `results/data/`, the training's checkpoints beside the
student's directory, the measurements in the run: whatever was finished is not done again with --resume.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quantlab.commands.distill_plan import Options
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.quantize import check_device, fail_for
from quantlab.distill.processes import is_first_process
from quantlab.distill.sweep import Cell, cells
from quantlab.errors import RecipeError
from quantlab.progress import Progress, Silent, default_progress
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import find_recipe, load_recipe


def run(name: str, options: Options, *, as_json: bool = False) -> None:
    """The verb."""
    path = find_recipe(name)
    recipe = load_recipe(path, options.overrides)
    if not isinstance(recipe, DistillRecipe):
        raise RecipeError(f"{path}: kind: {recipe.kind} is not for `quantlab distill`")
    first = is_first_process()
    with stdout_is_stderr():
        progress = default_progress() if first else Silent()
        label = path.stem
        if options.overrides and recipe.digest() != load_recipe(path).digest():
            label += f"-{recipe.digest()[:6]}"
        summary = distill(label, recipe, options, progress)
    if first:
        show(summary, as_json=as_json)
        fail_for(summary)


def distill(name: str, recipe: DistillRecipe, options: Options, progress: Progress) -> dict[str, Any]:
    """Everything between the command line and its last line; returns the summary."""
    from quantlab.commands.distill_cell import run_cell
    from quantlab.commands.distill_plan import dry_run

    check_device(options.device)
    found = cells(recipe, name)
    if options.dry_run:
        return {"status": "dry-run", "recipe": name, "cells": [dry_run(name, c, options) for c in found]}
    outcomes = []
    for number, cell in enumerate(found, start=1):
        if len(found) > 1 and is_first_process():
            progress.note(f"cell {number} of {len(found)}: {cell.label}")
        outcomes.append(run_cell(name, cell, options, progress))
        if recipe.sweep and is_first_process():
            _write_sweep(name, recipe, found[:number], outcomes, options)
    if not is_first_process():
        return {}
    from quantlab.runs.leaderboard import rebuild_leaderboard

    used = {outcome["run_id"] for outcome in outcomes} | {outcome["base_run_id"] for outcome in outcomes}
    rows = [row for row in rebuild_leaderboard(options.results) if row["run_id"] in used]
    return {
        "status": "done",
        "recipe": name,
        "rows": rows,
        "errors": [message for outcome in outcomes for message in outcome["errors"]],
        "cells": outcomes,
        "leaderboard": str(options.results / "leaderboard.csv"),
        "sweep": str(_sweep_folder(name, recipe, options)) if recipe.sweep else None,
    }


def _sweep_folder(name: str, recipe: DistillRecipe, options: Options) -> Path:
    axes = json.dumps([recipe.digest(), recipe.sweep], sort_keys=True)
    return options.results / "sweeps" / f"{name}-{hashlib.sha256(axes.encode()).hexdigest()[:8]}"


def _write_sweep(
    name: str, recipe: DistillRecipe, done: list[Cell], outcomes: list[dict[str, Any]], options: Options
) -> None:
    """The plots and the table of a sweep, as far as it has come."""
    from quantlab.report.sweep_plots import write_sweep
    from quantlab.runs.leaderboard import rebuild_leaderboard

    rows = {row["run_id"]: row for row in rebuild_leaderboard(options.results)}
    cells_rows = [
        rows[outcome["run_id"]] | dict(cell.point) for cell, outcome in zip(done, outcomes, strict=True)
    ]
    bases = [rows[run_id] for run_id in {outcome["base_run_id"] for outcome in outcomes} if run_id in rows]
    write_sweep(_sweep_folder(name, recipe, options), recipe.sweep, cells_rows, bases=bases, title=name)


def show(summary: dict[str, Any], *, as_json: bool) -> None:
    """The summary for people, or as one JSON document."""
    if as_json:
        print_json(summary)
        return
    if summary["status"] == "dry-run":
        shown: list[dict[str, Any]] = []
        for cell in summary["cells"]:
            _show_plan(cell, cell["estimates"] in shown)
            shown.append(cell["estimates"])
        return
    from quantlab.report.leaderboard import print_table

    for outcome in summary["cells"]:
        if outcome["label"]:
            print(f"\n== {outcome['label']}")
        for part in ("cleaning", "spent", "training", "comparison"):
            if outcome[part]:
                print(f"\n{outcome[part]}")
    print()
    print_table(summary["rows"])
    for outcome in summary["cells"]:
        print(f"student{' ' + outcome['label'] if outcome['label'] else ''}: {outcome['checkpoint']}")
    print(f"leaderboard: {summary['leaderboard']}")
    if summary["sweep"]:
        print(f"plots of the sweep: {summary['sweep']}/sweep.html")


def _show_plan(cell: dict[str, Any], same: bool) -> None:
    title = cell["label"] or cell["student"]
    print(f"{title}: {', '.join(cell['steps']) or 'nothing left to do'}; run {cell['run_id']}")
    for name, cost in cell["estimates"].items():
        if same:
            print(f"  {name}: the requests of an earlier cell, which are paid once")
            continue
        money = f"{cost['usd']:.4f} USD" if cost["priced"] else "no price known (set price: {input, output})"
        print(
            f"  {name}: {cost['requests']:,} requests ({cost['cached']:,} more are in the ledger), "
            f"{cost['input_tokens']:,} tokens in, {cost['output_tokens']:,} out, {money}"
        )
        if cost["basis"]:
            print(f"    {cost['basis']}")
    print(f"  rows: {cell['rows']:,} in {cell['source']}; student: {cell['checkpoint']}")
    if cell["unreadable"]:
        print(f"  {len(cell['unreadable'])} more cannot be read; one says: {cell['unreadable'][0]}")
