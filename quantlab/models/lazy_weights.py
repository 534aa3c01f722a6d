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
    try:
        with_parent = _read_by_parents(model)
        for name, module in model.named_modules():
            full = f"{prefix}.{name}".strip(".")
            own = [key for key, value in module._parameters.items() if value is not None]
            if not own:
                continue
            originals.append((module, dict(module._parameters)))
            if name in with_parent:
                continue
            if type(module) is nn.Embedding or (
                type(module) is nn.Linear and 4 * module.weight.numel() > LARGE
            ):
                module.forward = _Piecewise(module, weights, full)  # type: ignore[assignment]
                if (
                    type(module) is nn.Embedding
                ):  # some models send token ids where its weight is: not to nowhere
                    module._parameters["weight"] = nn.Parameter(torch.empty(0), requires_grad=False)
                undo.append(lambda m=module: m.__dict__.pop("forward", None))
                continue
            undo.append(module.register_forward_pre_hook(_fetch(weights, full, own)).remove)
            undo.append(module.register_forward_hook(_give_back(originals[-1][1]), always_call=True).remove)
        for name, (parent, module) in with_parent.items():
            full, own = (
                f"{prefix}.{name}".strip("."),
                [key for key, p in module._parameters.items() if p is not None],
            )
            fetch, back = _fetch(weights, full, own), _give_back(dict(module._parameters))
            undo.append(
                parent.register_forward_pre_hook(lambda m, args, f=fetch, c=module: f(c, args)).remove
            )
            undo.append(
                parent.register_forward_hook(
                    lambda m, args, out, b=back, c=module: b(c, args, out), always_call=True
                ).remove
            )
        yield
    finally:
        for one in undo:
            one()
        for module, parameters in originals:
            module._parameters.update(parameters)


def _read_by_parents(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Modules whose weight or bias the one around them reads by itself, by name, and that one: theirs must be there
    while it runs."""
    found = {}
    for name, parent in model.named_modules():
        kind: Any = type(parent)
        source = source_of(kind)
        for child, module in parent.named_children():
            if f"self.{child}.weight" in source or f"self.{child}.bias" in source:
                found[f"{name}.{child}".strip(".")] = (parent, module)
    return found


def _fetch(weights: Weights, name: str, own: list[str]) -> Any:
    def before(module: nn.Module, args: Any) -> None:
        for key in own:
            value = weights.whole(f"{name}.{key}")
            if value is not None:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    return before


def _give_back(parameters: dict[str, nn.Parameter | None]) -> Any:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(parameters)

    return after


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
