"""Which block type each matrix of a GGUF file gets: llama.cpp's choice for the recipe's type or mixture, for the layers
that the selection quantizes and for the embedding and the head, which lie outside the blocks. With ``type: auto`` it is
left open, with the types that fit.

``registry.mixtures`` makes the choice from a tensor's name in the file; here are the names, and what is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quantlab.formats.gguf.architectures import Place, Places
from quantlab.formats.gguf.checkpoint import Held, lay_out
from quantlab.formats.gguf.file import file_bytes as bytes_of
from quantlab.formats.gguf.metadata import expert_count, read_settings
from quantlab.models.blockwise import layers_of
from quantlab.models.safetensors.files import ModelFiles
from quantlab.paths import slug
from quantlab.quant.selection import Open, Selection
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.methods import METHODS
from quantlab.registry.mixtures import AUTO_TYPE, Model, candidates, tensor_type

NO_BLOCK = "its {columns} inputs are not divisible by 32, the least block of a GGUF file"
OUTSIDE = ("token_embd", "output")


def places_of(files: ModelFiles) -> Places:
    """Where the model's tensors go in a GGUF file.

    Raises:
        DataError: its architecture is none that can be written.
    """
    if "gguf places" not in files.memo:
        files.memo["gguf places"] = Places(read_settings(files.path), slug(files.name))
    found = files.memo["gguf places"]
    assert isinstance(found, Places)
    return found


def typed(chosen: Selection, recipe: QuantizeRecipe, files: ModelFiles) -> Selection:
    """The selection with the block type that each layer really gets, in place of the recipe's type or mixture, and
    those of the matrices outside the blocks.

    Raises:
        DataError: as :func:`places_of`, and for a tensor that GGUF has no name for.
    """
    places, shapes = places_of(files), layers_of(files).shapes
    model = _model(places.settings, recipe)
    widths, kept, left_open = {}, dict(chosen.kept), dict[str, Open]()
    for name, width in chosen.widths.items():
        place, columns = places.of(f"{name}.weight"), shapes[name][1]
        fitting = candidates(columns, recipe.types) if width.type == AUTO_TYPE else ()
        if width.type == AUTO_TYPE:
            found = "F16" if place is None or not fitting else fitting[0]
        else:
            found = (
                "F16" if place is None else tensor_type(width.type, place.leaf, columns, place.layer, model)
            )
        if place is not None and (found == "F16" or _stays(place, shapes[name])):
            kept[name] = NO_BLOCK.format(columns=columns)
            continue
        kind = BLOCK_TYPES[found]
        widths[name] = width._replace(bits=kind.bits, group_size=kind.group, type=found)
        if fitting:
            left_open[name] = Open(fitting, shapes[name])
    for name in files.tensors:
        places.of(name)
    around = _outside(recipe, files)
    left_open |= around if recipe.opens_types else {}
    return replace(
        chosen,
        widths=widths,
        kept={name: kept[name] for name in sorted(kept)},
        outside={name: one.types[0] for name, one in around.items()},
        open=left_open,
    )


def _outside(recipe: QuantizeRecipe, files: ModelFiles) -> dict[str, Open]:
    """The block types of the embedding and the head, by their names in the files without ``.weight``; what fits no
    block is left out. One each, unless the recipe leaves them open."""
    places = places_of(files)
    model, found = _model(places.settings, recipe), dict[str, Open]()
    for name, info in files.tensors.items():
        if not name.endswith(".weight") or len(info.shape) != 2:
            continue
        place = places.of(name)
        if place is not None and place.leaf in OUTSIDE:
            rows, columns = info.shape
            kinds: tuple[str, ...] = candidates(columns, recipe.types)
            if not recipe.opens_types:
                kinds = (tensor_type(str(recipe.type), place.leaf, columns, -1, model),)
            if kinds and kinds[0] in BLOCK_TYPES:
                found[name.removesuffix(".weight")] = Open(kinds, (rows, columns))
    return found


def file_bytes(recipe: QuantizeRecipe, files: ModelFiles, chosen: Selection, plain: str) -> int:
    """Bytes of the file that a recipe makes, to the byte. ``chosen``: as :func:`typed` gives it. ``plain``: the type of
    the checkpoint's plain matrices.

    Raises:
        DataError: as ``formats.gguf.file.file_bytes``, which makes the header for it.
    """
    places, layers = places_of(files), layers_of(files)
    types = {name: width.type for name, width in chosen.widths.items()} | dict(chosen.outside)
    held: dict[str, Held] = {}
    split = {tensor for owner, of in layers.held_in.items() if owner in types for tensor in of}
    for name, info in files.tensors.items():
        if name in split:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in types:
            held[name] = Held(types[owner], info.shape)
        else:
            exact = name in layers.carried or any(word in name for word in layers.exact)
            held[name] = Held(
                info.dtype if exact or info.dtype not in ("F64", "F32", "F16", "BF16") else plain, info.shape
            )
    for owner in layers.held_in:
        if owner in types:
            held[f"{owner}.weight"] = Held(types[owner], layers.shapes[owner])
    entries = lay_out(held, places, _nothing)
    return bytes_of(entries, files.path, places.settings, str(recipe.type), places.called)


def _nothing(name: str) -> torch.Tensor:
    raise RuntimeError(f"{name} was not to be read")


def _stays(place: Place, shape: tuple[int, int]) -> bool:
    """Whether llama.cpp keeps a matrix as it is: routers, and gates of one row, which are vectors there."""
    return "ffn_gate_inp" in place.leaf or shape[0] == 1


def _model(settings: Mapping[str, Any], recipe: QuantizeRecipe) -> Model:
    heads = int(settings["num_attention_heads"])
    sharing = heads / int(settings.get("num_key_value_heads") or heads)
    layers = int(settings["num_hidden_layers"])
    return Model(
        layers,
        sharing,
        expert_count(settings),
        bool(settings.get("tie_word_embeddings")),
        METHODS[recipe.method].calibrated,
        settings.get("model_type") == "llama" and layers == 80 and sharing > 1,
    )
