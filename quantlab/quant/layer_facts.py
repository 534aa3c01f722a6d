"""What a layer's inputs and outputs are like, told from the Hessian that it is solved from: no pass of its own.

* ``output``: mean squared output a token, ``tr(W H W^T)`` = ``mean |x W^T|^2``. A layer's loss divided by it is the
  relative error of its output.
* ``outliers``: input channels whose root mean square is more than :data:`OUTLIER` times the median channel's. They
  widen what errors in a few columns of the weight do; LLM.int8 (Dettmers et al., NeurIPS 2022, arXiv:2208.07339) found
  them in every large model, and takes 6 standard deviations for its limit.

One product ``W H`` a layer: about what the solver itself does, a few percent of the calibration pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlab.quant.grid import layer_loss
from quantlab.quant.hessian import InputHessian

OUTLIER = 6.0  # times the median channel's root mean square
LISTED = 4  # outlier channels that are named, the largest first


def layer_facts(
    weights: Mapping[str, torch.Tensor], moments: Sequence[InputHessian]
) -> dict[str, dict[str, Any]]:
    """By layer: ``output``, ``outliers`` (how many channels), ``largest`` ([channel, times the median] of the largest
    of them). Layers that no token reached are left out.

    Args:
        weights: [out, in] by layer. moments: finished; not changed.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in moments:
        if not one.tokens:
            continue
        count, largest = outliers(one.diagonal)
        for name in one.layers:
            if name in weights:
                weight = weights[name].detach().to(torch.float32)
                power = layer_loss(weight, torch.zeros_like(weight), one.hessian).item()
                found[name] = {"output": power, "outliers": count, "largest": largest}
    return found


def outliers(power: torch.Tensor) -> tuple[int, list[list[float]]]:
    """How many channels stand out, and [channel, times the median] of the largest. ``power`` [in]: their mean
    squares; channels that never fired do not count for the median."""
    size = power.clamp(min=0).sqrt()
    live = size[size > 0]
    if not len(live):
        return 0, []
    times = size / live.median()
    count = int((times > OUTLIER).sum())
    values, channels = times.topk(min(count, LISTED))
    return count, [[int(c), round(float(v), 2)] for v, c in zip(values, channels, strict=True)]
