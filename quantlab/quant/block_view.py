"""A decoder block as methods see it: weights, statistics, and what may be moved between its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantlab.models.activations import Activations
from quantlab.models.block_inputs import BlockInputs
from quantlab.models.blockwise import batches, run_block
from quantlab.models.layers import as_weight, linears, matrix
from quantlab.models.scale_folding import ScaleFolds, signature, structure
from quantlab.quant.block import BlockForward, BlockView, NormInput
from quantlab.quant.hessian import InputHessian


class KnownFolds:
    """The structure of each kind of block, found once on a few probing tokens."""

    def __init__(self, hidden: torch.Tensor, calls: list[BlockInputs]) -> None:
        self.hidden, self.calls = hidden, calls
        self._known: dict[Any, ScaleFolds] = {}

    def of(self, index: int, block: nn.Module) -> ScaleFolds:
        key = signature(block)
        if key not in self._known:
            self._known[key] = structure(block, self.hidden, self.calls[index])
        return self._known[key]


def view(
    block: nn.Module,
    moments: list[InputHessian],
    found: ScaleFolds | None = None,
    cache: dict[Any, Any] | None = None,
    kept: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    forward: BlockForward | None = None,
) -> BlockView:
    """The block as methods see it. ``found`` is its structure, where a method asks for one. ``kept`` gives a parameter
    of the block, by name, the dtype that it is stored in, where the block computes in another."""
    layers = linears(block)
    stored = {name: matrix(layer).detach() for name, layer in layers.items()}
    if found is None:
        return BlockView(stored, moments, cache=cache, forward=forward)
    inputs, folds = {}, []
    for fold in found.norms:
        module = block.get_submodule(fold.norm)
        offset = norm_offset(module)
        if offset is None:
            continue
        folds.append(fold)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        inputs[fold.norm] = NormInput(kept(f"{fold.norm}.weight", weight.detach()), offset)
    found = replace(found, norms=tuple(folds))
    matrices = {f"{name}.weight" for name in layers}
    plain = {n: kept(n, p.detach()) for n, p in block.named_parameters() if n not in matrices}
    return BlockView(stored, moments, found, inputs, plain, cache, forward)


def norm_offset(norm: nn.Module) -> float | None:
    """1 where the norm multiplies by ``1 + weight`` (Gemma), else 0: told by running it with a zero weight; None
    where it does not take vectors of its weight's length (a norm of each head)."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    norm._parameters["weight"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    probe = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
    try:
        out = norm(probe[None])
        bias = getattr(norm, "bias", None)
        return 0.0 if torch.equal(out[0], torch.zeros_like(probe) if bias is None else bias) else 1.0
    except (ValueError, RuntimeError, TypeError, IndexError):
        return None
    finally:
        norm._parameters["weight"] = weight


class CalledBlock:
    """A block as calibration rows call it: a ``BlockForward`` over activations that still stand before the block."""

    def __init__(self, block: nn.Module, call: BlockInputs, states: Activations, rows_at_once: int) -> None:
        self.block, self.call, self.states, self.rows_at_once = block, call, states, rows_at_once

    def inputs(self) -> Iterator[torch.Tensor]:
        for part in batches(len(self.states), self.rows_at_once):
            yield self.states.read(part)

    def run(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = {
            f"{name}.weight": as_weight(self.block.get_submodule(name), value.to(hidden.dtype))
            for name, value in weights.items()
        }
        return run_block(self.block, hidden, self.call, values)


@contextmanager
def weights_in_place(block: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The block with other values of some parameters (names in the block); restored afterwards."""
    originals: dict[str, nn.Parameter | None] = {}
    try:
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            held = block.get_submodule(owner)._parameters
            originals[name] = known = held[leaf]
            assert known is not None
            held[leaf] = nn.Parameter(value.to(known.device, known.dtype), requires_grad=False)
        yield
    finally:
        for name, parameter in originals.items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = parameter


def stored_buffers(block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that belong into a checkpoint."""
    state = block.state_dict()
    return [(n, b) for n, b in block.named_buffers() if n in state]
