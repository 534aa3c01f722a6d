"""What a method sees of a decoder block, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantlab.quant.grid import Quantized
from quantlab.quant.statistics import Moments


@dataclass(frozen=True)
class BlockView:
    """One decoder block. Names are relative to the block (``self_attn.q_proj``).

    weights: the linear layers, float32 [out, in].
    moments: one entry a distinct input, empty without calibration.
    norms: by the first layer of an entry of ``moments``: the normalisation whose output that input is.
    biases: those of linears and norms, by module name.
    head_dim: width of an attention head, 0 if unknown.
    """

    weights: Mapping[str, torch.Tensor]
    moments: Sequence[Moments] = ()
    norms: Mapping[str, NormInput] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    head_dim: int = 0

    def stacked(self) -> list[tuple[list[str], torch.Tensor, Moments]]:
        """Layers of equal input as one matrix [sum of out, in]: rows are solved independently of each other."""
        return [(m.layers, torch.cat([self.weights[n] for n in m.layers]), m) for m in self.moments]


@dataclass(frozen=True)
class NormInput:
    """A normalisation as the producer of a linear's input. ``weight`` keeps its stored dtype."""

    name: str
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
    """Undo :meth:`BlockView.stacked`: cut a result along its rows."""
    parts = zip(
        quantized.codes.split(list(sizes)),
        quantized.scales.split(list(sizes)),
        quantized.zeros.split(list(sizes)),
        strict=True,
    )
    return [Quantized(codes, scales, zeros, quantized.group_of) for codes, scales, zeros in parts]
