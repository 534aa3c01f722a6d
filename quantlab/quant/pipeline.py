"""Recipes to checkpoints: one calibration pass for all recipes that can share it.

``quantize`` groups recipes that share calibration rows, so that several recipes cost one pass; methods of a library
with a storage of its own go one after the other. What can be refused beforehand is in ``jobs.py``.

A group goes through four steps: prepare (open the model, draw the rows), solve (``sequential``), assemble, and verify
and publish, each a function here.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab import __version__
from quantlab.errors import DataError, MachineError, RecipeError, first_line
from quantlab.models.refusals import wrapping
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.paths import slug
from quantlab.progress import Progress
from quantlab.quant.jobs import Job, Outcome, check, group_key
from quantlab.quant.selection import select
from quantlab.recipe.base import Calibration
from quantlab.registry import load
from quantlab.registry.formats import FORMATS, Contents
from quantlab.registry.methods import METHODS

if TYPE_CHECKING:
    import torch

    from quantlab.models.blockwise import BlockwiseModel
    from quantlab.models.safetensors.files import TensorInfo
    from quantlab.quant.imatrix_store import ImatrixStore, Importance, Statistics
    from quantlab.quant.mixed_precision.choose import Choice
    from quantlab.quant.mixed_precision.choose_types import TypeChoice
    from quantlab.quant.mixed_precision.error_cost import Seen
    from quantlab.quant.mixed_precision.type_costs import Diagonals
    from quantlab.quant.sequential import Plan, SequentialPass
    from quantlab.quant.verify.reference_logits import ReferencePass
    from quantlab.quant.verify.reload import FreshProcess, Verification

__all__ = ["Job", "Outcome", "Settings", "check", "quantize"]


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; nothing here changes what comes out.

    memory_limit: bytes of resident memory to stay below; activations then lie in files, and freed memory is given back
        at once. None takes what is fastest.
    save_statistics: where to keep the Hessians. save_imatrix: the file for their diagonals, as llama.cpp's importance
        matrix. statistics: where they are, from an earlier run.
    verify: reload every finished checkpoint in a fresh process and compare its logits with the reference.
    early: nothing has been computed in this process yet, so that the fresh one may be forked from it.
    """

    device: str = "auto"
    resume: bool = False
    trust_remote_code: bool = False
    memory_limit: int | None = None
    save_statistics: Path | None = None
    save_imatrix: Path | None = None
    statistics: Path | None = None
    verify: bool = False
    early: bool = False


def quantize(
    jobs: Sequence[Job],
    model: str | ModelFiles,
    *,
    progress: Progress,
    settings: Settings | None = None,
    **changes: Any,
) -> list[Outcome]:
    """Apply every job to one model. Jobs whose calibration is the same share one pass over it.

    Args:
        model: a reference, or its files where they were opened already.
        settings: how; ``changes`` are single fields of it.

    Returns:
        One outcome for each job, in order.

    Raises:
        QuantlabError: as :func:`check`, and for bad calibration data; blocks already written stay, for ``resume``.
    """
    from quantlab.models.finite import refuse_nonfinite
    from quantlab.models.load import pick_device
    from quantlab.quant.checkpoint_paths import claim

    chosen = settings or Settings(**changes)
    files = model if isinstance(model, ModelFiles) else open_files(model)
    for job in jobs:
        check(job.recipe, files, job.out, chosen.trust_remote_code)
    with _reloader(jobs, chosen) as reloader:  # forked before there are locks that it could inherit
        changing = [job for job in jobs if job.recipe.method != "none"]
        for job in changing:
            claim(job.out)
        if changing:
            refuse_nonfinite(files)
        groups = _groups(jobs, chosen)
        device = pick_device(chosen.device)
        outcomes: dict[int, Outcome] = {}
        for i, job in enumerate(jobs):
            method = METHODS[job.recipe.method]
            if method.whole:
                outcomes[i] = _whole_model(job, files, device, progress, chosen.trust_remote_code)
            elif method.solve is None:
                outcomes[i] = Outcome(job, None)
        for number, members in enumerate(groups):
            mine = [jobs[i] for i in members]
            later = replace(chosen, early=False)
            with nullcontext(reloader) if number == 0 else _reloader(mine, later) as process:
                done = _quantize_group(mine, files, device, progress, chosen, process)
            outcomes.update(zip(members, done, strict=True))
    return [outcomes[i] for i in range(len(jobs))]


def _groups(jobs: Sequence[Job], settings: Settings) -> list[list[int]]:
    """The places of jobs that are solved together, those with one calibration and dtype.

    Raises:
        RecipeError: there are several groups, but one set of Hessians is to be kept or read.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, job in enumerate(jobs):
        if METHODS[job.recipe.method].solve:
            groups.setdefault(group_key(job.recipe), []).append(i)
        if job.recipe.imatrix_file is not None and (settings.save_statistics or settings.statistics):
            raise RecipeError(
                f"{job.name}: calibration.imatrix is solved from the importance matrix, not from Hessians",
                hint="leave --statistics and --save-statistics out",
            )
    # Recipes without a need for data ride along with the first group that has one.
    for key in [key for key in groups if not key[0]]:
        other = next((other for other in groups if other[0] and other[1] == key[1]), None)
        if other is not None:
            groups[other] += groups.pop(key)
    if len(groups) > 1 and (settings.save_statistics or settings.statistics or settings.save_imatrix):
        raise RecipeError(
            "these recipes differ in calibration or dtype, so there is no one set of Hessians for them",
            hint="quantize them one after the other",
        )
    return list(groups.values())


def _whole_model(
    job: Job, files: ModelFiles, device: str, progress: Progress, trust_remote_code: bool
) -> Outcome:
    """Let a library quantize and save the model."""
    from safetensors import SafetensorError

    from quantlab.models.blockwise import dtype_of
    from quantlab.models.companions import copy_companions
    from quantlab.quant.checkpoint_paths import partial_path

    started = time.perf_counter()
    method, library = METHODS[job.recipe.method], METHODS[job.recipe.method].requires[-1]
    work = partial_path(job.out)
    if work.exists():
        shutil.rmtree(work)
    with progress.task(f"{job.name}: {library}", total=1) as advance:
        try:
            load(method.whole or "")(
                files.name,
                work,
                job.recipe.method,
                dtype=dtype_of(files, job.recipe.dtype),
                device=device,
                trust_remote_code=trust_remote_code,
                **job.recipe.options().model_dump(),
            )
        except ImportError as error:
            raise MachineError(f"{library} cannot be used: {error}", hint=f"pip install {library}") from error
        except (OSError, SafetensorError) as error:
            raise MachineError(f"cannot write {work}: {error}", hint="is the disk full?") from error
        copy_companions(files.path, work)
        seconds = time.perf_counter() - started
        record = provenance_record(job, files, {}, seconds)
        (work / "quantlab.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        work.rename(job.out)
        advance(1)
    return Outcome(job, job.out, seconds)


@dataclass
class _Group:
    """Jobs that share their calibration, and what they are solved with. ``plans``: one for each job, or one for every
    width where the recipe leaves the widths open."""

    jobs: Sequence[Job]
    files: ModelFiles
    opened: BlockwiseModel
    rows: torch.Tensor | None  # calibration token ids [rows, seq_len]
    calibration: Mapping[str, Any]
    settings: Settings
    progress: Progress
    probe: ReferencePass | None
    importance: Importance | None = None  # in place of rows
    plans: list[list[Plan]] = field(default_factory=list)
    open_plans: dict[str, Plan] = field(default_factory=dict)  # of jobs that leave the widths open
    types: dict[str, TypeChoice] = field(default_factory=dict)  # of jobs that leave the block types open
    diagonals: Diagonals | None = (
        None  # of a pass that was made to choose them, where that is all that is needed
    )
    sensitivity: dict[str, float] = field(default_factory=dict)  # by layer; empty where it was not measured
    # By job, what the error of each layer costs; without those where it cannot be told.
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def sharing(self) -> list[str]:
        """Names of the jobs that are solved from the same pass."""
        return [j.name for j in self.jobs if j.recipe.needs_calibration and j.recipe.propagate != "quantized"]


@dataclass
class _Finished:
    """A job's outcome, and the plan whose checkpoint is assembled."""

    outcome: Outcome
    plan: Plan


def _quantize_group(
    jobs: Sequence[Job],
    files: ModelFiles,
    device: str,
    progress: Progress,
    settings: Settings,
    reloader: FreshProcess | None,
) -> list[Outcome]:
    from quantlab.models.memory import keep_few_kernels, map_large, resident

    if settings.memory_limit is not None:
        map_large()
        keep_few_kernels()
    started, before = time.perf_counter(), resident()
    group = _prepare(jobs, files, device, progress, settings)
    forecasts = _forecasts(group) if settings.verify else []
    walk = _solve(group)
    group.sensitivity = _sensitivities(group)
    solving = sum(plan.seconds for several in group.plans for plan in several)
    common = time.perf_counter() - started - solving
    finished = [
        _assemble_job(group, job, several, walk, common)
        for job, several in zip(jobs, group.plans, strict=True)
    ]
    _verify_and_publish(group, finished, forecasts, before, reloader)
    return [one.outcome for one in finished]


def _reloader(jobs: Sequence[Job], settings: Settings) -> AbstractContextManager[FreshProcess | None]:
    """The process that verifies the checkpoints, started now: it imports libraries while blocks are solved. None where
    nothing is verified, or memory is short."""
    formats = [job.recipe.format for job in jobs if METHODS[job.recipe.method].solve]
    if not settings.verify or settings.memory_limit is not None or not formats:
        return nullcontext()
    from quantlab.quant.verify.reload import FreshProcess

    return FreshProcess(formats, early=settings.early)


def _prepare(
    jobs: Sequence[Job], files: ModelFiles, device: str, progress: Progress, settings: Settings
) -> _Group:
    """Open the model's skeleton, draw the calibration rows, and make the plans."""
    from quantlab.models.blockwise import BlockwiseModel, dtype_of
    from quantlab.models.precision import computed_in
    from quantlab.quant.mixed_precision.choose import width_plans
    from quantlab.quant.verify.reference_logits import ReferencePass, probe_rows

    stored = dtype_of(files, jobs[0].recipe.dtype)
    trust = settings.trust_remote_code
    opened = BlockwiseModel(files, device, computed_in(stored, device), trust, stored=stored)
    rows, calibration = calibration_rows(jobs, files, trust)
    probe = None
    if settings.verify:
        short = probe_rows(rows, int(opened.config.get_text_config().vocab_size))
        probe = ReferencePass(files, short, str(opened.device), plain_dtype(opened), trust)
    importance = _importance(jobs, files, opened)
    if importance is not None:
        calibration = importance.record(
            next(job.recipe.imatrix_file for job in jobs if job.recipe.imatrix_file)
        )
    group = _Group(jobs, files, opened, rows, calibration, settings, progress, probe, importance)
    made: dict[tuple[str, str], TensorInfo] = {}
    planned = [make_plan(job, files, opened, calibration, settings.resume) for job in jobs]
    _choose_types(group, planned)
    for job, plan in zip(jobs, planned, strict=True):
        if FORMATS[job.recipe.format].types:
            plan.outside = _outside_the_blocks(job, files, plan, made, progress)
        if job.recipe.opens_widths:
            group.open_plans[job.name] = plan
            group.plans.append(width_plans(plan, job.recipe.widths, resume=settings.resume))
        else:
            group.plans.append([plan])
    return group


def _importance(jobs: Sequence[Job], files: ModelFiles, opened: BlockwiseModel) -> Importance | None:
    """The importance matrix that the jobs of a group are solved from, if they are."""
    from quantlab.quant.imatrix_store import Importance
    from quantlab.quant.jobs import selection

    having = [job.recipe for job in jobs if job.recipe.imatrix_file is not None]
    if not having:
        return None
    assert having[0].imatrix_file is not None
    wanted = {name for recipe in having for name in selection(recipe, files).widths}
    found = Importance.open(having[0].imatrix_file, sorted(wanted), files)
    found.opened = opened
    return found


def _choose_types(group: _Group, plans: Sequence[Plan]) -> None:
    """Choose the block types of the jobs that leave them open, all from one pass over the calibration rows, and put
    them into their plans. A run that goes on finds its own."""
    from quantlab.quant.mixed_precision.choose_types import put_types, table

    pairs = [(job, plan) for job, plan in zip(group.jobs, plans, strict=True) if job.recipe.opens_types]
    if not pairs:
        return
    assert group.rows is not None
    choices, group.diagonals = put_types(
        [(job.recipe, plan) for job, plan in pairs], group.opened, group.rows, group.progress,
        spilled=group.settings.memory_limit is not None,
        reuse=_kept_statistics(group), keeps=_diagonals_do(group),
    )  # fmt: skip
    for (job, _), choice in zip(pairs, choices, strict=True):
        group.types[job.name] = choice
        for line in table(choice.record()):
            group.progress.note(f"{job.name}: {line}")


def _diagonals_do(group: _Group) -> bool:
    """Whether all jobs of a group can be solved from diagonals of second moments, and nobody wants more."""
    recipes = [job.recipe for job in group.jobs]
    keeps = group.settings.save_statistics or group.settings.save_imatrix or group.settings.statistics
    return not keeps and all(
        METHODS[one.method].diagonal and one.propagate == "original" and not one.overrides for one in recipes
    )


def _kept_statistics(group: _Group) -> Statistics | None:
    """Statistics from an earlier run, if they are to be used."""
    from quantlab.quant.hessian_store import StatisticsStore

    folder = group.settings.statistics
    if folder is None:
        return group.importance
    return StatisticsStore.open(folder, len(group.opened.blocks), _statistics_key(group))


def _statistics_key(group: _Group) -> dict[str, str]:
    """What statistics must have been gathered from to serve a group."""
    return {"model": group.files.digest, "calibration": str(group.calibration.get("digest", ""))}


def _outside_the_blocks(
    job: Job, files: ModelFiles, plan: Plan, made: dict[tuple[str, str], TensorInfo], progress: Progress
) -> dict[str, TensorInfo]:
    """The embedding and the head in block types, by name, in a file of the run's state. What was ``made`` for an
    earlier job is copied; an interrupted run finds its own."""
    from quantlab.formats.gguf.encode import encode_rows
    from quantlab.models.safetensors.tensors import read_tensor
    from quantlab.registry.block_types import BLOCK_TYPES

    wanted = plan.selection.outside
    with progress.task(f"{job.name}: embedding and head", total=len(wanted)) as advance:
        packed: dict[str, torch.Tensor | TensorInfo] = {}
        if not plan.writer.has_outside():
            for name, kind in wanted.items():
                info = files.tensors[f"{name}.weight"]
                packed[f"{name}.{kind}"] = made.get((name, kind)) or encode_rows(
                    partial(read_tensor, info), info.shape, BLOCK_TYPES[kind]
                )
                advance(1)
            plan.writer.write_outside(packed)
    found = plan.writer.outside()
    held = {name: found[f"{name}.{kind}"] for name, kind in wanted.items()}
    made.update({(name, kind): held[name] for name, kind in wanted.items()})
    return held


def _forecasts(group: _Group) -> list[dict[str, Any]]:
    """What each job should take, to be set beside what it took."""
    from quantlab.quant.estimate.forecast import together
    from quantlab.quant.estimate.machine_speed import measure

    device, spilled = group.opened.device.type, group.settings.memory_limit is not None
    rates = measure(device, group.opened.dtype)
    recipes = [job.recipe for job in group.jobs]
    found, _ = together(recipes, group.files, rates, device=device, spilled=spilled)
    return [one.record() for one in found]


def _solve(group: _Group) -> SequentialPass:
    """Solve every plan, block by block."""
    from quantlab.calibration.mixture import notes
    from quantlab.quant.imatrix_store import in_words
    from quantlab.quant.sequential import quantize_blocks

    progress = group.progress
    if group.rows is not None:
        size, source = f"{group.rows.shape[0]} x {group.rows.shape[1]} tokens", group.calibration["source"]
        sharing = group.sharing
        shared = f"shared by {', '.join(sharing)}" if len(sharing) > 1 else f"for {group.jobs[0].name}"
        progress.note(f"one calibration pass ({size}, {source}) {shared}")
        for line in notes(group.calibration):
            progress.note(line)
    if group.importance is not None:
        progress.note(f"no calibration pass: {in_words(group.calibration)}")
    walk = _open_walk(group, [plan for several in group.plans for plan in several])
    try:
        quantize_blocks(group.opened, walk, progress)
    except ValueError as error:  # a solver refuses its Hessian
        raise DataError(f"{group.files.name}: {error}") from error
    if group.rows is not None and (imatrix := _imatrix(group, group.plans[0][0])) is not None:
        rows, tokens = group.rows.shape
        imatrix.write(source=str(group.calibration["source"]), chunks=rows, chunk_size=tokens)
    starved = {name: n for several in group.plans for p in several for name, n in p.writer.starved.items()}
    if starved:
        least = min(starved, key=lambda name: starved[name])
        progress.note(
            f"{len(starved)} linears of experts saw fewer calibration tokens than they have inputs (fewest: "
            f"{starved[least]}, {least}); the rest is taken from the other experts of their layer"
        )
    return walk


def _sensitivities(group: _Group) -> dict[str, float]:
    """What a unit of each layer's output error costs the model, for the record and for `bits: auto`; and in
    ``group.costs`` what the errors that were written cost. Where nothing depends on it, it is left out when memory is
    short or no forward pass is wanted, and a model that cannot be differentiated is quantized without it.

    Raises:
        ValueError: with `bits: auto`, as ``sensitivities``.
    """
    import torch

    from quantlab.quant.mixed_precision.sensitivity import ROWS, SEQ_LEN, sensitivities
    from quantlab.quant.sequential import stored_weights

    settings, wanted = group.settings, bool(group.open_plans)
    if group.rows is None or not (wanted or (settings.memory_limit is None and settings.statistics is None)):
        return {}
    opened, rows = group.opened, group.rows[:ROWS, :SEQ_LEN]
    comparable = {
        job.name: several[0]
        for job, several in zip(group.jobs, group.plans, strict=True)
        if job.name not in group.open_plans and "folds" not in METHODS[job.recipe.method].needs
    }

    @torch.no_grad()
    def watch(index: int, block: torch.nn.Module, seen: Seen) -> None:
        for job, plan in comparable.items():
            found = seen.costs(block, stored_weights(opened, plan, index, block), rows.numel())
            named = {opened.names.on_disk(f"{opened.prefix}.{index}.{n}"): cost for n, cost in found.items()}
            group.costs.setdefault(job, {}).update(named)

    try:
        with group.progress.task("measuring sensitivities", total=2 * len(group.opened.blocks)) as advance:
            return sensitivities(opened, rows, advance=advance, watch=watch if comparable else None)
    except Exception as error:  # whatever a model's own code raises when it is differentiated
        if wanted:
            raise
        group.costs.clear()
        group.progress.note(f"the layers' sensitivities are not recorded: {first_line(error)}")
        return {}


def _open_walk(group: _Group, plans: Sequence[Plan]) -> SequentialPass:
    from quantlab.quant.hessian_store import StatisticsStore
    from quantlab.quant.imatrix_store import Keep, KeepBoth
    from quantlab.quant.sequential import open_pass

    key = _statistics_key(group)
    blocks, settings = len(group.opened.blocks), group.settings
    reuse = group.diagonals or _kept_statistics(group)
    keeps = list[Keep]()
    if settings.save_statistics is not None:
        keeps.append(StatisticsStore.make(settings.save_statistics, blocks, key))
    if (imatrix := _imatrix(group, plans[0])) is not None:
        keeps.append(imatrix)
    keep = KeepBoth(keeps) if keeps else None
    spill = plans[0].writer.scratch / "activations" if settings.memory_limit else None
    return open_pass(
        group.opened, group.rows, plans, spill=spill, key=key, probe=group.probe, keep=keep, reuse=reuse
    )


def _imatrix(group: _Group, plan: Plan) -> ImatrixStore | None:
    """Where the importance matrix is gathered, if one is wanted.

    Raises:
        RecipeError: no pass over calibration data from which it could be. DataError: no GGUF names for the model.
    """
    target = group.settings.save_imatrix
    if target is None:
        return None
    from quantlab.quant.block_selection import places_of
    from quantlab.quant.imatrix_store import ImatrixStore

    if group.rows is None or group.settings.statistics is not None or not group.sharing:
        raise RecipeError(
            "--save-imatrix: there is no calibration pass over the original model that it could be gathered in",
            hint="give a recipe that calibrates, with propagate: original and without --statistics",
        )
    return ImatrixStore(target, plan.writer.scratch / "imatrix", group.opened, places_of(group.files))


def _assemble_job(
    group: _Group, job: Job, several: Sequence[Plan], walk: SequentialPass, common: float
) -> _Finished:
    """The finished checkpoint of a job, still under its temporary name. ``common``: seconds that all jobs took
    together."""
    started, plan = time.perf_counter(), several[0]
    choice = _choose_widths(group, job, several, walk) if job.recipe.opens_widths else None
    if choice is not None:
        plan = choice.plan
    assemble(plan, job, group.files, group.opened, choice.widths if choice else None)
    outcome = Outcome(
        job,
        job.out,
        # about what this recipe alone would have taken
        common + sum(p.seconds for p in several) + time.perf_counter() - started,
        len(group.sharing) > 1 and job.name in group.sharing,
        dict(group.calibration),
        dict(sorted(plan.writer.losses.items())),
        choice.record() if choice else {},
        group.types[job.name].record() if job.name in group.types else {},
    )
    return _Finished(outcome, plan)


def _choose_widths(group: _Group, job: Job, solved: Sequence[Plan], walk: SequentialPass) -> Choice:
    from quantlab.quant.mixed_precision.choose import choose

    opened, folds = group.opened, walk.structures
    found = [folds.of(i, block) for i, block in enumerate(opened.blocks)] if folds else []
    assert job.recipe.target_bits is not None
    return choose(
        group.open_plans[job.name], solved, opened, job.recipe.target_bits,
        group.probe, group.progress, found if "folds" in METHODS[job.recipe.method].needs else [],
        measured=group.sensitivity,
    )  # fmt: skip


def _verify_and_publish(
    group: _Group,
    finished: Sequence[_Finished],
    forecasts: Sequence[Mapping[str, Any]],
    before: int,
    reloader: FreshProcess | None,
) -> None:
    """Reload the assembled checkpoints, all in one fresh process, compare, and give them their names. ``before``: bytes
    resident before the group began."""
    from quantlab.models.memory import peak_resident
    from quantlab.quant.estimate.forecast import actual
    from quantlab.quant.verify.reload import raise_if_failed

    verifications = _verifications(group, finished, reloader)
    for i, (one, found) in enumerate(zip(finished, verifications, strict=True)):
        outcome, writer = one.outcome, one.plan.writer
        if found is not None and not found.passed:
            raise_if_failed(found, outcome.job.name, writer.fail())
        record = provenance_record(outcome.job, group.files, group.calibration, outcome.seconds)
        record |= {"shared_calibration": outcome.shared_calibration, "loss": outcome.loss}
        record["experts_unread"] = one.plan.selection.unread
        record |= {"group_sizes": one.plan.selection.sizes(), "kept": dict(one.plan.selection.kept)}
        if writer.starved:
            record["starved_experts"] = dict(sorted(writer.starved.items()))
        record["layers"] = _layer_record(group, one.plan, outcome)
        if outcome.widths:
            record["widths"] = outcome.widths
        if outcome.types:
            record["types"] = outcome.types
        if found is not None:
            size = sum(file.stat().st_size for file in open_files(writer.finished).weight_files)
            took = actual(size, peak_resident() - before, outcome.seconds)
            record |= {"verification": found.record(), "forecast": forecasts[i], "actual": took}
        writer.publish(record)


def _layer_record(group: _Group, plan: Plan, outcome: Outcome) -> dict[str, dict[str, Any]]:
    """How each quantized layer is stored, what its inputs and outputs are like, and what an error in them costs, as far
    as it was measured: what `quantlab layers` reads."""
    from quantlab.quant.mixed_precision.error_cost import without_correction

    chosen, costs, found = outcome.widths.get("layers", {}), group.costs.get(outcome.job.name, {}), {}
    for name, width in plan.selection.widths.items():
        stored = {"bits": chosen.get(name, width.bits), "group_size": width.group_size}
        named = {key: value for key, value in (("method", width.method), ("type", width.type)) if value}
        measured = {"sensitivity": group.sensitivity[name]} if name in group.sensitivity else {}
        shape = {"weights": math.prod(group.opened.layers.shapes[name])}
        facts = plan.writer.facts.get(name, {})
        if name in costs and name in outcome.loss:
            measured["divergence"] = without_correction(costs[name], facts, outcome.loss[name])
        found[name] = stored | named | shape | facts | measured
    return found


def _verifications(
    group: _Group, finished: Sequence[_Finished], reloader: FreshProcess | None
) -> list[Verification | None]:
    from quantlab.quant.verify.reload import Check, verify

    if group.probe is None:
        return [None] * len(finished)
    claims = []
    for one in finished:
        assert one.plan.probe is not None
        logits = group.probe.logits(one.plan.probe, one.plan.outside)
        apart = bool(one.plan.selection.unread)
        claims.append(Check(one.plan.writer.finished, logits, one.outcome.job.name, apart))
    with group.progress.task("reloading what was written"):
        return list(
            verify(
                claims,
                group.probe.rows,
                device=str(group.opened.device),
                memory_limit=group.settings.memory_limit,
                trust_remote_code=group.settings.trust_remote_code,
                ready=reloader,
            )
        )


def calibration_rows(
    jobs: Sequence[Job], files: ModelFiles, trust_remote_code: bool
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The token rows that the jobs share, and their provenance; (None, {}) when none looks at data."""
    wanting = [job for job in jobs if job.recipe.needs_calibration]
    if not wanting:
        return None, {}
    from quantlab.calibration.mixture import draw_mixture
    from quantlab.models.load import load_tokenizer

    wish: Calibration = wanting[0].recipe.calibration
    limit = files.positions
    if limit is not None and wish.seq_len > limit:
        raise RecipeError(
            f"calibration.seq_len {wish.seq_len} is longer than the {limit} positions of {files.name}",
            hint=f"--set calibration.seq_len={limit}",
        )
    mixture = draw_mixture(wish, load_tokenizer(files, trust_remote_code))
    return mixture.rows, mixture.record()


def make_plan(
    job: Job, files: ModelFiles, opened: BlockwiseModel, calibration: Mapping[str, Any], resume: bool
) -> Plan:
    """A job as the engine needs it. With ``bits: auto`` the grid is that of the widest codes."""
    from quantlab.quant.checkpoint import CheckpointWriter
    from quantlab.quant.grid import Grid
    from quantlab.quant.sequential import Plan

    recipe, dtype, held = job.recipe, plain_dtype(opened), FORMATS[job.recipe.format]
    key = {
        "recipe": recipe.digest(),
        "model": files.digest,
        "calibration": str(calibration.get("digest", "")),
    }
    writer = CheckpointWriter(job.out, opened.stored_prefix, len(opened.blocks), dtype, key, resume=resume)
    writer.exact = opened.exact
    chosen = select(recipe, opened.layers, files.name)
    if held.types:
        from quantlab.quant.block_selection import typed

        chosen = typed(chosen, recipe, files)
    grid = Grid(max(recipe.widths), chosen.usual_size(), recipe.symmetric, held.zero_min)
    propagate = recipe.propagate if recipe.needs_calibration else "original"
    options = recipe.options().model_dump()
    return Plan(job.name, recipe.method, grid, recipe.format, writer, chosen, options, propagate)


def plain_dtype(opened: BlockwiseModel) -> torch.dtype:
    """What a checkpoint's plain tensors are stored in: the kernels behind the formats compute in 16 bit."""
    import torch

    return opened.stored if opened.stored != torch.float32 else torch.float16


def assemble(
    plan: Plan,
    job: Job,
    files: ModelFiles,
    opened: BlockwiseModel,
    widths: Mapping[str, tuple[int, int]] | None,
) -> None:
    """Write everything but the blocks. ``widths``: bits and group size of each linear, where they differ."""
    from quantlab.formats import format_module

    inside = tuple(f"{opened.stored_prefix}.{index}." for index in range(len(opened.blocks)))
    rest = {n: info for n, info in files.tensors.items() if not n.startswith(inside)}
    carried = {n: info for n, info in rest.items() if opened.is_carried(n)}
    plain: dict[str, TensorInfo] = {n: info for n, info in rest.items() if n not in carried}
    for name, info in plan.outside.items():  # packed in place of the model's own
        del plain[f"{name}.weight"]
        plain[info.name] = info
    plan.writer.write_rest(plain, carried)
    recipe, held, names = job.recipe, FORMATS[job.recipe.format], opened.names
    layers = dict(widths) if widths else plan.selection.stored()
    aliases = {name: names.in_model(name) for name in layers if names.in_model(name) != name}
    contents = Contents(
        layers,
        bits=plan.grid.bits,
        group_size=plan.grid.group_size,
        symmetric=recipe.symmetric,
        options=plan.options,
        floating=METHODS[recipe.method].floating,
        quantizer=f"quantlab:{__version__}",
        ignore=opened.left_out(layers),
        kept=list(plan.selection.kept),
        blocks=opened.prefix,
        aliases=aliases,
        type=recipe.type or "",
        name=slug(files.name),
    )
    described = format_module(recipe.format).config(contents)
    config = {k: v for k, v in files.config.items() if k not in ("torch_dtype", "dtype")}
    config |= {"dtype": str(plan.writer.dtype).removeprefix("torch."), "quantization_config": described}
    plan.writer.assemble(files.path, config)
    if held.export is not None:
        plan.writer.export(load(held.export), files.path, config)


def provenance_record(
    job: Job, files: ModelFiles, calibration: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """What a checkpoint was made from and how, kept in it as quantlab.json."""
    return {
        "quantlab_version": __version__,
        "recipe": job.recipe.content(),
        "recipe_digest": job.recipe.digest(),
        "parent": files.name,
        "parent_digest": files.digest,
        "calibration": dict(calibration),
        "experts": files.has_experts,
        "sees": bool(wrapping(files)),
        "seconds": round(seconds, 3),
    }
