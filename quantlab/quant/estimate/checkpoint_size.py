"""How large a checkpoint will be, told from a model's headers and skeleton alone: the tensors that each layout has for
a linear, and the files they will lie in.

For ``out`` outputs, ``in`` inputs, ``b`` bits and ``G = in / group_size`` groups (1 for group size -1), in bits:

==================  ===================================================================================
gptq                ``out in b`` codes, ``16 out G`` scales, ``out G b`` zeros, ``32 in`` group indices
awq                 ``out in 4`` codes, ``16 out G`` scales, ``out G 4`` zeros
compressed-tensors  ``32 out ceil(in b / 32)`` codes, ``16 out G`` scales, 128 for the shape
fp8                 ``8 out in`` codes, ``16 out`` scales
gguf                by block type (``registry.block_types``), from 2.625 bits (Q2_K) to 8.5 (Q8_0) a weight
==================  ===================================================================================

Everything else keeps its size in the model's 16-bit type; headers are computed as they will be written. Exact for what
quantlab packs itself; for ``bits: auto`` the average width is taken for every layer, for ``type: auto`` what the file
may have, and for bitsandbytes the few hundred bytes of description a layer are approximate.
"""

from __future__ import annotations

from collections import Counter

from quantlab.models.blockwise import layers_of
from quantlab.models.safetensors.files import ModelFiles, TensorInfo
from quantlab.models.safetensors.header import Entry, file_bytes
from quantlab.quant.jobs import selection
from quantlab.quant.selection import Selection
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, Linear
from quantlab.registry.methods import METHODS

FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def checkpoint_bytes(recipe: QuantizeRecipe, files: ModelFiles) -> int:
    """Bytes of the weight files that a recipe makes of a model."""
    if recipe.method == "none":
        return files.size_bytes
    if METHODS[recipe.method].whole:
        return file_bytes(_bitsandbytes(recipe, files))
    chosen = selection(recipe, files)
    if FORMATS[recipe.format].types:
        from quantlab.quant import block_selection
        from quantlab.quant.mixed_precision.file_budget import file_budget

        if recipe.opens_types:  # what is allowed; the types are chosen to come near it
            return file_budget(recipe, files, chosen).size
        return block_selection.file_bytes(recipe, files, chosen, stored_float(files, recipe.dtype))
    if recipe.bits != "auto":
        return _packed_bytes(recipe, files, chosen)
    low, high = min(recipe.widths), max(recipe.widths)
    share = (recipe.average_bits - low) / (high - low)  # the size is linear in the average width
    sizes = [_packed_bytes(recipe, files, chosen.at(bits)) for bits in (low, high)]
    return round((1 - share) * sizes[0] + share * sizes[1])


def stored_float(files: ModelFiles, wish: str) -> str:
    """The type of a checkpoint's plain tensors: the model's, float16 for float32, in which no kernel computes."""
    if wish == "auto" and files.plain is not None:
        wish = files.plain
    kinds = Counter(t.dtype for t in files.tensors.values() if t.dtype in FLOATS[1:])
    found = NAMES[wish] if wish != "auto" else kinds.most_common(1)[0][0] if kinds else "F32"
    return "F16" if found == "F32" else found


def _packed_bytes(recipe: QuantizeRecipe, files: ModelFiles, chosen: Selection) -> int:
    """One file a block, and one for the rest."""
    layers = layers_of(files)
    shapes, prefix = layers.shapes, layers.prefix + "."
    plain = stored_float(files, recipe.dtype)
    held, floating = FORMATS[recipe.format], METHODS[recipe.method].floating
    parts: dict[str, dict[str, Entry]] = {}

    def packed(owner: str) -> dict[str, Entry]:
        rows, columns = shapes[owner]
        if owner not in chosen.widths:
            return {f"{owner}.weight": (plain, (rows, columns))}
        bits, size, *_ = chosen.widths[owner]
        linear = Linear(rows, columns, bits, 1 if size == -1 else columns // size, plain, floating)
        return {f"{owner}.{key}": entry for key, entry in held.tensors(linear).items()}

    split: set[str] = set()  # tensors of all experts, in whose place each gets its own
    for owner, tensors in layers.held_in.items():
        if owner in chosen.widths or recipe.format in layers.apart:
            split |= set(tensors)
    for owner, tensors in layers.held_in.items():
        if tensors[0] in split:
            part = parts.setdefault(_block_of(owner, prefix), {})
            part |= packed(owner)
            part |= {f"{owner}.bias": (plain, shapes[owner][:1])} if len(tensors) > 1 else {}
    for name, info in files.tensors.items():
        if name in split:
            continue
        part = parts.setdefault(_block_of(name, prefix), {})
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in chosen.widths:
            part |= packed(owner)
        else:
            kept = name in layers.carried or any(word in name for word in layers.exact)
            part[name] = (info.dtype, info.shape) if kept else _as_plain(info, plain)
    return sum(file_bytes(part) for part in parts.values())


def _block_of(name: str, prefix: str) -> str:
    """The number of the block that a tensor belongs to, empty outside the blocks."""
    return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""


def _as_plain(info: TensorInfo, plain: str) -> Entry:
    return (plain if info.dtype in FLOATS else info.dtype), info.shape


def _bitsandbytes(recipe: QuantizeRecipe, files: ModelFiles) -> dict[str, Entry]:
    """int8: codes and one scale a row. 4 bits: codes, a scale every 64 weights, tables; scales twice quantized have one
    byte each and a float32 scale every 256 of them. One file, every linear but the head."""
    linears = files.block_linears()
    plain = {"float32": "F32"}.get(recipe.dtype, stored_float(files, recipe.dtype))
    found: dict[str, Entry] = {}
    for name, info in files.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in linears:
            found[name] = _as_plain(info, plain)
            continue
        rows, columns = linears[owner]
        if recipe.method == "bnb-int8":
            found |= {
                name: ("I8", (rows, columns)),
                f"{owner}.SCB": ("F32", (rows,)),
                f"{owner}.weight_format": ("U8", ()),
            }
            continue
        scales = -(-rows * columns // 64)
        kind = recipe.method.removeprefix("bnb-")
        found |= {
            name: ("U8", (rows * columns // 2, 1)),
            f"{name}.absmax": ("U8" if recipe.double_quant else "F32", (scales,)),
            f"{name}.quant_map": ("F32", (16,)),
            f"{name}.quant_state.bitsandbytes__{kind}": ("U8", (90,)),
        }
        if recipe.double_quant:
            found[f"{name}.nested_absmax"] = ("F32", (-(-scales // 256),))
            found[f"{name}.nested_quant_map"] = ("F32", (256,))
    return found
