"""Weights that make up for what the blocks before have lost.

A layer of a model whose earlier layers were quantized gets inputs ``x'`` in place of the original's ``x``. Rounding
``W`` so that ``Q x'`` is close to ``W x'``, or ``Q x`` to ``W x``, lets the difference ``W (x - x')`` through, and over
thirty blocks such differences add up. Here the layer aims at the original's output on the inputs that it will get::

    min over W'  of  sum |W' x' - W x|^2 + l |W' - W|^2   =>   W' = W + W C (H' + l I)^-1,
    C = sum (x - x') x'^T,   H' = sum x' x'^T,   l = damp * mean(diag H')

and ``W'`` is what is rounded. For any Q, ``sum |Q x' - W x|^2`` and ``sum |(Q - W') x'|^2`` differ by a constant (for
``l = 0``), so this is the asymmetric objective of GPTAQ (Li et al. 2025, arXiv:2504.02692), whose recursion carries the
difference along the columns, solved in one step; any method can then round ``W'``.

It must go stage by stage: layers of one input after the other, each on what the quantized layers before it give. All
layers of a block at once would each make up for the same difference: measured on a model of 30 blocks, that multiplies
the KL divergence by eight, where stage by stage halves it.

The pairs come from some of the calibration rows only, since every recipe needs passes of its own over these: a quarter,
but enough tokens for the widest layer. Damping holds what few tokens say. On SmolLM2-135M (4 bits, groups of 64, 32
rows of 512 tokens of WikiText-2; KL divergence on other WikiText-2, and on Korean prose):

    without pairs                   0.199  0.658
    pairs of 8 rows,  damp 0.01     0.168  0.838    damp 0.1   0.127  0.761
    pairs of 32 rows, damp 0.01     0.102  0.654    damp 0.1   0.105  0.579

Not covered: experts. Their tokens are routed anew in the quantized model, so that there are no pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from quantlab.quant.hessian import CHUNK, InputHessian, StopForward, mirror, rank_k_update

DAMP = 0.1  # of the mean diagonal, that keeps what the pairs say little about as it was
SHARE = 4  # one row of so many is looked at for pairs,
TOKENS_AN_INPUT = 8  # and at least so many tokens for every input of the widest layer
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a layer of a block gets only the tokens that a router sends there."""
    return EXPERT.search(name) is not None


def rows_paired(rows: int, tokens: int, inputs: int) -> int:
    """Of so many calibration ``rows`` of so many ``tokens``, how many are looked at in a model whose widest layer has
    so many ``inputs``."""
    return min(rows, max(-(-rows // SHARE), -(-TOKENS_AN_INPUT * inputs // tokens)))


def widest(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Inputs of the widest layer that pairs are looked at for; ``shapes`` [out, in] by name."""
    return max((columns for name, (_, columns) in shapes.items() if not is_expert(name)), default=0)


def stages(moments: Sequence[InputHessian]) -> list[list[InputHessian]]:
    """A block's inputs in the order in which they are reached, those that can be had from one forward pass together:
    each by itself, and experts of one kind (all first linears, all second ones) at once."""
    found: dict[str, list[InputHessian]] = {}
    for one in moments:
        first = one.layers[0]
        found.setdefault(re.sub(r"\.\d+(?=\.)", ".*", "." + first) if is_expert(first) else first, []).append(
            one
        )
    return list(found.values())


@dataclass
class Drift:
    """Second moments of pairs of inputs of one layer, float32 [in, in]: ``own`` of what it gets after quantized layers
    (lower half), ``cross`` of what the original's input has more. Sums, in any order of tokens."""

    own: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> Drift:
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, original: torch.Tensor, own: torch.Tensor) -> None:
        """Account for inputs of the same tokens, both [..., in]."""
        width = own.shape[-1]
        pairs = zip(
            original.reshape(-1, width).split(CHUNK), own.reshape(-1, width).split(CHUNK), strict=True
        )
        for before, now in pairs:  # [tokens, in]
            x = now.to(torch.float32)
            rank_k_update(self.own, x)
            self.cross.addmm_((before.to(torch.float32) - x).t(), x)

    def target(self, weight: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
        """What is to be rounded in place of ``weight`` [out, in]: float32 [out, in], ``weight`` itself where no token
        came or the moments say nothing (they hold infinities, or are indefinite however much they are damped)."""
        plain = weight.to(torch.float32)
        own = self.own.clone()
        mirror(own)
        diagonal = torch.diagonal(own)
        mean = float(diagonal.mean())
        if not 0 < mean < float("inf"):
            return plain
        for _ in range(12):
            factor, failed = torch.linalg.cholesky_ex(
                own + damp * mean * torch.eye(len(own), device=own.device)
            )
            if not failed:
                moved = torch.cholesky_solve((plain @ self.cross).t(), factor).t()
                return plain + moved if bool(torch.isfinite(moved).all()) else plain
            damp *= 2
        return plain


class Inputs(Protocol):
    """What linears of the original block get, by linear, for some rows of a walk: [rows * tokens, in], or without an
    entry where it is not known."""

    def of(self, layers: Mapping[str, nn.Module], part: slice) -> Mapping[str, torch.Tensor]: ...


@dataclass
class KeptInputs:
    """Inputs of the first ``rows`` rows, of ``tokens`` tokens each, kept as they passed. What has another number of
    tokens is not kept."""

    rows: int
    tokens: int
    held: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # of each batch [rows, tokens, in]

    def keep(self, seen: Mapping[str, torch.Tensor], part: slice) -> None:
        """Keep what linears got for the rows ``part``, those after the ones that were kept before."""
        wanted, count = self.rows - part.start, part.stop - part.start
        for name, x in seen.items() if wanted > 0 else ():
            if not is_expert(name) and x.numel() == count * self.tokens * x.shape[-1]:
                rows = x.detach().reshape(count, self.tokens, -1)[:wanted]
                self.held.setdefault(name, []).append(
                    rows.clone()
                )  # where no norm precedes, x is the hidden states

    def of(self, layers: Mapping[str, nn.Module], part: slice) -> dict[str, torch.Tensor]:
        found = {}
        for name in layers:
            if name in self.held:
                if len(self.held[name]) > 1:
                    self.held[name] = [torch.cat(self.held[name])]
                found[name] = self.held[name][0][part].flatten(0, 1)
        return found


def inputs_of(run: Callable[[], object], layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What ``layers`` get, each when it is first called, [tokens, in], while ``run`` runs their block: as far as it
    takes to know them all."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def seen(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            found.setdefault(name, arguments[0].detach().flatten(0, -2))
            if len(found) == len(layers):
                raise StopForward

        return seen

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with suppress(StopForward):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found
