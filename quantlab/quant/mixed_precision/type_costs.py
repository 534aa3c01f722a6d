"""What each block type costs each matrix, in nats a token: measured on a sample, before anything is solved.

A type's error E in a layer costs ``sum_i f_i (E H E^T)_ii``: the error's square in each output channel, by the second
moments H of the layer's input, times what an error in that channel costs (``sensitivity.fisher``). Types are compared
by rounding ``SAMPLED`` rows of a layer in each of them, scales searched with H's diagonal: what a solver makes of the
errors afterwards takes off about the same share from each type. For the embedding and the head those rows are rounded
that the probing tokens have, or that their predictions draw.

The statistics are gathered in a pass of its own over the calibration rows. Of a method that looks at no more than the
diagonals these are kept, so that no second pass follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from quantlab.formats.gguf.encode import encode
from quantlab.models.activations import Activations
from quantlab.models.blockwise import BlockwiseModel, batches, run_block
from quantlab.models.layers import linears, matrix
from quantlab.models.safetensors.tensors import read_rows
from quantlab.progress import Progress
from quantlab.quant.hessian import Collector, InputHessian, fill_up
from quantlab.quant.imatrix_store import Statistics
from quantlab.quant.mixed_precision.sensitivity import ROWS, SEQ_LEN, Fisher, fisher
from quantlab.registry.block_types import BLOCK_TYPES

SAMPLED = 128  # rows of a layer that are rounded

Costs = dict[str, dict[str, float]]  # by matrix, by its name in the model's files, and type


class Outside(NamedTuple):
    """A matrix outside the blocks. ``looked_up``: it is the embedding. ``head``: it makes the logits."""

    looked_up: bool
    head: bool


@dataclass
class Diagonals:
    """Diagonals of second moments, block by block: what a method that looks at no more is solved from."""

    blocks: list[list[InputHessian]] = field(default_factory=list)

    def keep(self, moments: Sequence[InputHessian]) -> None:
        self.blocks.append(
            [replace(one, layers=list(one.layers), hessian=one.diagonal.cpu().clone()) for one in moments]
        )

    def load(self, index: int, device: torch.device | str) -> list[InputHessian]:
        return [
            replace(one, layers=list(one.layers), hessian=one.hessian.to(device, copy=True))
            for one in self.blocks[index]
        ]


def type_costs(
    opened: BlockwiseModel,
    rows: torch.Tensor,
    wanted: Mapping[str, Sequence[str]],
    outside: Mapping[str, Outside],
    progress: Progress,
    *,
    spill: Path | None = None,
    rows_at_once: int = 1,
    reuse: Statistics | None = None,
    keep: Diagonals | None = None,
) -> Costs:
    """Costs of the types that matrices may get.

    Args:
        rows: calibration token ids int64 [rows, seq_len]; a corner of them measures what errors cost.
        wanted: types by matrix, in and ``outside`` the blocks, by names in the files.
        spill: folder for activations that are to lie in files. rows_at_once: in one forward of a block.
        reuse: statistics that are there already. keep: where the diagonals of those that are not are put.
    """
    total = len(opened.blocks)
    with progress.task("measuring what errors cost", total=2 * total) as advance:
        costs = fisher(opened, rows[:ROWS, :SEQ_LEN], advance=advance)
    found: Costs = {}
    for name, role in outside.items():
        found[name] = _outside_costs(opened, f"{name}.weight", wanted[name], costs, role)
    with progress.task("trying block types", total=total) as advance:

        def visit(index: int, block: nn.Module, moments: list[InputHessian]) -> None:
            if keep is not None:
                keep.keep(moments)
            fill_up(moments)
            layers = linears(block)
            for one in moments:
                for name in one.layers:
                    stored = opened.names.on_disk(f"{opened.prefix}.{index}.{name}")
                    if stored in wanted:
                        weight = matrix(layers[name]).detach()
                        found[stored] = layer_costs(weight, one, costs.layers[stored], wanted[stored])
            advance(1)

        _walk(opened, rows, visit, spill, rows_at_once, reuse)
    return found


def layer_costs(
    weight: torch.Tensor, moments: InputHessian, fisher: torch.Tensor, types: Sequence[str]
) -> dict[str, float]:
    """By type, what it costs a layer.

    Args:
        weight: [out, in]. moments: of its input. fisher: what an error in each output channel costs, float32 [out].
    """
    count = len(weight)
    picked = torch.linspace(0, count - 1, min(count, SAMPLED)).round().long().to(weight.device)
    rows, weights = weight[picked].float(), fisher.to(weight.device)[picked] * (count / len(picked))
    importance = moments.diagonal if moments.tokens else None
    found = {}
    for kind in types:
        error = encode(rows, BLOCK_TYPES[kind], importance).dequantize() - rows  # [picked, in]
        squared = error.square() @ moments.hessian if moments.hessian.dim() == 1 else _forms(error, moments)
        found[kind] = (squared.clamp(min=0) @ weights).item()
    return found


def _forms(error: torch.Tensor, moments: InputHessian) -> torch.Tensor:
    """The quadratic form of every row, [rows]."""
    return ((error @ moments.hessian) * error).sum(dim=1)


def _outside_costs(
    opened: BlockwiseModel, name: str, types: Sequence[str], costs: Fisher, role: Outside
) -> dict[str, float]:
    """By type, what it costs the embedding, the head, or the one that is both."""
    info, device = opened.files.tensors[name], costs.states.device
    found = dict.fromkeys(types, 0.0)

    def rounded(ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rows of the matrix, and their errors by type, [ids, hidden]."""
        plain = read_rows(info, ids).float()
        return plain.to(device), {
            kind: (encode(plain, BLOCK_TYPES[kind]).dequantize() - plain).to(device) for kind in types
        }

    if role.looked_up:
        ids, back = torch.unique(costs.rows.flatten().cpu(), return_inverse=True)
        plain, errors = rounded(ids)
        seen = plain[back]
        scale = (costs.states * seen).sum() / seen.square().sum()  # of Gemma: the root of the width
        for kind, error in errors.items():
            squares = error[back].square().mean(dim=0) * scale**2  # [hidden]
            found[kind] += (squares @ costs.embedding).item()
    if role.head:
        ids, back = torch.unique(costs.drawn.cpu(), return_inverse=True)  # back: [tokens, drawn]
        for kind, error in rounded(ids)[1].items():
            moved = (error[back] * costs.into_head[:, None]).sum(dim=-1)  # of the logits, [tokens, drawn]
            # The mean over pairs of 1/4 (d_v - d_u)^2 is half the variance, unbiased.
            found[kind] += moved.var(dim=1).mean().item() / 2
    return found


@torch.no_grad()
def _walk(
    opened: BlockwiseModel,
    rows: torch.Tensor,
    visit: Callable[[int, nn.Module, list[InputHessian]], None],
    spill: Path | None,
    rows_at_once: int,
    reuse: Statistics | None,
) -> None:
    """Every block in order, with its weights and the second moments of its layers' inputs."""
    total, states, calls = len(opened.blocks), None, []
    if reuse is None:
        first, calls = opened.inputs(rows[:2])
        if any(call.own for call in calls):
            calls = opened.inputs(rows)[1]
        shape = (len(rows), *first.shape[1:])
        states = Activations.make(shape, first.dtype, spill=spill, device=opened.device)
        for part in batches(len(rows), rows_at_once):
            states.write(part, opened.inputs(rows[part])[0])
        states.commit()
    for index in range(total):
        block = opened.block(index)
        if states is None:
            assert reuse is not None
            visit(index, block, reuse.load(index, opened.device))
        else:
            collector = Collector(linears(block))
            with collector:
                for part in batches(len(states), rows_at_once):
                    states.write(part, run_block(block, states.read(part), calls[index], rows=part))
                    collector.next_batch()
            states.commit()
            visit(index, block, collector.finish())
        opened.empty(block)
    if states is not None:
        states.remove()
