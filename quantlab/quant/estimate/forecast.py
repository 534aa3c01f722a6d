"""What a recipe will take, before it starts: bytes on disk, memory, seconds. From headers, the model's
skeleton and measured rates.

Size: see ``sizes``, exact but for ``bits: auto`` and bitsandbytes.

Memory, in bytes, above what the process holds after its imports (CPU; on a GPU the same sums lie on the device)::

    max( embedding,  block + activations + statistics + max(forward, solving) )

    embedding    the largest tensor outside the blocks, as stored and in the computing type
    block        the largest block's parameters in the computing type
    activations  rows * seq_len * hidden in the computing type, once a stream; nothing when they lie in files
    statistics   4 * in^2 for every distinct input of a block
    forward      tokens at once * (4 hidden + 3 widest) in the computing type, 4 * tokens at once * widest for H
    solving      4 * (2 in^2 + 5 rows in) for the largest set of layers that share an input, once for every grid

Seconds: the operations of each step over the rate of the kind of work it is. With T tokens, a block of P weights,
matrices [out, in]::

    forwards     (2 P + 4 seq_len width) T   one for all recipes that propagate original or corrected outputs, two for
                                             each other, and STAGED over the paired tokens for each corrected one
    choosing     for ``type: auto``: a forward and a backward pass over the probing tokens, and the search for the
                 scales of a sample of rows in each block type
    H            in^2 T                      a distinct input, and three times that for the paired tokens
    solving      ``Method.cost`` of the registry: products, and passes over all weights

The constants were fitted to measurements of this engine; expect the seconds within a factor of two, the memory within a
quarter. Both are recorded beside what a run really took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quantlab.models.blockwise import layers_of
from quantlab.models.safetensors.files import ModelFiles
from quantlab.quant.drift import rows_paired, widest
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes, stored_float
from quantlab.quant.mixed_precision.sensitivity import ROWS, SEQ_LEN
from quantlab.quant.mixed_precision.type_costs import SAMPLED
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.methods import METHODS

IDLE = 500_000_000  # bytes of a process that has imported torch and transformers
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}  # as the engine has it
TYPES_TRIED = 6  # of a matrix, with `type: auto`
STAGED = 2.7  # passes through a block, stage by stage and once more with all of it solved
LAST = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "w2", "c_proj", "wo")


@dataclass(frozen=True)
class MachineSpeed:
    """What the machine does a second. ``matmul``: floating point operations of products in the computing type,
    ``exact``: in float32, ``elements``: float32 elements passed over by a simple operation, ``disk``: bytes read or
    written. ``width``: bytes of a number that a model stored in 16 bits is computed in."""

    matmul: float
    exact: float
    elements: float
    disk: float
    width: int = 2


@dataclass(frozen=True)
class Forecast:
    """One recipe's. ``bits_per_weight`` counts everything stored, over the original parameters. ``disk_bytes`` is the
    most on disk while it works. ``parts``: seconds by kind of work."""

    size_bytes: int
    bits_per_weight: float
    disk_bytes: int
    memory_bytes: int
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For quantlab.json."""
        found = asdict(self) | {
            "seconds": round(self.seconds, 1),
            "bits_per_weight": round(self.bits_per_weight, 4),
        }
        return found | {"parts": {key: round(value, 2) for key, value in self.parts.items()}}


@dataclass(frozen=True)
class _Block:
    """A decoder block by its shapes. ``inputs``: for each distinct input, its width and the rows of the layers on
    it."""

    weights: int
    parameters: int
    inputs: tuple[tuple[int, int], ...]
    widest: int


def forecast(
    recipe: QuantizeRecipe,
    files: ModelFiles,
    rates: MachineSpeed,
    *,
    device: str = "cpu",
    spilled: bool = False,
    shared: int = 1,
    grids: int = 1,
) -> Forecast:
    """What one recipe takes.

    Args:
        spilled: activations lie in files.
        shared: how many recipes share the calibration pass; each is charged its part of it.
        grids: how many recipes of the same method are solved together (they add up in memory).
    """
    size = checkpoint_bytes(recipe, files)
    bits = 8 * size / max(files.params, 1)
    if recipe.method == "none":
        return Forecast(size, bits, 0, 0, 0.0)
    parts = _seconds(recipe, files, rates, shared)
    width = 4 if recipe.dtype == "float32" or (recipe.dtype == "auto" and _is_float32(files)) else rates.width
    memory = _memory(recipe, files, device, spilled, grids, width)
    kept = 2 * _activation_bytes(recipe, files, width) if spilled and recipe.needs_calibration else 0
    return Forecast(size, bits, size + kept, memory, sum(parts.values()), parts)


def together(
    recipes: Sequence[QuantizeRecipe],
    files: ModelFiles,
    rates: MachineSpeed,
    *,
    device: str = "cpu",
    spilled: bool = False,
) -> tuple[list[Forecast], float]:
    """Each recipe's forecast when they are run together, sharing the pass over the calibration rows where they can, and
    the seconds of all of them."""
    sharing = [r.calibration for r in recipes if r.needs_calibration and r.propagate != "quantized"]
    found = []
    for recipe in recipes:
        mine = recipe.needs_calibration and recipe.propagate != "quantized"
        shared = sharing.count(recipe.calibration) if mine else 1
        same = sum(other.method == recipe.method for other in recipes)
        found.append(
            forecast(recipe, files, rates, device=device, spilled=spilled, shared=shared, grids=same)
        )
    return found, sum(one.seconds for one in found)


def actual(size_bytes: int, memory_bytes: int, seconds: float) -> dict[str, Any]:
    """What a run really took, in the words of :meth:`Forecast.record`, to stand beside it in quantlab.json."""
    return {"size_bytes": size_bytes, "memory_bytes": memory_bytes, "seconds": round(seconds, 1)}


def _blocks(files: ModelFiles) -> list[_Block]:
    linears, prefix = layers_of(files).shapes, layers_of(files).prefix + "."
    groups: dict[str, dict[tuple[str, int, str], int]] = {}
    parameters: dict[str, int] = {}
    for name, info in files.tensors.items():
        if not name.startswith(prefix):
            continue
        number, _, inside = name.removeprefix(prefix).partition(".")
        parameters[number] = parameters.get(number, 0) + info.count
        owner = name.removesuffix(".weight")
        if owner in linears and name.endswith(".weight"):
            rows, columns = linears[owner]
            parent, _, leaf = inside.removesuffix(".weight").rpartition(".")
            # What closes attention or the feed-forward has an input of its own, though its width may be the same.
            key = (parent, columns, leaf if leaf in LAST else "")
            group = groups.setdefault(number, {})
            group[key] = group.get(key, 0) + rows
    found = []
    for number, group in groups.items():
        inputs = tuple((columns, rows) for (_, columns, _), rows in group.items())
        weights = sum(columns * rows for columns, rows in inputs)
        widest = max(max(columns, rows) for columns, rows in inputs)
        found.append(_Block(weights, parameters[number], inputs, widest))
    return found


def _seconds(recipe: QuantizeRecipe, files: ModelFiles, rates: MachineSpeed, shared: int) -> dict[str, float]:
    size = checkpoint_bytes(recipe, files)
    parts = {"reading and writing": (files.size_bytes / shared + size) / rates.disk}
    if METHODS[recipe.method].whole:
        rounded = sum(rows * columns for rows, columns in files.block_linears().values())
        return parts | {"rounding": 12 * rounded / rates.elements}
    blocks = _blocks(files)
    layers = [(columns, rows) for block in blocks for columns, rows in block.inputs]
    if recipe.needs_calibration:
        tokens = recipe.calibration.rows * recipe.calibration.seq_len
        width = _hidden(files)
        passes = 2 if recipe.propagate == "quantized" else 1
        gathered = 1 if not recipe.opens_types or METHODS[recipe.method].diagonal else 2
        attention = 4 * recipe.calibration.seq_len * width * len(blocks)
        forward = (2 * sum(b.weights for b in blocks) + attention) * tokens
        parts["forwards"] = (passes + gathered - 1) * forward / rates.matmul / shared
        squares = sum(columns**2 for columns, _ in layers)
        parts["second moments"] = gathered * squares * tokens / rates.exact / shared
        if recipe.propagate == "corrected":
            share = _paired(recipe, files) / recipe.calibration.rows
            targets = sum(columns**3 / 3 + 4 * rows * columns**2 for columns, rows in layers)
            parts["forwards"] += STAGED * share * forward / rates.matmul
            parts["second moments"] += (3 * share * squares * tokens + targets) / rates.exact
    weights = sum(columns * rows for columns, rows in layers)
    options = recipe.options().model_dump()
    cost = METHODS[recipe.method].cost(layers, options, recipe.solutions)
    if recipe.opens_types:
        tried = sum(min(rows, SAMPLED) * columns for rows, columns in layers_of(files).shapes.values())
        probe = (
            6 * ROWS * SEQ_LEN * sum(b.weights for b in blocks)
        )  # forward, and backward with a forward again
        searched = METHODS["imatrix"].cost([], {}, TYPES_TRIED).passes
        parts["choosing types"] = probe / rates.exact + searched * tried / rates.elements
    parts["solving"] = cost.products / rates.exact + cost.passes * weights / rates.elements
    return parts


def _memory(
    recipe: QuantizeRecipe, files: ModelFiles, device: str, spilled: bool, grids: int, width: int
) -> int:
    prefix = files.block_prefix + "."
    outside = [t for name, t in files.tensors.items() if not name.startswith(prefix)]
    largest = max((t.count for t in outside), default=0)
    embedding = largest * width + max((t.size_bytes for t in outside), default=0)
    if METHODS[recipe.method].whole:  # loaded whole, quantized as it is read
        return IDLE + checkpoint_bytes(recipe, files) + embedding
    blocks = _blocks(files)
    block = max(b.parameters for b in blocks) * width
    rows_in = max(rows * columns for b in blocks for columns, rows in b.inputs)
    side = max(columns for b in blocks for columns, _ in b.inputs)
    count = grids * recipe.solutions
    solving = 4 * (2 * side**2 + (3 + 2 * count) * rows_in)
    if not recipe.needs_calibration:
        return IDLE + max(embedding, block + 4 * 4 * rows_in)
    tokens = min(
        max(TOKENS_AT_ONCE[device.partition(":")[0]], recipe.calibration.seq_len),
        recipe.calibration.rows * recipe.calibration.seq_len,
    )
    widest = max(b.widest for b in blocks)
    forward = tokens * (width * (4 * _hidden(files) + 3 * widest) + 4 * widest)
    statistics = max(sum(4 * columns**2 for columns, _ in b.inputs) for b in blocks)
    held = 0 if spilled else _activation_bytes(recipe, files, width)
    if recipe.propagate == "corrected":  # own activations, the inputs of one block, and the moments of a pair
        inputs = max(sum(columns for columns, _ in b.inputs) for b in blocks) + _hidden(files)
        paired = _paired(recipe, files) * recipe.calibration.seq_len
        held += (0 if spilled else paired * inputs * width) + 3 * 4 * side**2
    return IDLE + max(embedding + held, block + held + statistics + max(forward, solving))


def _paired(recipe: QuantizeRecipe, files: ModelFiles) -> int:
    """Calibration rows that a corrected recipe looks at twice."""
    calibration = recipe.calibration
    return rows_paired(calibration.rows, calibration.seq_len, widest(layers_of(files).shapes))


def _activation_bytes(recipe: QuantizeRecipe, files: ModelFiles, width: int) -> int:
    """One copy of the hidden states of all calibration rows."""
    return recipe.calibration.rows * recipe.calibration.seq_len * _hidden(files) * width


def _is_float32(files: ModelFiles) -> bool:
    return "F32" in {t.dtype for t in files.tensors.values()} and stored_float(files, "auto") == "F16"


def _hidden(files: ModelFiles) -> int:
    """Width of the hidden states: what the configuration says, else the commonest input of the blocks."""
    text = files.config.get("text_config")
    said = (text if isinstance(text, dict) else files.config).get("hidden_size")
    if isinstance(said, int):
        return said
    widths = [columns for _, columns in files.block_linears().values()]
    return max(set(widths), key=widths.count)
