"""What the error of each layer costs the model: measured on the error itself, with the weights that were written.

With ``e_t = x_t (Q - W)^T`` the error of a layer's output at token t and ``g_t`` the gradient that :mod:`sensitivity`
takes backward through the model anyway, the layer alone shifts the predictions by

    1/2 mean over tokens of (g_t . e_t)^2      nats a token.

``sensitivity * loss`` says the same where errors have no direction and are spread evenly over tokens. In real models
they are not. On SmolLM2-135M at 4 bits (round-to-nearest, groups of 64, 0.53 nats a token measured), these costs add up
to 0.46 over all layers, the products of sensitivity and loss to 6.2, of which one layer has 92 %; telling tokens apart,
without the direction, gives 0.76.

Cost: one product with each layer's error on the probe's tokens, for each recipe. Memory: inputs and gradients of one
block's layers on these tokens.

Not covered: errors of several tokens that act together (attention averages those of values, so that they cost more than
is said here), or of several layers; methods that move scales between layers,
whose weights cannot be compared with the original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlab.models.layers import is_transposed, linears


@dataclass
class Seen:
    """Inputs and gradients of the layers of a block, as backward passes meet them: by layer, of each row its inputs
    x [..., in] and, for each of the ``draws`` of labels, the gradients g [..., out]."""

    draws: int
    held: dict[str, list[tuple[torch.Tensor, list[torch.Tensor]]]] = field(default_factory=dict)

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take gradients; those of one row, told by ``x``, come one after the other."""
        rows = self.held.setdefault(name, [])
        if not rows or rows[-1][0] is not x:
            rows.append((x, []))
        rows[-1][1].append(gradient.detach())

    def costs(
        self, block: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], tokens: int
    ) -> dict[str, float]:
        """Nats a token that each layer's error costs, by its name in the block.

        Args:
            weights: (layer, weight as the block holds it) of those that were quantized; looked at one by one.
            tokens: of the probe, all rows together. A layer that some of them do not reach has no error there.
        """
        layers, found = linears(block), dict[str, float]()
        for name, weight in weights:
            original = layers[name].weight
            assert isinstance(original, torch.Tensor)
            error = weight.to(original.device, torch.float32) - original.detach().to(torch.float32)
            if not is_transposed(layers[name]):
                error = error.t()  # [in, out]
            total = 0.0
            for x, gradients in self.held.get(name, ()):
                wrong = x.detach().to(torch.float32) @ error  # [..., out]
                for gradient in gradients:
                    shift = (wrong * gradient.to(torch.float32)).sum(dim=-1)
                    total += shift.square().sum().item()
            found[name] = total / (2 * tokens * self.draws)
        return found


def without_correction(cost: float, facts: Mapping[str, float], loss: float) -> float:
    """The part of a cost that is due to rounding, of a layer that was moved on purpose before it was rounded, to make
    up for what comes before it (``drift``). ``facts["error"]`` is the loss against the layer as it was, ``loss`` that
    against the layer as it was moved: where they differ, the cost is divided in their proportion."""
    error = facts.get("error")
    return cost if not error else cost * min(1.0, loss / error)
