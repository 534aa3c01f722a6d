"""``type: auto``: the block type of every matrix of a GGUF file, so that the model loses least within a size in bytes.

What each type costs each matrix is measured on a sample (``type_costs``), what there is to spend is known to the byte
(``file_budget``), and ``allocate`` finds the choice of least cost. Then the file is solved once, as with types that
were given. The choice is on disk before anything is solved, so that an interrupted run goes on with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import MachineError
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.safetensors.durable import replace
from quantlab.models.safetensors.files import ModelFiles
from quantlab.paths import atomic_write_text
from quantlab.progress import Progress
from quantlab.quant.block_selection import places_of
from quantlab.quant.checkpoint_paths import read_object
from quantlab.quant.grid import Grid
from quantlab.quant.hessian import InputHessian
from quantlab.quant.imatrix_store import Statistics
from quantlab.quant.mixed_precision.allocate import Layer, allocate_within
from quantlab.quant.mixed_precision.file_budget import FileBudget, file_budget, with_types
from quantlab.quant.mixed_precision.type_costs import Costs, Diagonals, Outside, type_costs
from quantlab.quant.sequential import TOKENS_AT_ONCE, Plan
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES

CHOICE, DIAGONALS = "types.json", "diagonals.safetensors"
BY_NUMBER = {kind.number: name for name, kind in BLOCK_TYPES.items()}


@dataclass(frozen=True)
class TypeChoice:
    """``parts``: types by matrix, by its name in the model's files. ``tensors``: by name in the GGUF file. ``size``:
    bytes of the file; ``allowed``: those that it may have. ``cost``: nats a token that the errors are expected to cost;
    ``gap``: how far that may be from the least, as a share of it."""

    parts: dict[str, str]
    tensors: dict[str, str]
    size: int
    allowed: int
    cost: float
    gap: float

    def record(self) -> dict[str, Any]:
        """For quantlab.json."""
        return {key: value for key, value in asdict(self).items() if key != "parts"}

    def save(self, folder: Path) -> None:
        """Keep it for a run that goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / CHOICE, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> TypeChoice | None:
        """What an interrupted run kept; None where it came not so far."""
        found = read_object(folder / CHOICE)
        return None if found is None else cls(**found)


def put_types(
    pairs: Sequence[tuple[QuantizeRecipe, Plan]],
    opened: BlockwiseModel,
    rows: torch.Tensor,
    progress: Progress,
    *,
    spilled: bool,
    reuse: Statistics | None,
    keeps: bool,
) -> tuple[list[TypeChoice], Diagonals | None]:
    """Choose the types of every plan and put them into it.

    Args:
        rows: calibration token ids int64 [rows, seq_len]. spilled: activations lie in files, rows are run one by one.
        reuse: statistics that are there already. keeps: the diagonals are all that will be needed of statistics.

    Returns:
        The choices, and the diagonals where they were to be kept and an interrupted run has not lost them.
    """
    scratch = pairs[0][1].writer.scratch
    found = [TypeChoice.load(plan.writer.scratch) for _, plan in pairs]
    diagonals = load_diagonals(scratch, len(opened.blocks)) if keeps else None
    if not all(found):
        diagonals = Diagonals() if keeps else None
        costs = type_costs(
            opened, rows, _wanted(pairs), _roles(pairs, opened.files), progress,
            spill=scratch / "activations-types" if spilled else None,
            rows_at_once=1 if spilled else max(1, TOKENS_AT_ONCE[opened.device.type] // rows.shape[1]),
            reuse=reuse, keep=diagonals,
        )  # fmt: skip
        if diagonals is not None:
            save_diagonals(diagonals, scratch)
        for i, (recipe, plan) in enumerate(pairs):
            if found[i] is None:
                choice = choose_types(file_budget(recipe, opened.files, plan.selection), costs)
                choice.save(plan.writer.scratch)
                found[i] = choice
    choices = [choice for choice in found if choice is not None]
    for (_, plan), choice in zip(pairs, choices, strict=True):
        plan.selection = with_types(plan.selection, choice.parts)
        usual = dict.fromkeys(BLOCK_TYPES, 0)
        for name, width in plan.selection.widths.items():
            usual[width.type] += opened.layers.weights([name])
        kind = BLOCK_TYPES[max(usual, key=lambda name: usual[name])]
        plan.grid = Grid(kind.bits, kind.group, not kind.minimum, plan.grid.zero_min)
    return choices, diagonals


def _wanted(pairs: Sequence[tuple[QuantizeRecipe, Plan]]) -> dict[str, list[str]]:
    """The types that any plan may give a matrix, by its name in the model's files."""
    wanted: dict[str, set[str]] = {}
    for _, plan in pairs:
        for name, one in plan.selection.open.items():
            wanted.setdefault(name, set()).update(one.types)
    return {name: sorted(kinds) for name, kinds in wanted.items()}


def _roles(pairs: Sequence[tuple[QuantizeRecipe, Plan]], files: ModelFiles) -> dict[str, Outside]:
    """What the open matrices outside the blocks are for."""
    places, roles = places_of(files), {}
    for name in {name for _, plan in pairs for name in plan.selection.outside}:
        place = places.of(f"{name}.weight")
        looked_up = place is not None and place.leaf == "token_embd"
        roles[name] = Outside(looked_up, not looked_up or bool(places.settings.get("tie_word_embeddings")))
    return roles


def choose_types(budget: FileBudget, costs: Costs) -> TypeChoice:
    """The types of least cost within the budget."""
    layers = []
    for one in budget.matrices:
        loss = {BLOCK_TYPES[kind].number: sum(costs[part][kind] for part in one.parts) for kind in one.types}
        size = {BLOCK_TYPES[kind].number: 8 * one.bytes(kind) for kind in one.types}
        layers.append(Layer(one.name, one.weights, loss, size=size))
    found = allocate_within(layers, 8 * (budget.size - budget.fixed))
    tensors = {name: BY_NUMBER[number] for name, number in found.widths.items()}
    parts = {part: tensors[one.name] for one in budget.matrices for part in one.parts}
    return TypeChoice(parts, tensors, budget.fixed + found.size // 8, budget.size, found.objective, found.gap)


def table(record: Mapping[str, Any]) -> list[str]:
    """What was chosen, in lines for people, from :meth:`TypeChoice.record`: how many tensors of each kind have which
    type."""
    kinds: dict[str, Counter[str]] = {}
    for name, kind in record["tensors"].items():
        kinds.setdefault(name.rpartition(".")[2], Counter())[kind] += 1
    used = [kind for kind in sorted(BLOCK_TYPES, key=_bits) if any(kind in row for row in kinds.values())]
    rows = [["", *used]]
    rows += [[leaf, *(str(counts[kind] or "") for kind in used)] for leaf, counts in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return [f"{record['size']:,} of {record['allowed']:,} bytes; tensors of each type:", *lines]


def _bits(kind: str) -> tuple[float, str]:
    return BLOCK_TYPES[kind].bits_per_weight, kind


def save_diagonals(held: Diagonals, folder: Path) -> None:
    """Keep them for a run that goes on.

    Raises:
        MachineError: the disk is full.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, moments in enumerate(held.blocks):
        for one in moments:
            name = f"{index}/{' '.join(one.layers)}"
            tensors[name] = one.hessian.contiguous()
            tensors[f"{name}/tokens"] = torch.tensor([one.tokens])
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{DIAGONALS}.part"
    try:
        save_file(tensors, beside)
        replace(beside, folder / DIAGONALS)
    except OSError as error:
        raise MachineError(f"cannot write {folder / DIAGONALS}: {error}", hint="is the disk full?") from error


def load_diagonals(folder: Path, blocks: int) -> Diagonals | None:
    """What an interrupted run kept; None where it came not so far."""
    if not (folder / DIAGONALS).is_file():
        return None
    found = Diagonals([[] for _ in range(blocks)])
    held = load_file(folder / DIAGONALS)
    for name in [name for name in held if not name.endswith("/tokens")]:
        index, _, layers = name.partition("/")
        tokens = int(held[f"{name}/tokens"])
        squares = held[name]
        found.blocks[int(index)].append(
            InputHessian(layers.split(" "), squares, torch.zeros_like(squares), tokens)
        )
    return found
