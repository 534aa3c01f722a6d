"""What a method sees of a decoder block, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantlab.models.scale_folding import Structure
from quantlab.quant.grid import Quantized
from quantlab.quant.hessian import Moments

NOTHING = Structure()


@dataclass(frozen=True)
class BlockView:
    """One decoder block. Names are relative to the block (``self_attn.q_proj``).

    stored: the weights of the linear layers [out, in] in the dtype they are kept in.
    moments: one entry a distinct input, empty without calibration.
    structure: which scales can be moved where without changing what the block computes.
    norms: the normalisations that ``structure`` names.
    plain: every other parameter of the block, by its full name (``self_attn.q_proj.bias``).
    cache: what one solve leaves for the next on the same block (factorised Hessians), by a key that says it all; None
        where nothing comes after.
    """

    stored: Mapping[str, torch.Tensor]
    moments: Sequence[Moments] = ()
    structure: Structure = NOTHING
    norms: Mapping[str, NormInput] = field(default_factory=dict)
    plain: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache: dict[Any, Any] | None = field(default=None, repr=False)

    def weight(self, name: str) -> torch.Tensor:
        """A layer's weight in float32 [out, in]."""
        return self.stored[name].detach().to(torch.float32)

    def stack(self, moments: Moments) -> torch.Tensor:
        """The layers of one input as one matrix [sum of out, in], float32: rows are solved independently."""
        return torch.cat([self.stored[n].detach() for n in moments.layers]).to(torch.float32)

    def rows(self, moments: Moments) -> list[int]:
        """How many rows of :meth:`stack` belong to each layer."""
        return [len(self.stored[n]) for n in moments.layers]


@dataclass(frozen=True)
class NormInput:
    """A normalisation as the producer of a linear's input. ``weight`` [in] keeps its stored dtype; ``offset`` is 1
    where the norm multiplies by ``1 + weight``."""

    weight: torch.Tensor
    offset: float


@dataclass
class BlockResult:
    """``quantized``: by layer. ``replaced``: other tensors of the block that changed (folded norms), by full name
    in the block. ``loss``: mean squared output error a token, by layer, in the original coordinates."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


def split(quantized: Quantized, sizes: Sequence[int]) -> list[Quantized]:
    """Undo :meth:`BlockView.stack`: cut a result along its rows."""
    parts = zip(
        quantized.codes.split(list(sizes)),
        quantized.scales.split(list(sizes)),
        quantized.zeros.split(list(sizes)),
        strict=True,
    )
    group_of, bits = quantized.group_of, quantized.bits
    return [Quantized(codes, scales, zeros, group_of, bits) for codes, scales, zeros in parts]


def join(parts: Sequence[Quantized]) -> Quantized:
    """The rows of all parts below one another: what :func:`split` cuts."""
    first = parts[0]
    rows = [torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")]
    return Quantized(rows[0], rows[1], rows[2], first.group_of, first.bits)
