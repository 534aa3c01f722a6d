"""``bits: auto``: every layer at every width, then the widths that cost the model least within the budget.

The walk solves all widths of a layer at once, from the same statistics (``gptq.solve_many``), and writes each to blocks
of its own beside the checkpoint. What a layer loses at each width is known then; what a unit of that loss costs the
model is measured (``sensitivity``); ``allocate`` chooses. The checkpoint is put together from the blocks written.
Disk: about 17 bits a weight while it lasts, as much as the model in bfloat16; no statistics are kept, nothing is solved
twice, and a killed run goes on from the blocks it has.

With AWQ a width decides on the scales that are folded into other layers, so layers that are linked by a fold share one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantlab.errors import RecipeError
from quantlab.formats import format_module
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.scale_folding import ScaleFolds
from quantlab.progress import Progress
from quantlab.quant.block import BlockResult
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.grid import Quantized
from quantlab.quant.mixed_precision.allocate import Allocation, BudgetError, Layer, allocate
from quantlab.quant.sequential import Plan
from quantlab.quant.verify.reference_logits import ReferencePass
from quantlab.registry.formats import FORMATS, fitting_widths


def width_plans(plan: Plan, widths: Sequence[int], *, resume: bool) -> list[Plan]:
    """A plan for each width, writing into the scratch folder of the checkpoint they are for."""
    found = []
    for bits in widths:
        own = plan.writer
        folder = own.scratch / "widths" / str(bits)
        folder.parent.mkdir(parents=True, exist_ok=True)
        writer = CheckpointWriter(folder, own.prefix, own.blocks, own.dtype, own.key, resume=resume)
        writer.exact = own.exact
        grid = replace(plan.grid, bits=bits)
        name, chosen = f"{plan.name} at {bits} bits", plan.selection.at(bits)
        found.append(replace(plan, name=name, grid=grid, writer=writer, selection=chosen))
    return found


@dataclass(frozen=True)
class Choice:
    """``plan``: the checkpoint put together. ``widths``: bits and group size by layer. ``allocation``: how well."""

    plan: Plan
    widths: dict[str, tuple[int, int]]
    allocation: Allocation

    def record(self) -> dict[str, Any]:
        """For quantlab.json."""
        a = self.allocation
        return {
            "average_bits": round(a.average_bits, 4),
            "gap": a.gap,
            "layers": {name: bits for name, (bits, _) in self.widths.items()},
        }


def choose(
    plan: Plan,
    solved: Sequence[Plan],
    opened: BlockwiseModel,
    target_bits: float,
    probe: ReferencePass | None,
    progress: Progress,
    structures: Sequence[ScaleFolds] = (),
    *,
    measured: Mapping[str, float],
) -> Choice:
    """Choose a width for every layer and put the checkpoint's blocks together from those that were solved.

    Args:
        plan: of the checkpoint to make. solved: one plan a width, all of whose blocks are written.
        structures: of each block, where scales were folded. measured: sensitivities, by layer.

    Raises:
        RecipeError: the target is smaller than the layers allow.
    """
    layers, tied = _layers(plan, solved, opened, measured, structures)
    try:
        allocation = allocate(layers, target_bits, tied=tied)
    except BudgetError as error:
        raise RecipeError(
            f"target_bits: {error}", hint=f"--set target_bits={error.smallest:g} or more"
        ) from error
    counts = {
        b: sum(w == b for w in allocation.widths.values()) for b in sorted({*allocation.widths.values()})
    }
    shown = ", ".join(f"{count} at {bits}" for bits, count in counts.items())
    progress.note(f"{plan.name}: {allocation.average_bits:.3f} bits on average; layers: {shown}")
    by_bits = {p.grid.bits: p for p in solved}
    sizes = {name: width.group_size for name, width in plan.selection.widths.items()}
    widths = {name: (bits, sizes[name]) for name, bits in allocation.widths.items()}
    if probe is not None:
        plan.probe = probe.start()
    for index in range(len(opened.blocks)):
        folds = structures[index] if structures else ScaleFolds()
        _assemble(plan, by_bits, index, allocation.widths, opened, probe, folds)
    return Choice(plan, widths, allocation)


def _layers(
    plan: Plan,
    solved: Sequence[Plan],
    opened: BlockwiseModel,
    measured: Mapping[str, float],
    structures: Sequence[ScaleFolds],
) -> tuple[list[Layer], list[list[str]]]:
    """What is to be decided, and which layers must decide alike."""
    layers = []
    for name, width in plan.selection.widths.items():
        out_features, in_features = opened.layers.shapes[name]
        fitting = fitting_widths(plan.layout, width.group_size, in_features, out_features)
        loss = {p.grid.bits: p.writer.losses[name] for p in solved if p.grid.bits in fitting}
        layers.append(Layer(name, out_features * in_features, loss, measured[name]))
    tied: list[list[str]] = []
    for index, found in enumerate(structures):
        full = f"{opened.prefix}.{index}."
        groups = [list(fold.layers) for fold in found.norms] + [[p.producer, p.consumer] for p in found.pairs]
        named = [[opened.names.on_disk(full + name) for name in group] for group in groups]
        tied += [kept for group in named if (kept := [n for n in group if n in plan.selection.widths])]
    return layers, tied


def _assemble(
    plan: Plan,
    by_bits: Mapping[int, Plan],
    index: int,
    widths: Mapping[str, int],
    opened: BlockwiseModel,
    probe: ReferencePass | None,
    folds: ScaleFolds,
) -> None:
    """Write one block of the checkpoint: each layer's tensors from the block of its width."""
    prefix = f"{opened.stored_prefix}.{index}."
    chosen = {name.removeprefix(prefix): bits for name, bits in widths.items() if name.startswith(prefix)}
    blocks = {bits: by_bits[bits].writer.read_block(index) for bits in {*chosen.values()}}
    reader, suffixes = format_module(plan.layout), FORMATS[plan.layout].suffixes
    tensors, result, loss, facts = {}, BlockResult(), {}, {}
    for name, bits in chosen.items():
        parts = {s: blocks[bits][f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in blocks[bits]}
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in parts.items()})
        loss[name] = by_bits[bits].writer.losses[prefix + name]
        if prefix + name in by_bits[bits].writer.facts:
            facts[name] = by_bits[bits].writer.facts[prefix + name]
        size = plan.selection.widths[prefix + name].group_size
        codes, scales, zeros, group_of = reader.unpack(parts, bits=bits, group_size=size)
        result.quantized[_inside(opened, index, prefix + name)] = Quantized(
            codes, scales, zeros, group_of, bits
        )
    packed = {f"{name}.{suffix}" for name in chosen for suffix in suffixes}
    owners = _owners(folds, result.quantized)
    for key in blocks[min(blocks)].keys() - packed:
        inside = _inside(opened, index, prefix + key)
        owner = owners.get(inside)
        bits = (
            min(blocks) if owner is None else widths[opened.names.on_disk(f"{opened.prefix}.{index}.{owner}")]
        )
        tensors[key] = result.replaced[inside] = blocks[bits][key]
    if plan.probe is not None and probe is not None:
        plan.probe = probe.through(index, plan.probe, result)
    if not plan.writer.has_block(index):
        plan.writer.write_block(index, tensors, loss, facts=facts)


def _owners(folds: ScaleFolds, quantized: Collection[str]) -> dict[str, str]:
    """By full name in the block: parameters that folding changes, and a layer, of those that are ``quantized``, whose
    width decided how."""
    found = {}
    for fold in folds.norms:
        layers = [name for name in fold.layers if name in quantized]
        left = [name for name in fold.layers if name not in quantized]
        names = [
            f"{fold.norm}.weight",
            f"{fold.norm}.bias",
            *(f"{other}.weight" for other in (*fold.others, *left)),
        ]
        found.update(dict.fromkeys(names, layers[0]) if layers else {})
    found.update(
        {f"{pair.producer}.bias": pair.producer for pair in folds.pairs if pair.producer in quantized}
    )
    return found


def _inside(opened: BlockwiseModel, index: int, stored: str) -> str:
    """The name in the block of a module or tensor of the files."""
    return opened.names.in_model(stored).removeprefix(f"{opened.prefix}.{index}.")
