"""The engine: one walk through a model's blocks that solves any number of recipes.

For each block: load it, run the calibration rows through it while second moments are gathered, solve every plan from
them, write what was solved, go on. Plans that propagate ``original`` outputs share one stream of activations, hence
one forward pass a block; a plan that propagates its own ``quantized`` outputs has its own stream, as in the GPTQ paper.
``corrected`` plans take their statistics from the shared stream and have, for some of the rows, one of their own beside
it: they aim at the original's outputs on the inputs that their own blocks give, stage by stage (``drift``).
Plans of one method that differ in their grids alone are handed to it together. Statistics of the original stream can be
kept, and a later walk solved from them without any forward pass.

Memory: one block, its statistics, and the activations of each stream, which may lie in files instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from quantlab.formats import format_module
from quantlab.models.activations import Activations
from quantlab.models.block_inputs import BlockInputs
from quantlab.models.blockwise import BlockwiseModel, batches, run_block
from quantlab.models.layers import as_weight, linears, matrix
from quantlab.models.memory import trim
from quantlab.models.safetensors.files import TensorInfo
from quantlab.models.scale_folding import PROBE_ROWS, PROBE_TOKENS, ScaleFolds
from quantlab.models.scaled import scaled_activations
from quantlab.progress import Progress
from quantlab.quant.block import BlockResult, BlockView
from quantlab.quant.block_view import CalledBlock, KnownFolds, stored_buffers, view, weights_in_place
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.drift import (
    DAMP,
    Drift,
    Inputs,
    KeptInputs,
    inputs_of,
    is_expert,
    rows_paired,
    stages,
    widest,
)
from quantlab.quant.grid import Grid, Quantized, layer_loss
from quantlab.quant.hessian import Collector, InputHessian, StopForward, fill_up
from quantlab.quant.imatrix_store import Keep, Statistics
from quantlab.quant.layer_facts import layer_facts
from quantlab.quant.selection import Selection
from quantlab.quant.verify.reference_logits import ReferencePass
from quantlab.registry import load
from quantlab.registry.formats import FORMATS
from quantlab.registry.methods import METHODS

ROWS_EMBEDDED = 32  # calibration rows looked up in the embedding at once
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}  # calibration tokens in one forward of a block


@dataclass
class Plan:
    """One recipe as the engine needs it. ``grid`` is that of most layers, ``selection`` says which layers are
    quantized and how. ``options`` go to the method as keyword arguments; ``seconds`` counts the time spent on this
    plan alone, packing and writing included. ``probe`` [rows, tokens, hidden] are some hidden states that are sent
    through the quantized blocks, so that the finished checkpoint can be held against them. ``outside`` are matrices
    outside the blocks, packed in files, by their names in the files of the model; a format of block types has those."""

    name: str
    method: str
    grid: Grid
    layout: str
    writer: CheckpointWriter
    selection: Selection
    options: Mapping[str, Any] = field(default_factory=dict)
    propagate: Literal["original", "quantized", "corrected"] = "original"
    seconds: float = 0.0
    probe: torch.Tensor | None = None
    outside: Mapping[str, TensorInfo] = field(default_factory=dict)

    def methods(self) -> set[str]:
        """The plan's method, and those of single layers."""
        return {self.method} | {width.method for width in self.selection.widths.values() if width.method}

    def grid_of(self, name: str) -> Grid:
        """The grid of a layer, by its name in the files."""
        width = self.selection.widths[name]
        return replace(self.grid, bits=width.bits, group_size=width.group_size, type=width.type)

    @property
    def solver(self) -> str:
        """The function that solves it, as ``module:function``."""
        return METHODS[self.method].solver(of_blocks=bool(FORMATS[self.layout].types)) or ""


@dataclass
class Stream:
    """Activations on their way through the model, and the plans that look at them. ``own``: those of the first rows
    as a corrected plan's blocks give them, by plan."""

    states: Activations | None  # None where no plan looks at data
    plans: list[Plan]
    quantized: bool
    own: dict[str, Activations] = field(default_factory=dict)

    def all(self) -> list[Activations]:
        return [*([self.states] if self.states is not None else []), *self.own.values()]


@dataclass
class SequentialPass:
    """What a walk through the model has besides its plans.

    calls: how each block is called for calibration rows. probe: what moves the plans' probes on. keep: where to put the
    statistics. reuse: statistics to solve from, without a forward pass. tight: give memory back to the system after
    every block, and run one row at a time.
    """

    streams: list[Stream]
    calls: list[BlockInputs]
    structures: KnownFolds | None = None
    probe: ReferencePass | None = None
    keep: Keep | None = None
    reuse: Statistics | None = None
    tight: bool = False


def open_pass(
    opened: BlockwiseModel,
    rows: torch.Tensor | None,
    plans: Sequence[Plan],
    *,
    spill: Path | None = None,
    key: Mapping[str, str] | None = None,
    probe: ReferencePass | None = None,
    keep: Keep | None = None,
    reuse: Statistics | None = None,
) -> SequentialPass:
    """Run everything before the first block, for every stream that the plans need.

    Args:
        rows: calibration token ids int64 [rows, seq_len]; None when no plan looks at data.
        spill: folder for activations that are to lie in files, for the stream that plans share. A stream of a plan's
            own lies in the folder of its checkpoint. None keeps all in memory.
        key: what an interrupted walk must have had in common for its activations to be gone on with.
        probe, keep, reuse: as in :class:`SequentialPass`.
    """
    walk = SequentialPass([], [], probe=probe, keep=keep, reuse=reuse, tight=spill is not None)
    if probe is not None:
        for plan in plans:
            plan.probe = probe.start(plan.outside)
    if any("folds" in METHODS[plan.method].needs for plan in plans):
        corner = rows if rows is not None else torch.arange(PROBE_ROWS * PROBE_TOKENS).view(PROBE_ROWS, -1)
        walk.structures = KnownFolds(*opened.inputs(corner[:PROBE_ROWS, :PROBE_TOKENS]))
    shared = [p for p in plans if p.propagate != "quantized"]
    wanted = [(shared, False, spill)] if shared else []
    for plan in plans:
        if plan.propagate == "quantized":
            wanted.append(([plan], True, _own_folder(plan, spill)))
    fresh: list[Activations] = []
    first_states: torch.Tensor | None = None  # of two rows, which is enough to know how blocks are called
    for members, quantized, folder in wanted:
        first = min(p.writer.first_missing() for p in members)
        sees_inputs = any("inputs" in METHODS[p.method].needs for p in members)
        corrected = [p for p in members if p.propagate == "corrected"]
        kept = reuse is not None and not quantized and not sees_inputs
        if rows is None or first == len(opened.blocks) or (kept and not corrected):
            walk.streams.append(Stream(None, members, quantized))
            continue
        if first_states is None:
            first_states, walk.calls = opened.inputs(rows[:2])
            if any(call.own for call in walk.calls):
                walk.calls = opened.inputs(rows)[1]
        paired = rows_paired(rows.shape[0], rows.shape[1], widest(opened.layers.shapes))
        # [seq_len, hidden], or with streams before hidden
        sized = (first_states.shape[1:], first_states.dtype)
        states = _states(opened, paired if kept else len(rows), sized, folder, key, first, fresh)
        stream = Stream(states, members, quantized)
        for plan in corrected:
            begin = plan.writer.first_missing()
            stream.own[plan.name] = _states(
                opened, paired, sized, _own_folder(plan, spill), key, begin, fresh
            )
        walk.streams.append(stream)
    if rows is not None and fresh:
        _embed(opened, rows, fresh)
    return walk


def _own_folder(plan: Plan, spill: Path | None) -> Path | None:
    """Where activations of a plan's own lie, if they are to lie in files."""
    return plan.writer.scratch / "activations-own" if spill else None


def _states(
    opened: BlockwiseModel,
    rows: int,
    sized: tuple[torch.Size, torch.dtype],
    folder: Path | None,
    key: Mapping[str, str] | None,
    first: int,
    fresh: list[Activations],
) -> Activations:
    """States that an interrupted walk left in ``folder``, unless they are behind ``first``, the first block that is to
    be solved; else new ones, which join the ``fresh``."""
    states = Activations.resume(folder, key or {}, device=opened.device) if folder else None
    if states is not None and (
        states.step > first + 1 or len(states) != rows
    ):  # a plan joined that lacks earlier blocks
        states.remove()
        states = None
    if states is None:
        shape, dtype = sized
        states = Activations.make((rows, *shape), dtype, spill=folder, device=opened.device, key=key)
        fresh.append(states)
    return states


def _embed(opened: BlockwiseModel, rows: torch.Tensor, fresh: Sequence[Activations]) -> None:
    """Fill states with what the first block gets; some hold the first rows only."""
    for part in batches(max(map(len, fresh)), ROWS_EMBEDDED):
        hidden = opened.inputs(rows[part])[0]
        for states in fresh:
            stop = min(part.stop, len(states))
            if part.start < stop:
                states.write(slice(part.start, stop), hidden[: stop - part.start])
        del hidden
    for states in fresh:
        states.commit()  # step 1: before block 0


@torch.no_grad()
def quantize_blocks(opened: BlockwiseModel, walk: SequentialPass, progress: Progress) -> None:
    """Solve every plan for every block and hand the tensors to the plans' writers.

    Blocks that a plan's writer already holds are not solved again, only passed through.
    """
    total = len(opened.blocks)
    with progress.task(f"quantizing {total} blocks", total=total) as advance:
        for index in range(total):
            last = index == total - 1
            needed = [stream for stream in walk.streams if _needed(stream, index, last)]
            if needed:
                block = opened.block(index)
                for stream in needed:
                    _Step(opened, walk, index, block).run(stream, last=last)
                opened.empty(block)
                trim()
            for plan in (p for stream in walk.streams if stream not in needed for p in stream.plans):
                if plan.probe is not None:
                    plan.probe = plan.writer.kept(index)["probe"].to(opened.device)
            advance(1)
    for stream in walk.streams:
        for states in stream.all():
            states.remove()


def _needed(stream: Stream, index: int, last: bool) -> bool:
    """Whether a stream has anything to do with a block: plans to solve, or states to move on."""
    if any(not p.writer.has_block(index) for p in stream.plans):
        return True
    return not last and any(states.step <= index + 1 for states in stream.all())


@dataclass
class _Step:
    """One block for one stream: gather, solve, and move the activations on."""

    opened: BlockwiseModel
    walk: SequentialPass
    index: int
    block: nn.Module
    # Experts with too few tokens: how many, by name relative to the block in the files.
    starved: dict[str, int] = field(default_factory=dict)
    # What inputs and outputs of the layers are like, by the same names.
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    # By plan that moves layers before it rounds them: their losses against the layers as they were, by the same names.
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, stream: Stream, *, last: bool) -> None:
        states, pending = stream.states, [p for p in stream.plans if not p.writer.has_block(self.index)]
        # the states are still before this block
        behind = states is not None and states.step <= self.index + 1
        # Methods that see the inputs find them where they are; they move on once everything is solved.
        holds = [p for p in pending if "inputs" in METHODS[p.method].needs]
        paired = KeptInputs(max(map(len, stream.own.values()), default=0), states.shape[1] if states else 0)
        moments, moved = self._moments(stream, pending, behind, last or bool(holds), paired)
        self.starved = {self._stored(name): tokens for name, tokens in fill_up(moments).items()}
        weights = {name: matrix(layer) for name, layer in linears(self.block).items()} if moments else {}
        self.facts = {self._stored(name): fact for name, fact in layer_facts(weights, moments).items()}
        forward = None
        if holds and states is not None:
            call, at_once = self.walk.calls[self.index], self._rows_at_once(states)
            forward = CalledBlock(self.block, call, states, at_once)
        for plan in stream.plans:
            if plan not in pending:
                self._carry(plan, None, self._follow(stream, plan, last))
        for plan, result in self._solved(stream, pending, moments, forward, paired):
            started = time.perf_counter()
            self._carry(plan, result, self._follow(stream, plan, last))
            self._write(plan, result)
            del result
            trim()  # or the peaks of what comes next add up to those of what was before
            plan.seconds += time.perf_counter() - started
        if states is not None and behind and not last:
            if not moved and not stream.quantized:
                self._advance(states)
            states.commit()
        for plan in stream.plans:
            if plan.propagate == "corrected" and (own := self._follow(stream, plan, last)) is not None:
                own.commit()

    def _follow(self, stream: Stream, plan: Plan, last: bool) -> Activations | None:
        """States that are still before this block, and go through it as the plan's checkpoint has it."""
        states = stream.states if stream.quantized else stream.own.get(plan.name)
        return None if states is None or last or states.step > self.index + 1 else states

    def _moments(
        self, stream: Stream, pending: list[Plan], behind: bool, stay: bool, paired: KeptInputs
    ) -> tuple[list[InputHessian], bool]:
        """Hessians for the plans that are to be solved, and whether the states of the original model moved on in the
        same pass, which they do unless they are to ``stay``. ``paired`` keeps what the first rows give, unless memory
        is tight."""
        store = self.walk.reuse
        if store is not None and not stream.quantized:
            return (store.load(self.index, self.opened.device) if pending else []), False
        states = stream.states
        if states is None or not behind:
            if pending and states is not None:
                raise RuntimeError(f"block {self.index} was lost after the states behind it were kept")
            return [], False
        if not pending and (stream.quantized or stay):
            return [], False
        moves = not stream.quantized and not stay
        collector = Collector(linears(self.block) if pending else {}, inputs_only=not moves)
        with collector:
            for part in batches(len(states), self._rows_at_once(states)):
                out = None
                with suppress(StopForward):
                    out = run_block(self.block, states.read(part), self.walk.calls[self.index], rows=part)
                if pending and not self.walk.tight:
                    paired.keep(
                        collector.seen(), part
                    )  # before the states, which may be an input, are overwritten
                if moves:
                    assert out is not None
                    states.write(part, out)
                del out
                collector.next_batch()
        trim()
        moments = collector.finish() if pending else []
        if self.walk.keep is not None and pending and not stream.quantized:
            self.walk.keep.save(self.index, moments)
        return moments, moves

    def _advance(self, states: Activations) -> None:
        """Run states through the block, with the weights that it has now."""
        for part in batches(len(states), self._rows_at_once(states)):
            out = run_block(self.block, states.read(part), self.walk.calls[self.index], rows=part)
            states.write(part, out)

    def _rows_at_once(self, states: Activations) -> int:
        return 1 if self.walk.tight else max(1, TOKENS_AT_ONCE[self.opened.device.type] // states.shape[1])

    def _solved(
        self,
        stream: Stream,
        pending: Sequence[Plan],
        moments: list[InputHessian],
        forward: CalledBlock | None,
        paired: KeptInputs,
    ) -> Iterator[tuple[Plan, BlockResult]]:
        """Solve the plans, those that differ in their grids alone at once, and let go of each result that was used."""
        groups: dict[tuple[Any, ...], list[Plan]] = {}
        for plan in pending:
            own = plan.name if plan.name in stream.own else ""
            key = (plan.solver, own, self._fixed(plan), *sorted(plan.options.items()))
            groups.setdefault(key, []).append(plan)
        structures = self.walk.structures
        found = None
        if structures is not None and any("folds" in METHODS[p.method].needs for p in pending):
            found = structures.of(self.index, self.block)
        seen = view(self.block, moments, found, {} if len(groups) > 1 else None, self._as_stored, forward)
        for (_, own, fixed, *_), plans in groups.items():
            started = time.perf_counter()
            mine = replace(seen, structure=seen.structure.without(fixed))
            if own:
                originals: Inputs = paired if paired.held else _Recomputed(self, stream)
                solved = [self._corrected(plans[0], mine, stream.own[own], originals)]
            else:
                solved = load(plans[0].solver)(mine, [self._grids(p, "") for p in plans], **plans[0].options)
                solved = [self._overridden(p, mine, result) for p, result in zip(plans, solved, strict=True)]
            for plan in plans:
                plan.seconds += (time.perf_counter() - started) / len(plans)
            for plan in plans:
                result = solved.pop(0)
                self._oriented(result)
                yield plan, result

    def _corrected(self, plan: Plan, seen: BlockView, own: Activations, originals: Inputs) -> BlockResult:
        """The block solved stage by stage, each towards what the original gives on what the stages before it give."""
        whole, all_grids, layers = BlockResult(), self._grids(plan, ""), linears(self.block)
        for stage in stages(seen.moments):
            names = [name for one in stage for name in one.layers]
            grids = {name: grid for name, grid in all_grids.items() if name in names}
            paired = {one.layers[0]: layers[one.layers[0]] for one in stage}
            drifts = self._drifts(plan, own, originals, whole, paired) if grids else {}
            stored = dict(seen.stored)
            for one in stage:
                if one.layers[0] in drifts:
                    targets = drifts[one.layers[0]].target(seen.stack(one.layers), DAMP)
                    stored |= zip(one.layers, targets.split(seen.rows(one.layers)), strict=True)
            mine = replace(seen, moments=stage, stored=stored)
            result = load(plan.solver)(mine, [grids], **plan.options)[0]
            result = self._overridden(plan, mine, result, names)
            hessians = {name: one.hessian for one in stage if one.tokens for name in one.layers}
            for name in result.loss.keys() & hessians.keys():
                error = layer_loss(
                    seen.weight(name), result.quantized[name].dequantize().float(), hessians[name]
                )
                self.errors.setdefault(plan.name, {})[self._stored(name)] = error.item()
            whole.quantized |= result.quantized
            whole.replaced |= result.replaced
            whole.loss |= result.loss
        return whole

    def _drifts(
        self,
        plan: Plan,
        own: Activations,
        originals: Inputs,
        solved: BlockResult,
        layers: Mapping[str, nn.Module],
    ) -> dict[str, Drift]:
        """How the inputs of ``layers`` differ from the original's once the block holds what was ``solved``."""
        layers = {name: layer for name, layer in layers.items() if not is_expert(name)}
        values = {
            f"{name}.weight": as_weight(self.block.get_submodule(name), q.dequantize().to(self.opened.dtype))
            for name, q in solved.quantized.items()
        }
        found: dict[str, Drift] = {}
        for part in batches(len(own), self._rows_at_once(own)) if layers else ():
            before = originals.of(layers, part)
            with weights_in_place(self.block, values):
                after = self.inputs_of(layers, own, part)
            for name in before.keys() & after.keys():
                if before[name].shape == after[name].shape:
                    found.setdefault(name, Drift.empty(before[name].shape[1], before[name].device))
                    found[name].add(before[name], after[name])
        return found

    def inputs_of(
        self, layers: Mapping[str, nn.Module], states: Activations, part: slice
    ) -> dict[str, torch.Tensor]:
        """What ``layers`` get for rows ``part``, with the weights that the block has now."""
        call = self.walk.calls[self.index]
        return inputs_of(lambda: run_block(self.block, states.read(part), call, rows=part), layers)

    def _grids(self, plan: Plan, method: str) -> dict[str, Grid]:
        """The grids of the block's layers, by name in it, that a plan quantizes by a ``method`` of their own, or, where
        that is empty, by its method."""
        found = {}
        for name in linears(self.block):
            stored = self._on_disk(name)
            width = plan.selection.widths.get(stored)
            if width is not None and width.method == method:
                found[name] = plan.grid_of(stored)
        return found

    def _overridden(
        self, plan: Plan, seen: BlockView, result: BlockResult, names: Sequence[str] | None = None
    ) -> BlockResult:
        """The result with those layers (of ``names``) that have a method of their own, as the plan's method left them:
        a scale that it moved into them stays."""
        for method in sorted(plan.methods() - {plan.method}):
            grids = self._grids(plan, method)
            grids = {name: grid for name, grid in grids.items() if names is None or name in names}
            if not grids:
                continue
            moved = {name: result.replaced.pop(f"{name}.weight", seen.stored[name]) for name in grids}
            own = replace(seen, stored={**seen.stored, **moved}, structure=ScaleFolds(), cache=None)
            options = METHODS[method].options().model_dump()
            other = load(METHODS[method].solve or "")(own, [grids], **options)[0]
            result.quantized |= other.quantized
            result.loss |= other.loss
        return result

    def _oriented(self, result: BlockResult) -> None:
        """Weights that a method replaced as the model holds them: methods see every layer as [out, in]."""
        for name, module in linears(self.block).items():
            if (key := f"{name}.weight") in result.replaced:
                result.replaced[key] = as_weight(module, result.replaced[key])

    def _write(self, plan: Plan, result: BlockResult) -> None:
        pack = format_module(plan.layout).pack
        tensors: dict[str, torch.Tensor | TensorInfo] = {}
        prefix, names = f"{self.opened.prefix}.{self.index}.", self.opened.names
        split = self._split(plan, result)
        for name, parameter in list(self.block.named_parameters()) + stored_buffers(self.block):
            owner, _, leaf = name.rpartition(".")
            if prefix + name in self.opened.names.computed:
                continue
            if prefix + name in names.parts and names.parts[prefix + name].parameter not in split:
                continue
            if owner in result.quantized and leaf == "weight":
                q, stored = result.quantized[owner], self._stored(owner)
                grid = plan.grid_of(self._on_disk(owner))
                if isinstance(q, Quantized):
                    packed = pack(
                        q.codes, q.scales, q.zeros, q.group_of,
                        bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric,
                    )  # fmt: skip
                else:
                    packed = pack(q)
                tensors.update({f"{stored}.{key}": value for key, value in packed.items()})
            else:
                tensors[self._stored(name)] = result.replaced.get(name, parameter.detach())
        if FORMATS[plan.layout].unscaled:
            for name, channels in scaled_activations(self.block, self.opened.config.model_type).items():
                tensors[self._stored(name)] = torch.ones(channels, dtype=plan.writer.dtype)
        tensors |= self._carried(split)
        losses = {self._stored(n): v for n, v in result.loss.items()}
        kept = None if plan.probe is None else {"probe": plan.probe}
        errors = {name: {"error": error} for name, error in self.errors.get(plan.name, {}).items()}
        facts = {name: fact | errors.get(name, {}) for name, fact in self.facts.items() if name in losses}
        plan.writer.write_block(self.index, tensors, losses, kept, self.starved, facts)

    def _fixed(self, plan: Plan) -> frozenset[str]:
        """Parameters of the block that no scale can be moved into: those that the checkpoint holds in another form than
        the skeleton (what is computed, experts that the plan leaves in one tensor), and layers with a method of their
        own that is solved from the statistics of inputs without a scale."""
        prefix, names = f"{self.opened.prefix}.{self.index}.", self.opened.names
        found = [name for name in names.computed if name.startswith(prefix)]
        for name in names.parts:
            owner = names.on_disk(name.rpartition(".")[0])
            if name.startswith(prefix) and owner not in plan.selection.widths:
                found.append(name)
        for stored, width in plan.selection.widths.items():
            if width.method and "hessian" in METHODS[width.method].needs:
                found.append(f"{names.in_model(stored)}.weight")
        return frozenset(name.removeprefix(prefix) for name in found if name.startswith(prefix))

    def _split(self, plan: Plan, result: BlockResult) -> set[str]:
        """Tensors of the files, of all experts, in whose place each expert gets its own: where any is quantized."""
        prefix, parts = f"{self.opened.prefix}.{self.index}.", self.opened.names.parts
        mine = {name: part.parameter for name, part in parts.items() if name.startswith(prefix)}
        if plan.layout in self.opened.layers.apart:
            return set(mine.values())
        return {
            held
            for name, held in mine.items()
            if name.removeprefix(prefix).rpartition(".")[0] in result.quantized
        }

    def _carried(self, split: set[str]) -> dict[str, TensorInfo]:
        """Tensors of the files that the skeleton has not, or has in another form: they stay as they are, but for those
        that were ``split``."""
        prefix = f"{self.opened.stored_prefix}.{self.index}."
        known = set(self.opened.names.stored.values()) | split
        return {
            name.removeprefix(prefix): info
            for name, info in self.opened.files.tensors.items()
            if name.startswith(prefix) and name not in known
        }

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter of the block in the dtype that it is stored in."""
        return self.opened.as_stored(f"{self.opened.prefix}.{self.index}.{name}", tensor)

    def _on_disk(self, name: str) -> str:
        """The full name in the files of a module or tensor of the block."""
        return self.opened.names.on_disk(f"{self.opened.prefix}.{self.index}.{name}")

    def _stored(self, name: str) -> str:
        """The name in the files, relative to the block, of a module or tensor of the block."""
        return self._on_disk(name).removeprefix(f"{self.opened.stored_prefix}.{self.index}.")

    def _carry(self, plan: Plan, result: BlockResult | None, states: Activations | None) -> None:
        """Run the plan's probe, and states that follow the plan, through the block as its checkpoint has it."""
        if plan.probe is not None and self.walk.probe is not None:
            if result is None:
                plan.probe = plan.writer.kept(self.index)["probe"].to(self.opened.device)
            else:
                plan.probe = self.walk.probe.through(self.index, plan.probe, result)
        if states is None:
            return
        values = self._stored_values(plan) if result is None else self._solved_values(plan, result)
        with weights_in_place(self.block, dict(values)):
            self._advance(states)

    def _solved_values(self, plan: Plan, result: BlockResult) -> Iterator[tuple[str, torch.Tensor]]:
        """What the checkpoint will hold of the block, the same as a run that goes on reads from it."""
        for name, solved in result.quantized.items():
            layer = self.block.get_submodule(name)
            yield f"{name}.weight", as_weight(layer, solved.dequantize().to(self.opened.dtype))
        for name, parameter in self.block.named_parameters():
            if not name.endswith(".weight") or name.removesuffix(".weight") not in result.quantized:
                value = result.replaced.get(name, parameter.detach())
                full = self._on_disk(name)
                yield name, value.to(plan.writer.dtype_of(full, value.dtype))

    def _stored_values(self, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        """What a block written earlier holds, for a run that goes on."""
        tensors = plan.writer.read_block(self.index)
        reader, suffixes = format_module(plan.layout), FORMATS[plan.layout].suffixes
        of_blocks = bool(FORMATS[plan.layout].types)
        for name, parameter in self.block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            stored = self._stored(owner)
            if of_blocks and leaf == "weight" and (blocks := reader.packed(tensors, stored)) is not None:
                yield (
                    name,
                    as_weight(self.block.get_submodule(owner), blocks.dequantize().to(self.opened.dtype)),
                )
            elif not of_blocks and leaf == "weight" and f"{stored}.{suffixes[0]}" in tensors:
                parts = {s: tensors[f"{stored}.{s}"] for s in suffixes if f"{stored}.{s}" in tensors}
                grid = plan.grid_of(self._on_disk(owner))
                codes, scales, zeros, group_of = reader.unpack(
                    parts, bits=grid.bits, group_size=grid.group_size
                )
                values = Quantized(codes, scales, zeros, group_of, grid.bits).dequantize()
                yield name, as_weight(self.block.get_submodule(owner), values.to(self.opened.dtype))
            elif self._stored(name) in tensors:
                yield name, tensors[self._stored(name)]
            else:  # computed from others in the files, or a part of one
                full = self._on_disk(name)
                yield name, parameter.detach().to(plan.writer.dtype_of(full, parameter.dtype))


def stored_weights(
    opened: BlockwiseModel, plan: Plan, index: int, block: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """The quantized layers of a block that a plan has written: names in the block, and weights as the block holds
    them, one at a time."""
    step = _Step(opened, SequentialPass([], []), index, block)
    layers = {
        f"{name}.weight": name for name in linears(block) if step._on_disk(name) in plan.selection.widths
    }
    for name, value in step._stored_values(plan):
        if name in layers:
            yield layers[name], value


@dataclass
class _Recomputed:
    """Inputs of the original block, computed again from states that are kept in files until they are committed."""

    step: _Step
    stream: Stream

    def of(self, layers: Mapping[str, nn.Module], part: slice) -> Mapping[str, torch.Tensor]:
        assert self.stream.states is not None
        return self.step.inputs_of(layers, self.stream.states, part)


def needs_data(plans: Sequence[Plan]) -> bool:
    """Whether any plan looks at calibration rows."""
    return any(METHODS[p.method].calibrated or p.propagate != "original" for p in plans)
