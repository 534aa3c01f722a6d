"""Recipes to checkpoints: checks first, then one walk through the model for all recipes that need one.

``check`` looks at shapes only and imports no torch. ``quantize`` groups recipes that share calibration rows, so that
several recipes cost one pass; bitsandbytes recipes go through its own library, one after the other.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab import __version__
from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.formats.shapes import common_group_sizes, refuse
from quantlab.models.files import ModelFiles, open_files
from quantlab.progress import Progress
from quantlab.recipe import Calibration, QuantizeRecipe

if TYPE_CHECKING:
    import torch

    from quantlab.quant.engine import Plan

OWN = ("rtn", "gptq", "awq")
BITSANDBYTES = ("bnb-int8", "bnb-fp4", "bnb-nf4")
HEADROOM = 64 * 2**20  # bytes of disk kept free beyond the estimate


@dataclass(frozen=True)
class Job:
    """One recipe to apply; ``out`` is where its checkpoint goes."""

    name: str
    recipe: QuantizeRecipe
    out: Path


@dataclass
class Outcome:
    """What came of a job. ``checkpoint`` is None for ``none``, which is the model itself. ``shared_calibration``: other
    jobs were solved from the same pass over the calibration rows. ``loss`` is by layer, where it was measured."""

    job: Job
    checkpoint: Path | None
    seconds: float = 0.0
    shared_calibration: bool = False
    calibration: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


def check(recipe: QuantizeRecipe, model: str, out: Path | None = None) -> None:
    """Refuse, from file headers alone, what cannot work. ``out`` is where the checkpoint would go.

    Raises:
        RecipeError: a layer does not fit the recipe; names the layer, its inputs and the group sizes that work.
        DataError: the model's files are bad, or it is quantized already. MachineError: too little disk.
    """
    files = open_files(model)
    if recipe.method == "none":
        return
    if out is not None:
        _check_disk(recipe, out, files)
    if files.quantized is not None:
        kind = files.quantized.get("quant_method", "some method")
        raise DataError(f"{model} is already quantized ({kind})", hint="give the original model")
    if recipe.method in BITSANDBYTES:
        return
    linears = files.block_linears()
    for name, (out_features, in_features) in linears.items():
        reason = refuse(recipe.format, recipe.bits, recipe.group_size, in_features, out_features)
        if reason is None:
            continue
        common = common_group_sizes({width for _, width in linears.values()})
        hint = f"for every layer of this model: group_size {', '.join(map(str, common))}" if common else ""
        raise RecipeError(f"{model}: layer {name} does not fit: {reason}", hint=hint)


def expected_bytes(recipe: QuantizeRecipe, files: ModelFiles) -> int:
    """No less than the size of the checkpoint's weights: scales and zeros generously, the rest as float32."""
    matrices = sum(a * b for a, b in files.block_linears().values())
    rest = sum(t.count for t in files.tensors.values()) - matrices
    width = 2 if recipe.group_size == -1 else 2 + 24 / recipe.group_size
    return int(matrices * (recipe.bits + width) / 8 + rest * 4)


def quantize(
    jobs: Sequence[Job],
    model: str,
    *,
    device: str = "auto",
    progress: Progress,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> list[Outcome]:
    """Apply every job to one model. Jobs whose calibration is the same share one pass over it.

    Returns:
        One outcome a job, in order.

    Raises:
        QuantlabError: as :func:`check`, and for bad calibration data; blocks already written stay, for ``resume``.
    """
    from quantlab.models.load import pick_device
    from quantlab.quant.checkpoint import claim

    files = open_files(model)
    for job in jobs:
        check(job.recipe, model, job.out)
        if job.recipe.method != "none":
            claim(job.out)
    place = pick_device(device)
    outcomes: dict[int, Outcome] = {}
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        if job.recipe.method == "none":
            outcomes[i] = Outcome(job, None)
        elif job.recipe.method in BITSANDBYTES:
            outcomes[i] = _bitsandbytes(job, files, place, progress, trust_remote_code)
        else:
            groups.setdefault(_group_key(job.recipe), []).append(i)
    # Recipes without a need for data ride along with the first group that has one.
    for key in [k for k in groups if k.startswith("no data") and len(groups) > 1]:
        other = next(
            k for k in groups if not k.startswith("no data") and k.endswith(key.removeprefix("no data"))
        )
        groups[other] += groups.pop(key)
    for members in groups.values():
        done = _solve([jobs[i] for i in members], files, place, progress, resume, trust_remote_code)
        outcomes.update(zip(members, done, strict=True))
    return [outcomes[i] for i in range(len(jobs))]


def _group_key(recipe: QuantizeRecipe) -> str:
    """Recipes with equal keys can share one walk through the model."""
    if not recipe.needs_calibration:
        return f"no data, {recipe.dtype}"
    return f"{recipe.calibration.model_dump_json()}, {recipe.dtype}"


def _check_disk(recipe: QuantizeRecipe, out: Path, files: ModelFiles) -> None:
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(folder).free, expected_bytes(recipe, files) + HEADROOM
    if free < needed:
        raise MachineError(
            f"{out} needs about {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free",
            hint="free some space, or name another --out",
        )


def _bitsandbytes(
    job: Job, files: ModelFiles, device: str, progress: Progress, trust_remote_code: bool
) -> Outcome:
    from safetensors import SafetensorError

    from quantlab.models.blocks import dtype_of
    from quantlab.quant.bnb import quantize_bnb
    from quantlab.quant.checkpoint import copy_tokenizer, partial_path

    started = time.perf_counter()
    work = partial_path(job.out)
    if work.exists():
        shutil.rmtree(work)
    with progress.task(f"{job.name}: bitsandbytes", total=1) as advance:
        try:
            quantize_bnb(
                files.name,
                work,
                job.recipe.method,
                double_quant=job.recipe.double_quant,
                dtype=dtype_of(files, job.recipe.dtype),
                device=device,
                trust_remote_code=trust_remote_code,
            )
        except ImportError as error:
            raise MachineError(
                f"bitsandbytes cannot be used: {error}", hint="pip install bitsandbytes"
            ) from error
        except (OSError, SafetensorError) as error:
            raise MachineError(f"cannot write {work}: {error}", hint="is the disk full?") from error
        copy_tokenizer(files.path, work)
        seconds = time.perf_counter() - started
        record = _record(job, files, {}, seconds)
        (work / "quantlab.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        work.rename(job.out)
        advance(1)
    return Outcome(job, job.out, seconds)


def _solve(
    jobs: Sequence[Job],
    files: ModelFiles,
    device: str,
    progress: Progress,
    resume: bool,
    trust_remote_code: bool,
) -> list[Outcome]:
    """One walk through the model for jobs that share their calibration."""
    from quantlab.models.blocks import Opened, dtype_of
    from quantlab.quant.engine import quantize_blocks

    started = time.perf_counter()
    opened = Opened(files, device, dtype_of(files, jobs[0].recipe.dtype), trust_remote_code)
    rows, calibration = _calibration_rows(jobs, files, trust_remote_code)
    plans = [_plan(job, files, opened, calibration, resume) for job in jobs]
    sharing = [
        job.name for job in jobs if job.recipe.needs_calibration and job.recipe.propagate == "original"
    ]
    if rows is not None:
        text = f"one calibration pass ({rows.shape[0]} x {rows.shape[1]} tokens, {calibration['source']})"
        progress.note(
            f"{text} shared by {', '.join(sharing)}" if len(sharing) > 1 else f"{text} for {jobs[0].name}"
        )
    try:
        quantize_blocks(opened, rows, plans, progress)
    except ValueError as error:  # a solver refuses its statistics
        raise DataError(f"{files.name}: {error}") from error
    outcomes = []
    common = time.perf_counter() - started - sum(plan.seconds for plan in plans)
    for job, plan in zip(jobs, plans, strict=True):
        seconds = common + plan.seconds  # about what this recipe alone would have taken
        shared = len(sharing) > 1 and job.name in sharing
        record = _record(job, files, calibration, seconds) | {"shared_calibration": shared}
        record["loss"] = dict(sorted(plan.writer.losses.items()))
        _finish(plan, job, files, opened, record)
        outcomes.append(Outcome(job, job.out, seconds, shared, calibration, plan.writer.losses))
    return outcomes


def _calibration_rows(
    jobs: Sequence[Job], files: ModelFiles, trust_remote_code: bool
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The token rows that the jobs share, and their provenance; (None, {}) when none looks at data."""
    wanting = [job for job in jobs if job.recipe.needs_calibration]
    if not wanting:
        return None, {}
    from quantlab.calibration import digest, read_texts, token_rows
    from quantlab.models.load import load_tokenizer

    wish: Calibration = wanting[0].recipe.calibration
    limit = files.config.get("max_position_embeddings")
    if isinstance(limit, int) and wish.seq_len > limit:
        raise RecipeError(
            f"calibration.seq_len {wish.seq_len} is longer than the {limit} positions of {files.name}",
            hint=f"--set calibration.seq_len={limit}",
        )
    texts = read_texts(wish.source)
    tokenizer = load_tokenizer(files, trust_remote_code)
    rows = token_rows(texts, tokenizer, rows=wish.rows, seq_len=wish.seq_len, seed=wish.seed)
    return rows, {"source": wish.source, "rows": wish.rows, "seq_len": wish.seq_len, "digest": digest(rows)}


def _plan(job: Job, files: ModelFiles, opened: Any, calibration: Mapping[str, Any], resume: bool) -> Plan:
    import torch

    from quantlab.formats import layout
    from quantlab.quant.checkpoint import CheckpointWriter
    from quantlab.quant.engine import Plan
    from quantlab.quant.grid import Grid

    recipe = job.recipe
    # The kernels behind both layouts compute in 16 bit.
    dtype = opened.dtype if opened.dtype != torch.float32 else torch.float16
    key = {
        "recipe": recipe.digest(),
        "model": files.digest,
        "calibration": str(calibration.get("digest", "")),
    }
    writer = CheckpointWriter(job.out, opened.prefix, len(opened.blocks), dtype, key, resume=resume)
    grid = Grid(recipe.bits, recipe.group_size, recipe.symmetric, layout(recipe.format).ZERO_MIN)
    options: dict[str, Any] = {}
    if recipe.method == "gptq":
        options = {"damp": recipe.damp, "act_order": recipe.act_order}
    elif recipe.method == "awq":
        names = ("scale_search", "clip_search", "search_steps")
        options = {name: getattr(recipe, name) for name in names}
    propagate = recipe.propagate if recipe.needs_calibration else "original"
    return Plan(job.name, recipe.method, grid, recipe.format, writer, options, propagate)


def _finish(plan: Plan, job: Job, files: ModelFiles, opened: Any, record: Mapping[str, Any]) -> None:
    """Write everything but the blocks, and move the checkpoint into place."""
    from safetensors import safe_open

    from quantlab.formats import layout

    inside = opened.prefix + "."
    rest = {}
    for name, info in files.tensors.items():
        if not name.startswith(inside):
            with safe_open(info.file, framework="pt") as stream:
                rest[name] = stream.get_tensor(name)
    plan.writer.write_rest(rest)
    recipe = job.recipe
    described = layout(recipe.format).config(
        bits=recipe.bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        act_order=recipe.act_order is True,
        damp=recipe.damp,
        quantizer=f"quantlab:{__version__}",
    )
    config = {k: v for k, v in files.config.items() if k not in ("torch_dtype", "dtype")}
    config |= {"dtype": str(plan.writer.dtype).removeprefix("torch."), "quantization_config": described}
    plan.writer.finish(files.path, config, record)


def _record(job: Job, files: ModelFiles, calibration: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Provenance, kept in the checkpoint as quantlab.json."""
    return {
        "quantlab_version": __version__,
        "recipe": job.recipe.content(),
        "recipe_digest": job.recipe.digest(),
        "parent": files.name,
        "parent_digest": files.digest,
        "calibration": dict(calibration),
        "seconds": round(seconds, 3),
    }
