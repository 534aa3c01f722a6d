"""Running a model whose weights are never all there: each module's own are fetched when it runs and gone afterwards.

The model is a skeleton on the meta device; ``Weights`` say where its tensors come from. What is in memory at a time
is one matrix, and of a plain embedding only the rows that are looked up, of a large linear only a few rows at a time.
Slow for work, right for a few rows of tokens through a model that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from quantlab.models.layers import source_of

LARGE = 64 * 2**20  # bytes of float32 from which a linear is computed in pieces


class Weights(Protocol):
    """Tensors of a skeleton by name, in the dtype and on the device to compute with."""

    def whole(self, name: str) -> torch.Tensor | None:
        """A parameter; None to leave it as it is."""

    def part(self, name: str, rows: slice) -> torch.Tensor | None:
        """Some rows of a matrix; None where it is to be had only whole."""

    def looked_up(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows ``ids`` [...] of a matrix, [..., columns]; None where it is to be had only whole."""


@contextmanager
def borrowed(model: nn.Module, weights: Weights, prefix: str = "") -> Iterator[None]:
    """Let ``model`` run inside; ``prefix`` is its name in the names that ``weights`` know."""
    undo: list[Any] = []
    originals: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    with_parent = _read_by_parents(model)
    try:
        for name, module in model.named_modules():
            full = f"{prefix}.{name}".strip(".")
            if all(value is None for value in module._parameters.values()):
                continue
            originals.append((module, dict(module._parameters)))
            looked_up = type(module) is nn.Embedding
            large = type(module) is nn.Linear and 4 * module.weight.numel() > LARGE
            if name not in with_parent and (looked_up or large):
                module.forward = _Piecewise(module, weights, full)  # type: ignore[assignment]
                if looked_up:  # some models send token ids where its weight is: not to nowhere
                    module._parameters["weight"] = nn.Parameter(torch.empty(0), requires_grad=False)
                undo.append(lambda m=module: m.__dict__.pop("forward", None))
            else:
                undo += _lend(with_parent.get(name, module), module, weights, full)
        yield
    finally:
        for one in undo:
            one()
        for module, parameters in originals:
            module._parameters.update(parameters)


def _lend(runs: nn.Module, module: nn.Module, weights: Weights, name: str) -> list[Any]:
    """Have ``module``'s parameters there while ``runs`` runs; what undoes that."""
    parameters = dict(module._parameters)

    def before(_: nn.Module, args: Any) -> None:
        for key, held in parameters.items():
            value = None if held is None else weights.whole(f"{name}.{key}")
            if value is not None:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(parameters)

    hooks = [runs.register_forward_pre_hook(before), runs.register_forward_hook(after, always_call=True)]
    return [hook.remove for hook in hooks]


def _read_by_parents(model: nn.Module) -> dict[str, nn.Module]:
    """By the names of modules whose weight or bias the one around them reads by itself: that one. Theirs must be there
    while it runs."""
    found = {}
    for name, parent in model.named_modules():
        kind: Any = type(parent)
        source = source_of(kind)
        for child, _ in parent.named_children():
            if f"self.{child}.weight" in source or f"self.{child}.bias" in source:
                found[f"{name}.{child}".strip(".")] = parent
    return found


class _Piecewise:
    """The forward pass of an embedding or a large linear, from rows of its weight."""

    def __init__(self, module: nn.Module, weights: Weights, name: str) -> None:
        self.module, self.weights, self.name = module, weights, name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = f"{self.name}.weight"
        if isinstance(self.module, nn.Embedding):
            found = self.weights.looked_up(weight, x)
            return found if found is not None else functional.embedding(x, self._whole("weight"))
        assert isinstance(self.module, nn.Linear)
        bias = None if self.module.bias is None else self._whole("bias")
        rows = max(1, LARGE // (4 * self.module.in_features))
        pieces = []
        for start in range(0, self.module.out_features, rows):
            part = self.weights.part(weight, slice(start, min(start + rows, self.module.out_features)))
            if part is None:
                return functional.linear(x, self._whole("weight"), bias)
            pieces.append(functional.linear(x, part))
        out = torch.cat(pieces, dim=-1)
        return out if bias is None else out + bias

    def _whole(self, key: str) -> torch.Tensor:
        value = self.weights.whole(f"{self.name}.{key}")
        return self.module._parameters[key] if value is None else value  # type: ignore[return-value]
