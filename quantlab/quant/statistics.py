"""Second moments of every distinct linear input in a block: what GPTQ, AWQ and every bit width are solved from.

For an input ``x [in]`` seen at n tokens: ``H = sum x^T x / n`` [in, in] and the mean absolute activation
``sum |x| / n`` [in]. Layers that are handed the very same tensor (q, k and v; gate and up) share one entry; which ones
do is observed, not assumed. Sums are kept in float32: each batch of tokens is summed by one matrix product, whose
blocked summation keeps the relative error near 1e-6, far below the 1 % damping that GPTQ adds to H anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Moments:
    """Statistics of one input. ``layers`` are the linears that share it; ``tokens`` how many were seen."""

    layers: list[str]
    hessian: torch.Tensor  # float32 [in, in]
    magnitude: torch.Tensor  # float32 [in]
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Account for inputs ``x`` [..., in]."""
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)  # [tokens, in]
        self.hessian.addmm_(flat.t(), flat)
        self.magnitude += flat.abs().sum(dim=0)
        self.tokens += flat.shape[0]

    def finish(self) -> Moments:
        """Turn sums into means, once."""
        if self.tokens:
            self.hessian /= self.tokens
            self.magnitude /= self.tokens
        return self


class Collector:
    """Hooks on the linears of a block that gather :class:`Moments` while it runs. Use as a context manager."""

    def __init__(self, layers: Mapping[str, nn.Linear], norms: Mapping[str, nn.Module] | None = None) -> None:
        self.layers = layers
        self.norms = norms or {}
        self.norm_of: dict[str, str] = {}  # first layer of a group: the norm whose output its input is
        self.moments: dict[str, Moments] = {}  # by the first layer of each group
        self.leader: dict[str, str] = {}
        self._current: dict[int, tuple[torch.Tensor, str]] = {}
        self._normed: dict[int, tuple[torch.Tensor, str]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(name)))
        for name, norm in self.norms.items():
            self._handles.append(norm.register_forward_hook(self._norm_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.next_batch()

    def next_batch(self) -> None:
        """Forget which tensors the last batch shared; call after every forward."""
        self._current.clear()
        self._normed.clear()

    def _norm_hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def seen(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._normed[id(output)] = (output, name)

        return seen

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            known = self._current.get(id(x))  # the tensor is kept alive with its id, so ids cannot be reused
            if known is not None:
                leader = known[1]
                if self.leader.setdefault(name, leader) == leader:
                    if name not in self.moments[leader].layers:
                        self.moments[leader].layers.append(name)
                    return
            self._current[id(x)] = (x, name)
            self.leader.setdefault(name, name)
            if id(x) in self._normed:
                self.norm_of[name] = self._normed[id(x)][1]
            if name not in self.moments:
                size = x.shape[-1]
                self.moments[name] = Moments(
                    [name], torch.zeros(size, size, device=x.device), torch.zeros(size, device=x.device)
                )
            self.moments[name].add(x)

        return seen

    def finish(self) -> list[Moments]:
        """The gathered statistics, one entry a distinct input."""
        return [m.finish() for m in self.moments.values()]
