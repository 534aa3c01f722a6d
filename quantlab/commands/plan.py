"""`quantlab plan`: what recipes will take on a model, before anything starts: size, disk, memory, seconds.

Nothing of the model is read but its configuration and headers. What would be refused is refused here too. The seconds
rest on rates that are measured for a third of a second.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.commands.defaults import settle
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.planned_run import open_model
from quantlab.commands.quantize import check_device, load_recipes
from quantlab.models.safetensors.files import ModelFiles
from quantlab.quant.estimate.checkpoint_size import stored_float
from quantlab.quant.estimate.forecast import Forecast, MachineSpeed, together
from quantlab.quant.jobs import check, described
from quantlab.recipe.quantize import QuantizeRecipe

TORCH = {"BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Options:
    """The command line, parsed. ``memory_limit`` in bytes, None for no limit."""

    model: str
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    memory_limit: int | None = None
    trust_remote_code: bool = False


def run(names: Sequence[str], options: Options, *, as_json: bool = False) -> None:
    """The verb: one line a recipe, or one JSON document, on stdout."""
    recipes = load_recipes(names, options.overrides)
    with stdout_is_stderr():
        summary = plan(recipes, options)
    if as_json:
        print_json(summary)
    else:
        print("\n".join(lines(summary)))


def plan(
    recipes: Sequence[tuple[str, QuantizeRecipe]], options: Options, rates: MachineSpeed | None = None
) -> dict[str, Any]:
    """Forecasts of the recipes run together; ``rates`` are measured unless given."""
    check_device(options.device)
    files = open_model(options.model)
    trust = options.trust_remote_code
    recipes = [(name, settle(recipe, files, trust)) for name, recipe in recipes]
    for _, recipe in recipes:
        check(recipe, files, trust_remote_code=trust)
    device, free = _machine(options.device)
    measured = rates or _measure(device, files, options)
    plain = [recipe for _, recipe in recipes]
    found, seconds = together(plain, files, measured, device=device, spilled=options.memory_limit is not None)
    out = (options.out or Path()).absolute()
    folder = next(p for p in [out, *out.parents] if p.exists())
    return {
        "status": "plan",
        "model": options.model,
        "params": files.params,
        "model_bytes": files.size_bytes,
        "device": device,
        "recipes": [
            _row(name, recipe, one, files) for (name, recipe), one in zip(recipes, found, strict=True)
        ],
        "seconds": round(seconds, 1),
        "memory_bytes": max((one.memory_bytes for one in found), default=0),
        "memory_free_bytes": free,
        "disk_bytes": sum(one.disk_bytes for one in found),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "rates": vars(measured),
    }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    rows = [("recipe", "size", "of the model", "bits/weight", "memory", "time")]
    for row in summary["recipes"]:
        share = f"{row['size_bytes'] / max(summary['model_bytes'], 1):.1%}"
        took = (_size(row["memory_bytes"]), _time(row["seconds"]))
        rows.append((row["recipe"], _size(row["size_bytes"]), share, f"{row['bits_per_weight']:.2f}", *took))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for row in summary["recipes"]:
        text += [""] * bool(row["layers"]) + [f"{row['recipe']}: {line}" for line in row["layers"]]
    together = f"together: about {_time(summary['seconds'])} on {summary['device']}"
    text += ["", f"{together}, sharing calibration where it is the same"]
    for what in ("memory", "disk"):
        needed, free = summary[f"{what}_bytes"], summary[f"{what}_free_bytes"]
        verdict = "enough" if needed <= free else "NOT ENOUGH"
        text.append(f"{what}: {_size(needed)} needed, {_size(free)} free: {verdict}")
    return text


def _row(name: str, recipe: QuantizeRecipe, one: Forecast, files: ModelFiles) -> dict[str, Any]:
    said: dict[str, Any] = {"method": recipe.method, "bits": recipe.bits, "format": recipe.format}
    return {
        "recipe": Path(name).name.removesuffix(".yaml"),
        **said,
        **one.record(),
        "layers": described(recipe, files),
    }


def _machine(wish: str) -> tuple[str, int]:
    """The device that would be used, and the bytes free on it."""
    from quantlab.models.load import pick_device
    from quantlab.models.memory import available

    device = pick_device(wish)
    if device == "cpu":
        return device, available()
    import torch

    return device, int(torch.cuda.mem_get_info(device)[0])


def _measure(device: str, files: ModelFiles, options: Options) -> MachineSpeed:
    import torch

    from quantlab.models.precision import computed_in
    from quantlab.quant.estimate.machine_speed import measure

    kind = stored_float(files, "auto")
    return measure(device, computed_in(getattr(torch, TORCH[kind]), device))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
