"""The engine: one walk through a model's blocks that solves any number of recipes.

For each block: load it, run the calibration rows through it while second moments are gathered, solve every plan from
them, write what was solved, go on. Plans that propagate ``original`` outputs share one stream of activations, hence
one forward pass a block; a plan that propagates its own ``quantized`` outputs has its own stream, as in the GPTQ paper.
Memory: one block, its statistics, and one set of hidden states a stream.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from quantlab.formats import layout
from quantlab.models.blocks import Call, Opened, batches, linears, run_block
from quantlab.progress import Progress
from quantlab.quant import CALIBRATED, method
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.grid import Grid, Quantized
from quantlab.quant.statistics import Collector
from quantlab.quant.view import BlockResult, BlockView, NormInput

ROWS_AT_ONCE = 8  # calibration rows in one forward of a block


@dataclass
class Plan:
    """One recipe as the engine needs it. ``options`` go to the method as keyword arguments; ``seconds`` counts the
    time spent solving this plan alone, packing and writing included."""

    name: str
    method: str
    grid: Grid
    layout: str
    writer: CheckpointWriter
    options: Mapping[str, Any] = field(default_factory=dict)
    propagate: Literal["original", "quantized"] = "original"
    seconds: float = 0.0


@dataclass
class Stream:
    """Activations [rows, seq_len, hidden] on their way through the model, and the plans that look at them."""

    hidden: torch.Tensor
    plans: list[Plan]
    quantized: bool


def streams_of(plans: Sequence[Plan], hidden: torch.Tensor) -> list[Stream]:
    """Plans that share activations, together."""
    shared = [p for p in plans if p.propagate == "original"]
    own = [p for p in plans if p.propagate == "quantized"]
    found = [Stream(hidden, shared, False)] if shared else []
    return found + [Stream(hidden.clone(), [p], True) for p in own]


@torch.no_grad()
def quantize_blocks(
    opened: Opened, rows: torch.Tensor | None, plans: Sequence[Plan], progress: Progress
) -> None:
    """Solve every plan for every block and hand the tensors to the plans' writers.

    Args:
        rows: calibration token ids int64 [rows, seq_len]; None when no plan looks at data.

    Blocks that a plan's writer already holds are not solved again, only passed through.
    """
    streams: list[Stream] = []
    calls: list[Call] = []
    if rows is not None:
        hidden, calls = opened.inputs(rows)
        streams = streams_of(plans, hidden)
    total = len(opened.blocks)
    with progress.task(f"quantizing {total} blocks", total=total) as advance:
        for index in range(total):
            block = opened.block(index)
            last = index == total - 1
            if not streams:
                for plan in plans:
                    _solve(plan, index, block, view(block, None, opened))
            for stream in streams:
                _step(stream, index, block, calls[index], opened, last)
            opened.empty(block)
            advance(1)


def _step(stream: Stream, index: int, block: nn.Module, call: Call, opened: Opened, last: bool) -> None:
    """One block for one stream: gather, solve, and move the activations on."""
    pending = [p for p in stream.plans if not p.writer.has_block(index)]
    if not pending and last:
        return
    collector = Collector(linears(block) if pending else {}, norms(block))
    if pending or not stream.quantized:
        with collector:
            for part in batches(len(stream.hidden), ROWS_AT_ONCE):
                out = run_block(block, stream.hidden[part], call)
                collector.next_batch()
                if not stream.quantized:
                    stream.hidden[part] = out
    seen = view(block, collector, opened) if pending else None
    for plan in pending:
        assert seen is not None
        _solve(plan, index, block, seen)
    if stream.quantized and not last:
        _pass_quantized(stream, index, block, call)


def _solve(plan: Plan, index: int, block: nn.Module, seen: BlockView) -> None:
    """Solve one plan for one block and write the block's tensors."""
    if plan.writer.has_block(index):
        return
    started = time.perf_counter()
    result: BlockResult = method(plan.method)(seen, plan.grid, **plan.options)
    pack = layout(plan.layout).pack
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in list(block.named_parameters()) + stored_buffers(block):
        owner, _, leaf = name.rpartition(".")
        if owner in result.quantized and leaf == "weight":
            q = result.quantized[owner]
            packed = pack(q.codes, q.scales, q.zeros, q.group_of, bits=plan.grid.bits)
            tensors.update({f"{owner}.{key}": value for key, value in packed.items()})
        else:
            tensors[name] = result.replaced.get(name, parameter.detach())
    plan.writer.write_block(index, tensors, result.loss)
    plan.seconds += time.perf_counter() - started


def _pass_quantized(stream: Stream, index: int, block: nn.Module, call: Call) -> None:
    """Run the stream through the block as the plan's checkpoint holds it, then restore the block."""
    plan = stream.plans[0]
    tensors = plan.writer.read_block(index)
    unpack = layout(plan.layout).unpack
    originals: dict[str, nn.Parameter] = {}
    for name, parameter in block.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.qweight" in tensors and leaf == "weight":
            parts = {s: tensors[f"{owner}.{s}"] for s in layout(plan.layout).SUFFIXES}
            codes, scales, zeros, group_of = unpack(
                parts, bits=plan.grid.bits, group_size=plan.grid.group_size
            )
            value = Quantized(codes, scales, zeros, group_of).dequantize()
        else:
            value = tensors[name]
        originals[name] = parameter
        _set(block, name, nn.Parameter(value.to(parameter.device, parameter.dtype), requires_grad=False))
    for part in batches(len(stream.hidden), ROWS_AT_ONCE):
        stream.hidden[part] = run_block(block, stream.hidden[part], call)
    for name, parameter in originals.items():
        _set(block, name, parameter)


def _set(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    block.get_submodule(owner)._parameters[leaf] = parameter


def view(block: nn.Module, collector: Collector | None, opened: Opened) -> BlockView:
    """The block as methods see it: float32 weights, statistics, and which norm feeds which layer."""
    weights = {name: layer.weight.detach().to(torch.float32) for name, layer in linears(block).items()}
    biases = {
        name.removesuffix(".bias"): p.detach()
        for name, p in block.named_parameters()
        if name.endswith(".bias")
    }
    if collector is None:
        return BlockView(weights, biases=biases)
    found = {}
    for layer, name in collector.norm_of.items():
        module = block.get_submodule(name)
        found[layer] = NormInput(name, module.weight.detach(), norm_offset(module))  # type: ignore[arg-type,operator]
    return BlockView(weights, collector.finish(), found, biases, head_dim(opened.config))


def norms(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of one vector ``weight``: the normalisations."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(w := getattr(module, "weight", None), nn.Parameter) and w.dim() == 1
    }


def norm_offset(norm: nn.Module) -> float:
    """1 where the norm multiplies by ``1 + weight`` (Gemma), else 0: told by running it with a zero weight."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    norm._parameters["weight"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    probe = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
    try:
        out = norm(probe[None])
        bias = getattr(norm, "bias", None)
        return 0.0 if torch.equal(out[0], torch.zeros_like(probe) if bias is None else bias) else 1.0
    finally:
        norm._parameters["weight"] = weight


def head_dim(config: Any) -> int:
    """Width of an attention head, 0 where the configuration does not say."""
    if getattr(config, "head_dim", None):
        return int(config.head_dim)
    heads = getattr(config, "num_attention_heads", 0)
    return int(config.hidden_size // heads) if heads else 0


def stored_buffers(block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that belong into a checkpoint."""
    state = block.state_dict()
    return [(n, b) for n, b in block.named_buffers() if n in state]


def needs_data(plans: Sequence[Plan]) -> bool:
    """Whether any plan looks at calibration rows."""
    return any(p.method in CALIBRATED or p.propagate == "quantized" for p in plans)
