"""What is asked of a quantization run, and what can be refused before it starts. Needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.models.refusals import refuse_unfit, refuse_unusable
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import common_group_sizes, fitting_widths, misfit
from quantlab.registry.methods import METHODS

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
    jobs were solved from the same pass over the calibration rows. ``loss`` is by layer, where it was measured;
    ``widths`` says which width each layer got, where the recipe left it open."""

    job: Job
    checkpoint: Path | None
    seconds: float = 0.0
    shared_calibration: bool = False
    calibration: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    widths: dict[str, Any] = field(default_factory=dict)


def check(recipe: QuantizeRecipe, model: str | ModelFiles, out: Path | None = None) -> None:
    """Refuse, from file headers alone, what cannot work. ``out`` is where the checkpoint would go.

    Raises:
        RecipeError: a layer does not fit the recipe; names the layer, its inputs and the group sizes that work.
        DataError: the model's files are bad, it is of a kind that cannot be used (see ``models.refusals``), or it is
            quantized already. MachineError: too little disk.
    """
    files = model if isinstance(model, ModelFiles) else open_files(model)
    refuse_unusable(files)
    if recipe.method == "none":
        return
    if files.quantized is not None:
        kind = files.quantized.get("quant_method", "some method")
        raise DataError(f"{files.name} is already quantized ({kind})", hint="give the original model")
    if not METHODS[recipe.method].whole:
        refuse_unfit(files)
    if out is not None:
        _check_disk(recipe, out, files)
    if METHODS[recipe.method].whole:
        return
    linears = files.block_linears()
    for name, (out_features, in_features) in linears.items():
        if recipe.bits == "auto" and fitting_widths(
            recipe.format, recipe.group_size, in_features, out_features
        ):
            continue
        bits = recipe.widths[-1] if recipe.bits == "auto" else recipe.bits
        reason = misfit(recipe.format, bits, recipe.group_size, in_features, out_features)
        if reason is None:
            continue
        common = common_group_sizes({width for _, width in linears.values()})
        hint = f"for every layer of this model: group_size {', '.join(map(str, common))}" if common else ""
        raise RecipeError(f"{files.name}: layer {name} does not fit: {reason}", hint=hint)


def expected_bytes(recipe: QuantizeRecipe, files: ModelFiles) -> int:
    """No less than the disk the work takes: scales and zeros generously, the rest as float32. With ``bits: auto`` every
    width is kept until the widths are chosen."""
    matrices = sum(a * b for a, b in files.block_linears().values())
    rest = sum(t.count for t in files.tensors.values()) - matrices
    width = 2 if recipe.group_size == -1 else 2 + 24 / recipe.group_size
    codes = recipe.average_bits + width
    if recipe.bits == "auto":
        codes += sum(b + width for b in recipe.widths)
        rest *= 1 + len(recipe.widths)
    return int(matrices * codes / 8 + rest * 4)


def group_key(recipe: QuantizeRecipe) -> tuple[str, str]:
    """(calibration, dtype): recipes with equal keys can share one pass through the model. The calibration is empty
    where a method does without."""
    return recipe.calibration.model_dump_json() if recipe.needs_calibration else "", recipe.dtype


def _check_disk(recipe: QuantizeRecipe, out: Path, files: ModelFiles) -> None:
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(folder).free, expected_bytes(recipe, files) + HEADROOM
    if free < needed:
        raise MachineError(
            f"{out} needs about {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free",
            hint="free some space, or name another --out",
        )
