"""`quantlab doctor --model`: what of a model can be quantized, what stays as it is, in which format, and who reads it.

Told from configuration, headers and skeleton; no weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantlab.commands.defaults import settle
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.planned_run import open_model
from quantlab.errors import QuantlabError
from quantlab.models.safetensors.files import ModelFiles
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, OF_BLOCKS, PACKING, readers
from quantlab.registry.methods import METHODS

if TYPE_CHECKING:
    from quantlab.models.layers import Layers


def run(ref: str, *, trust_remote_code: bool, as_json: bool) -> None:
    with stdout_is_stderr():
        found = examine(ref, trust_remote_code)
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines(found)))


def examine(ref: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything that is said of a model, as one dictionary.

    Raises:
        DataError: nothing of it can be quantized block by block.
    """
    from quantlab.models.blockwise import layers_of

    files = open_model(ref)
    layers = layers_of(files, trust_remote_code)
    return {
        "model": ref,
        "model_type": files.config.get("model_type"),
        "architecture": layers.architecture,
        "parameters": files.params,
        "blocks": layers.blocks,
        "layers": len(layers.shapes),
        "in_layers": layers.weights(layers.shapes) / max(files.params, 1),
        "experts": len(layers.experts),
        "carried": dict(layers.kept),
        "formats": {
            name: _in_format(name, files, layers, trust_remote_code)
            for name in (*PACKING, *OF_BLOCKS, "bitsandbytes")
        },
        "methods": {name: _by_default(name, files, trust_remote_code) for name in METHODS if name != "none"},
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    experts = f", {found['experts']} of them in experts" if found["experts"] else ""
    text = [
        f"{found['model']}: {found['architecture']} ({found['model_type']}), {found['parameters']:,} parameters",
        f"{found['blocks']} blocks with {found['layers']} layers{experts}: {found['in_layers']:.1%} of the parameters",
    ]
    counts = Counter(found["carried"].values())
    text += [f"{count} stay in 16 bits whatever the format: {why}" for why, count in counts.items()]
    text += ["", "formats, with groups that fit"]
    for name, one in found["formats"].items():
        if one["problem"]:
            text.append(f"  {name:<20}no: {one['problem']}")
            continue
        share = f"{one['share']:.1%} of the parameters"
        text.append(f"  {name:<20}{share}; {one['readers']}")
        text += [f"  {'':<20}not {count} layers: {why}" for why, count in one["left"].items()]
    text += ["", "what methods do when a recipe names no format"]
    text += [f"  {name:<20}{said}" for name, said in found["methods"].items()]
    return text


def _in_format(name: str, files: ModelFiles, layers: Layers, trust_remote_code: bool) -> dict[str, Any]:
    """How much of a model a format holds, at its narrowest width of 4 bits or more."""
    from quantlab.quant.jobs import selection

    bits = min((b for b in FORMATS[name].bits if b >= 4), default=4)
    method = "bnb-nf4" if name == "bitsandbytes" else "rtn"
    asked = {"method": method, "bits": bits} | ({} if name == "bitsandbytes" else {"format": name})
    try:
        chosen = selection(QuantizeRecipe.model_validate(asked), files, trust_remote_code)
    except QuantlabError as error:
        return {"problem": str(error).removeprefix(f"{files.name}: "), "share": 0.0}
    share = layers.weights(chosen.widths) / max(files.params, 1)
    left = Counter(why for layer, why in chosen.kept.items() if layer not in layers.kept)
    who = readers(name, chosen.unread)
    return {"problem": "", "share": share, "left": left, "readers": who.text, "group_sizes": chosen.sizes()}


def _by_default(name: str, files: ModelFiles, trust_remote_code: bool) -> str:
    """The format that a method writes a model in, and whether something is left out for it."""
    from quantlab.quant.jobs import selection

    try:
        recipe = settle(QuantizeRecipe.model_validate({"method": name}), files, trust_remote_code)
        selection(recipe, files, trust_remote_code)
    except QuantlabError as error:
        return f"no: {str(error).removeprefix(f'{files.name}: ')}"
    ignored = ", experts stay in 16 bits" if recipe.ignore else ""
    instead = ", calibrated on a text, or by calibration.imatrix: FILE" if METHODS[name].diagonal else ""
    return f"{recipe.format}{ignored}{instead}"
