"""What a method sees of a decoder block, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quantlab.formats.gguf.pack import Blocks
from quantlab.models.scale_folding import ScaleFolds
from quantlab.quant.grid import Quantized
from quantlab.quant.hessian import InputHessian

NOTHING = ScaleFolds()


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
    forward: the block itself and its inputs, for methods that need "inputs".
    """

    stored: Mapping[str, torch.Tensor]
    moments: Sequence[InputHessian] = ()
    structure: ScaleFolds = NOTHING
    norms: Mapping[str, NormInput] = field(default_factory=dict)
    plain: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache: dict[Any, Any] | None = field(default=None, repr=False)
    forward: BlockForward | None = field(default=None, repr=False)

    def inputs(self) -> Iterator[torch.Tensor]:
        """The calibration rows' hidden states before the block, a few rows [rows, seq_len, hidden] at a time."""
        assert self.forward is not None, "the method's entry does not need inputs"
        yield from self.forward.inputs()

    def run(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The block on hidden states [rows, seq_len, hidden], with other weights for some linears, by layer. Gradients
        reach ``weights`` inside ``torch.enable_grad()``."""
        assert self.forward is not None, "the method's entry does not need inputs"
        return self.forward.run(hidden, weights or {})

    def weight(self, name: str) -> torch.Tensor:
        """A layer's weight in float32 [out, in]."""
        return self.stored[name].detach().to(torch.float32)

    def stack(self, layers: Sequence[str]) -> torch.Tensor:
        """Layers of one input as one matrix [sum of out, in], float32: rows are solved independently."""
        return torch.cat([self.stored[n].detach() for n in layers]).to(torch.float32)

    def rows(self, layers: Sequence[str]) -> list[int]:
        """How many rows of :meth:`stack` belong to each layer."""
        return [len(self.stored[n]) for n in layers]


class BlockForward(Protocol):
    """The block as it is called, and what it is called with."""

    def inputs(self) -> Iterator[torch.Tensor]: ...

    def run(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


@dataclass(frozen=True)
class NormInput:
    """A normalisation as the producer of a linear's input. ``weight`` [in] keeps its stored dtype; ``offset`` is 1
    where the norm multiplies by ``1 + weight``."""

    weight: torch.Tensor
    offset: float


@dataclass
class BlockResult:
    """``quantized``: by layer. ``replaced``: other tensors of the block that changed (folded norms), by full name in
    the block; weights of layers as [out, in]. ``loss``: mean squared output error a token, by layer, in the original
    coordinates."""

    quantized: dict[str, Quantized | Blocks] = field(default_factory=dict)
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
