"""`quantlab layers`: which layers of a quantized model hurt, and the `overrides` that a budget is best spent on.

Of a checkpoint everything is read from its quantlab.json. A recipe is run on a model for it, into a directory that is
removed again.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.commands.defaults import settle
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.planned_run import check_data, check_weights, open_model
from quantlab.commands.quantize import check_device, load_recipes
from quantlab.errors import DataError, RecipeError
from quantlab.models.provenance import provenance
from quantlab.paths import atomic_write_text
from quantlab.progress import Progress, default_progress
from quantlab.quant.mixed_precision.overrides import (
    LayerRecord,
    Suggestion,
    kin,
    read_records,
    shares,
    suggest,
)
from quantlab.recipe.load import parse_settled
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS, PACKING
from quantlab.registry.methods import METHODS

WIDE_TYPE = "Q8_0"  # what stands for 8 bits in a format of block types


@dataclass(frozen=True)
class Options:
    """The command line, parsed. ``budget``: bytes that the quantized layers may grow by, in per cent of what they take;
    ``average_bits``: of all codes afterwards, in its place. ``bits``: that an override gives. ``top``: rows printed, 0
    for all. ``plot``: where the heat map goes."""

    model: str | None = None
    budget: str = "5%"
    average_bits: float | None = None
    bits: int = 8
    top: int = 20
    plot: Path | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    trust_remote_code: bool = False


def run(what: str, options: Options, *, as_json: bool = False) -> None:
    """The verb: a table and a piece of a recipe, or one JSON document, on stdout."""
    share = percent(options.budget)
    with stdout_is_stderr():
        made = record_of(what, options, default_progress())
        found = examine(what, made, options, share)
        if options.plot is not None:
            from quantlab.report.layer_map import heat_map

            atomic_write_text(options.plot, heat_map(found["layers"], f"{what} on {found['model']}"))
            found["plot"] = str(options.plot)
    if as_json:
        print_json(found)
    else:
        show(found, options.top)


def percent(text: str) -> float:
    """`5%` as 0.05.

    Raises:
        RecipeError: it is no share above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if found is None or float(found[1]) == 0:
        raise RecipeError(f"--budget {text}: expected how much larger the quantized layers may become, as 5%")
    return float(found[1]) / 100


def record_of(what: str, options: Options, progress: Progress) -> dict[str, Any]:
    """The content of a checkpoint's quantlab.json, or that of a recipe's trial.

    Raises:
        RecipeError: neither a checkpoint nor a recipe, or a recipe without a model. DataError: nothing was recorded.
    """
    if not Path(what).is_dir():
        return _tried(what, options, progress)
    if options.overrides:
        raise RecipeError("--set changes a recipe, and a checkpoint has been made already")
    made = provenance(Path(what))
    if not made:
        raise DataError(
            f"{what}: there is no quantlab.json, so that nothing is known of its layers",
            hint="quantlab layers RECIPE --model MODEL tries a recipe on the original",
        )
    again = f"quantlab layers RECIPE --model {made.get('parent', 'MODEL')} tries the recipe anew"
    if not made.get("loss"):
        raise DataError(
            f"{what}: {_method(made)} recorded no layer's output error, as it calibrates on nothing",
            hint=f"compare with a method that does ({_calibrated()}): {again}",
        )
    if not read_records(made):
        raise DataError(
            f"{what}: made by quantlab {made.get('quantlab_version', '')}, which recorded the layers' errors, but "
            "neither their outputs nor what an error costs",
            hint=again,
        )
    if options.model is not None:
        raise RecipeError("--model goes with a recipe; a checkpoint's layers are known from its run")
    return made


def _method(made: Mapping[str, Any]) -> str:
    return str(made.get("recipe", {}).get("method", "its method"))


def _calibrated() -> str:
    return ", ".join(name for name, method in METHODS.items() if method.calibrated)


def _tried(what: str, options: Options, progress: Progress) -> dict[str, Any]:
    """What a recipe records on a model; its checkpoint is removed."""
    from quantlab.quant.pipeline import Job, Settings, check, quantize

    name, recipe = load_recipes([what], options.overrides)[0]
    if options.model is None:
        raise RecipeError(f"{what} is a recipe: which model it is tried on is missing", hint="--model MODEL")
    if not METHODS[recipe.method].calibrated:
        raise RecipeError(
            f"{what}: {recipe.method} calibrates on nothing, so that no layer's output error would be known",
            hint=f"give a recipe of a method that does: {_calibrated()}",
        )
    check_device(options.device)
    files, trust = open_model(options.model, progress), options.trust_remote_code
    recipe = settle(recipe, files, trust)
    check_data(recipe, files, measured=False)
    check_weights(files)
    with tempfile.TemporaryDirectory(prefix="quantlab-layers-") as folder:
        job = Job(name, recipe, Path(folder) / "trial")
        check(recipe, files, job.out, trust)
        settings = Settings(options.device, trust_remote_code=trust)
        quantize([job], files, progress=progress, settings=settings)
        return provenance(job.out)


def examine(what: str, made: Mapping[str, Any], options: Options, share: float) -> dict[str, Any]:
    """Everything that is said, as one dictionary. ``share``: of what the quantized layers take, that they may grow by.

    Raises:
        RecipeError: the budget, or the width, makes no sense for these layers.
    """
    records, recipe = read_records(made), made["recipe"]
    part = shares(records)
    known = len(part) == len(records)
    found: dict[str, Any] = {
        "status": "done",
        "model": made.get("parent"),
        "examined": what,
        **{key: recipe.get(key) for key in ("method", "bits", "format")},
        "divergence": sum(r.cost or 0.0 for r in records) if known else None,
        "missing": [] if known else ["divergence"],
        "layers": sorted(
            (_row(record, part) for record in records),
            key=lambda row: (-(row["share"] or 0.0), -(row["relative_error"] or 0.0), row["name"]),
        ),
        "suggestion": None,
    }
    if known:
        suggestion = suggested(records, recipe, options, share)
        found["suggestion"] = {
            "average_bits": round(suggestion.average_bits, 4),
            "extra_bytes": -(-suggestion.extra_bits // 8),
            "weights": suggestion.weights,
            "saved": suggestion.saved,
            **fragment(recipe, suggestion, records, options.bits),
        }
        chosen = set(suggestion.names)
        for row in found["layers"]:
            row["suggested"] = row["name"] in chosen
    return found


def _row(record: LayerRecord, part: Mapping[str, float]) -> dict[str, Any]:
    block, projection = place(record.name)
    return {
        "name": record.name,
        "block": block,
        "projection": projection,
        "bits": record.bits,
        **({"type": record.type} if record.type else {}),
        "weights": record.weights,
        "relative_error": record.relative_error,
        "divergence": record.cost,
        "share": part.get(record.name),
        "outliers": record.outliers,
        "largest": [list(one) for one in record.largest],
    }


def place(name: str) -> tuple[int | None, str]:
    """Block and name in it: (12, `mlp.down_proj`) of `model.layers.12.mlp.down_proj`."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def suggested(
    records: Sequence[LayerRecord], recipe: Mapping[str, Any], options: Options, share: float
) -> Suggestion:
    """The layers to widen.

    Raises:
        RecipeError: no layer is narrower than the width asked for, or the average is below what there is.
    """
    types = bool(FORMATS[recipe["format"]].types)
    if types and options.bits != 8:
        raise RecipeError(f"--bits {options.bits}: in a GGUF file the wider type is {WIDE_TYPE}, of 8 bits")
    if all(record.bits >= options.bits for record in records):
        raise RecipeError(f"--bits {options.bits}: no layer has fewer bits than that")
    kinds = {name: kind.bits_per_weight for name, kind in BLOCK_TYPES.items()} if types else {}
    stored = kinds | ({"8": kinds[WIDE_TYPE]} if types else {})
    weights = sum(record.weights for record in records)
    codes = sum(record.weights * stored.get(record.type, record.bits) for record in records)
    if options.average_bits is None:
        # A scale of 16 bits a group; what a row has for itself is nothing to speak of.
        scales = sum(16 * r.weights / r.group_size for r in records if r.group_size > 0 and not types)
        budget = share * (codes + scales)
    else:
        budget = options.average_bits * weights - codes
        if budget <= 0:
            raise RecipeError(
                f"--average-bits {options.average_bits:g}: the layers have {codes / weights:.4g} bits now",
                hint="give more than that",
            )
    tied = kin([record.name for record in records], whole=not types)
    return suggest(records, budget, bits=options.bits, stored=stored, tied=tied)


def fragment(
    recipe: Mapping[str, Any], suggestion: Suggestion, records: Sequence[LayerRecord], bits: int
) -> dict[str, Any]:
    """``overrides`` for the layers, and ``yaml``: what of the recipe has to change for them, ready to be pasted into
    it. Where the recipe's format has one width for all layers, that is the format too, with what goes with it."""
    change = {"type": WIDE_TYPE} if FORMATS[recipe["format"]].types else {"bits": bits}
    wide: dict[str, dict[str, Any]] = {name: dict(change) for name in suggestion.names}
    if recipe.get("bits") == "auto":
        target = {"target_bits": round(suggestion.average_bits, 3)}
        return {"overrides": {}, "yaml": yaml.safe_dump(target)}
    old = {name: _said(one) for name, one in (recipe.get("overrides") or {}).items()}
    for keys in _changes(recipe):
        content = dict(recipe) | keys | {"overrides": wide | old}
        try:
            parse_settled(QuantizeRecipe, content)
        except RecipeError:
            continue
        text = yaml.safe_dump(
            keys | {"overrides": wide | old}, sort_keys=False, default_flow_style=None, width=1000
        )
        return {"overrides": wide, "yaml": text}
    raise RecipeError(f"no format holds {recipe.get('method')} with layers of {bits} bits among others")


def _said(override: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in override.items() if value is not None}


def _changes(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What may have to change in a recipe for layers of several widths, the least first."""
    if FORMATS[recipe["format"]].mixed or FORMATS[recipe["format"]].types:
        yield {}
    for format in (name for name in PACKING if FORMATS[name].mixed):
        yield {"format": format}
        yield {"format": format, "act_order": "group"}
        yield {"format": format, "symmetric": True}


def show(found: Mapping[str, Any], top: int) -> None:
    """For people: the table, what is missing, and the piece of a recipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = found["layers"][: top or None]
    title = f"{found['examined']}: {len(found['layers'])} layers of {found['model']}, the worst first"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading, right in (
        ("layer", False), ("bits", True), ("weights", True), ("error", True), ("share", True), ("outliers", True),
    ):  # fmt: skip
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        mark = "* " if row.get("suggested") else "  "
        table.add_row(*map(Text, (
            mark + row["name"], row.get("type") or str(row["bits"]), f"{row['weights']:,}",
            _share(row["relative_error"]), _share(row["share"]), _outliers(row),
        )))  # fmt: skip
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
    print("\n".join(_explained(found)))


def _explained(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "error: of the layer's output, root mean square, relative to the output on the calibration text",
        "share: of the divergence that all errors cause, each weighted by how sensitive the model is to it",
        "outliers: input channels above 6 times the median channel, with the largest of them",
    ]
    suggestion = found["suggestion"]
    if suggestion is None:
        lines += [
            "",
            "no shares and no overrides: a run with --memory-limit or --statistics does not measure what errors cost",
            f"  quantlab layers RECIPE --model {found['model']} does, without writing a checkpoint",
        ]
    elif not suggestion["overrides"] and "target_bits" in suggestion["yaml"]:
        lines += ["", "bits: auto spends its bits by these shares already; a wider budget for it:", ""]
        lines += [suggestion["yaml"].rstrip()]
    elif not suggestion["overrides"]:
        lines += ["", "no layer fits this budget: a larger --budget, or a smaller --bits, may have one"]
    else:
        lines += [
            "",
            f"* {len(suggestion['overrides'])} layers with {suggestion['weights']:.1%} of the quantized weights cause "
            f"{suggestion['saved']:.0%} of that divergence; wider they take {suggestion['extra_bytes']:,} bytes more "
            f"({suggestion['average_bits']:g} bits a code on average). In the recipe:",
            "",
            suggestion["yaml"].rstrip(),
        ]
    if "plot" in found:
        lines += ["", f"written: {found['plot']}"]
    return lines


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _outliers(row: Mapping[str, Any]) -> str:
    if not row["outliers"]:
        return "" if row["outliers"] is None else "0"
    channel, times = row["largest"][0]
    return f"{row['outliers']} (channel {int(channel)}: {times:.0f}x)"
