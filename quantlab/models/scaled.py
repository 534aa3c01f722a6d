"""Scales behind an activation, which the awq layout has for some architectures.

AutoAWQ moves the scale of a perceptron's second linear into a division after its activation where no linear lies
between (GPT-NeoX, Falcon, BLOOM and others). Readers of the layout put that division in for these architectures
whether it is used or not, and transformers fills it with whatever the memory held if the checkpoint has no
``act.scales``: the outputs are NaN. A checkpoint in the awq layout therefore carries them, all 1 where nothing was
moved.
"""

from __future__ import annotations

from torch import nn


def scaled_activations(block: nn.Module, model_type: str) -> dict[str, int]:
    """The tensors that an awq checkpoint needs beside the linears of ``block``: name in the block, number of channels.

    ``model_type`` is the configuration's; empty for all but a few architectures.
    """
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    names = AWQ_SCALES_MAPPINGS.get(model_type)
    if names is None:
        return {}
    found = {}
    for name, module in block.named_modules():
        before = getattr(module, names["layer_before_act"], None)
        if names["act"] in module._modules and isinstance(before, nn.Linear):
            found[f"{name}.{names['act']}.scales".removeprefix(".")] = before.out_features
    return found
