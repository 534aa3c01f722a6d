"""What a recipe without a sweep will do, before anything heavy: its data, its names, its run, what exists already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantlab.calibration import read_texts
from quantlab.commands.defaults import settle
from quantlab.commands.planned_run import (
    PlannedRun,
    check_weights,
    open_model,
    plan_work,
    refuse_existing,
    stored_as,
    stored_bits,
    text_digest,
)
from quantlab.distill.prepare import Source, estimates, read_source
from quantlab.distill.sweep import Cell
from quantlab.errors import MachineError, RecipeError
from quantlab.models.provenance import provenance
from quantlab.models.refusals import refuse_wrapper
from quantlab.models.safetensors.files import ModelFiles
from quantlab.paths import file_digest, find_source, short_hash, slug
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.text2sql.data.dataset import digest, on_the_hub
from quantlab.text2sql.prompt.for_model import template_of
from quantlab.text2sql.prompt.template import bundled_template


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    out: Path | None = None
    results: Path = Path("results")
    ledger: Path | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    resume: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False

    @property
    def book(self) -> Path:
        return self.ledger or self.results / "ledger.sqlite"


@dataclass
class Plan:
    """What one cell will do. `work` is the student's run, `base` that of the model it starts from."""

    cell: Cell
    recipe: DistillRecipe
    files: ModelFiles
    work: PlannedRun
    base: PlannedRun
    out: Path
    made: bool  # the student is there already
    measured: bool
    # rows, read once; None for plain text and for the hub, which planning does not fetch
    source: Source | None


def plan_cell(name: str, cell: Cell, options: Options) -> Plan:
    """Names, digests and directories, refused where something is in the way. Imports nothing heavy."""
    _need_reporters(cell.recipe.train.report_to)
    files = open_model(cell.recipe.student.model)
    refuse_wrapper(files)
    recipe = settle(cell.recipe, files)
    label = f"{name}-{cell.label}" if cell.label else name
    at_hand = recipe.data.format != "text" and not on_the_hub(recipe.data.source)
    source = read_source(recipe) if at_hand else None
    decides = [_source_digest(recipe, source)]
    if recipe.train.logits is not None:
        decides.append(open_model(recipe.train.logits.model).digest)
    work = plan_work(label, recipe, recipe.student.model, files, options.results, decides)
    bits = stored_bits(files) if files.quantized is None else stored_as(files)["bits"]
    work.row.update(stage="student", method=recipe.student.mode, bits=bits, format="none")
    plain = QuantizeRecipe(method="none", dtype=recipe.dtype, evaluate=recipe.evaluate, tasks=recipe.tasks)
    base = plan_work("none", plain, recipe.student.model, files, options.results)
    base.row.update(
        {"params": files.params if files.quantized is None else None},
        **(stored_as(files) | {"parent": provenance(files.path).get("parent")}),
    )
    root = options.out or Path("checkpoints") / slug(recipe.student.model)
    out = (root / cell.label if cell.label else root) if options.out else root / label
    made = _is_ours(out, work, options)
    found = work.existing()
    if found is not None and not options.resume:
        refuse_existing(work, found)
    measured = made and found is not None and found.done
    check_weights(files)
    return Plan(cell, recipe, files, work, base, out, made, measured, source)


def _need_reporters(names: Sequence[str]) -> None:
    """Loggers are not installed with quantlab; a missing one is the first thing to know."""
    for name in names:
        if find_spec(name) is None:
            raise MachineError(
                f"train.report_to names {name}, which is not installed", hint=f"pip install {name}"
            )


def _source_digest(recipe: DistillRecipe, source: Source | None) -> str:
    """What decides the rows: the source's content, and what is asked about it is in the recipe's digest."""
    if recipe.data.format == "text":
        return text_digest(recipe.data.source)
    parts = [recipe.data.source] if source is None else [digest(source.items), digest(source.evaluated)]
    options = recipe.tasks.text2sql
    hinted = source is not None and any(item.evidence for item in source.items)
    if hinted or options.shots or options.chat != "never" or options.linker != "none":
        parts.append("asked as evaluated")  # students that were not, before this was so, are others
    if source is None:
        if options.prompt.file is not None:
            parts.append(template_of(options.prompt, ()).digest)
        return short_hash(parts)
    if source.template.digest != bundled_template("ko").digest:  # the only one, before there were others
        parts.append(source.template.digest)
    if recipe.teacher is not None and recipe.teacher.model.startswith("file:"):
        parts.append(file_digest(find_source(recipe.teacher.model.removeprefix("file:"))))
    return short_hash(parts)


def _is_ours(out: Path, work: PlannedRun, options: Options) -> bool:
    """Whether `out` holds this very student; anything else there is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = provenance(out)
    if not options.resume:
        goes_on = "pass --resume to continue, or " if found else "pass "
        raise RecipeError(f"{out} is not empty", hint=f"{goes_on}another --out")
    if found.get("run_id") != work.run_id:
        raise RecipeError(
            f"{out} contains a student of another recipe, model or data",
            hint="pass another --out",
        )
    return True


def dry_run(name: str, cell: Cell, options: Options) -> dict[str, Any]:
    """What the cell would do and cost; no network, nothing written."""
    plan = plan_cell(name, cell, options)
    text = plan.recipe.data.format == "text"
    source = None if text else plan.source or read_source(plan.recipe)
    items = source.items if source is not None else []
    costs = {} if plan.made or text else estimates(plan.recipe, items, options.book)
    rows = len(read_texts(plan.recipe.data.source)[: plan.recipe.data.limit]) if text else len(items)
    steps = [] if plan.measured else ["measure the base", "measure the student"]
    if not plan.made:
        steps = ["prepare the rows", f"train ({plan.recipe.student.mode})", *steps]
    return {
        "label": cell.label,
        "student": plan.recipe.student.model,
        "steps": steps,
        "run_id": plan.work.run_id,
        "checkpoint": str(plan.out),
        "source": plan.recipe.data.source,
        "rows": rows,
        "unreadable": [row.reason for row in source.bad] if source is not None else [],
        "estimates": costs,
    }
