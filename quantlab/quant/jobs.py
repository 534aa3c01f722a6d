"""What is asked of a quantization run, and what can be refused before it starts. torch is imported for the model's
skeleton alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.errors import DataError, MachineError
from quantlab.models.refusals import refuse_unusable
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.quant.selection import Selection, select, summary
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS

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
    ``widths`` says which width each layer got, where the recipe left it open, ``types`` which block type each matrix
    got."""

    job: Job
    checkpoint: Path | None
    seconds: float = 0.0
    shared_calibration: bool = False
    calibration: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    widths: dict[str, Any] = field(default_factory=dict)
    types: dict[str, Any] = field(default_factory=dict)


def check(
    recipe: QuantizeRecipe, model: str | ModelFiles, out: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Refuse, from configuration and headers alone, what cannot work. ``out`` is where the checkpoint would go.

    Raises:
        RecipeError: as :func:`quantlab.quant.selection.select`.
        DataError: the model's files are bad, it is of a kind that cannot be used (see ``models.refusals``), or it is
            quantized already; an importance matrix is damaged or lacks a layer. MachineError: too little disk.
    """
    files = model if isinstance(model, ModelFiles) else open_files(model)
    refuse_unusable(files)
    if recipe.method == "none":
        return
    if files.quantized is not None:
        kind = files.quantized.get("quant_method", "some method")
        raise DataError(f"{files.name} is already quantized ({kind})", hint="give the original model")
    if out is not None:
        _check_disk(recipe, out, files)
    chosen = selection(recipe, files, trust_remote_code)
    if FORMATS[recipe.format].types:
        from quantlab.quant.block_selection import file_bytes
        from quantlab.quant.mixed_precision.file_budget import file_budget

        # for what they refuse: of configuration and tokenizer, of a size
        if recipe.opens_types:
            file_budget(recipe, files, chosen)
        else:
            file_bytes(recipe, files, chosen, "F16")
    if recipe.imatrix_file is not None:
        from quantlab.quant.imatrix_store import Importance

        Importance.open(recipe.imatrix_file, chosen.widths, files)


def selection(recipe: QuantizeRecipe, files: ModelFiles, trust_remote_code: bool = False) -> Selection:
    """What a recipe does with the layers of a model. Imports torch."""
    from quantlab.models.blockwise import layers_of

    chosen = select(recipe, layers_of(files, trust_remote_code), files.name)
    if not FORMATS[recipe.format].types:
        return chosen
    from quantlab.quant.block_selection import typed

    return typed(chosen, recipe, files)


def described(recipe: QuantizeRecipe, files: ModelFiles, trust_remote_code: bool = False) -> list[str]:
    """What a recipe does with a model's layers, in lines for people; empty for ``none``."""
    from quantlab.models.blockwise import layers_of

    if recipe.method == "none":
        return []
    chosen, layers = selection(recipe, files, trust_remote_code), layers_of(files, trust_remote_code)
    said = summary(chosen, layers, files.params)
    if recipe.opens_types:
        from quantlab.quant.mixed_precision.file_budget import file_budget

        budget = file_budget(recipe, files, chosen)
        said.append(
            f"the file has at most {budget.size:,} bytes (these types: {budget.least:,} to {budget.most:,})"
        )
    if recipe.imatrix_file is not None:
        from quantlab.quant.imatrix_store import Importance, in_words

        held = Importance.open(recipe.imatrix_file, chosen.widths, files)
        said.append(f"no calibration pass: {in_words(held.record(recipe.imatrix_file))}")
    return said


def expected_bytes(recipe: QuantizeRecipe, files: ModelFiles) -> int:
    """No less than the disk the work takes, from headers alone: scales and zeros generously, the rest as float32.
    With ``bits: auto`` every width is kept until the widths are chosen."""
    matrices = sum(a * b for a, b in files.block_linears().values())
    rest = sum(t.count for t in files.tensors.values()) - matrices
    width = 2 if recipe.group_size == -1 else 2 + 24 / 16
    codes = recipe.average_bits + width
    if recipe.opens_types:
        codes += max(kind.bits_per_weight for kind in BLOCK_TYPES.values())
    if recipe.opens_widths:
        codes += sum(b + width for b in recipe.widths)
        rest *= 1 + len(recipe.widths)
    return int(matrices * codes / 8 + rest * 4)


def group_key(recipe: QuantizeRecipe) -> tuple[str, str]:
    """(calibration, dtype): recipes with equal keys can share one pass through the model. The calibration is empty
    where a method does without."""
    looks = recipe.needs_calibration or recipe.imatrix_file is not None
    return recipe.calibration.model_dump_json() if looks else "", recipe.dtype


def _check_disk(recipe: QuantizeRecipe, out: Path, files: ModelFiles) -> None:
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(folder).free, expected_bytes(recipe, files) + HEADROOM
    if free < needed:
        raise MachineError(
            f"{out} needs about {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free",
            hint="free some space, or name another --out",
        )
