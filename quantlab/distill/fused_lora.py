"""LoRA layers that are computed as one product while they are trained on a CPU.

peft computes x Wᵀ + s (x Aᵀ) Bᵀ as it is written (Hu et al. 2021, arXiv:2106.09685): six thin products and as many
conversions and sums of whole activations beside the two large products of forward and backward. Here s B A is added to
W first, M = W + s B A, which costs out · in · r for all T tokens together, and then

    y = x Mᵀ,  dx = dy M,  dA = (s dy B)ᵀ x,  dB = s dyᵀ (x Aᵀ).

These are the same numbers up to rounding: in bfloat16 M is rounded as W is. It is less arithmetic where
2 · in · out < T · (in + out), which is asked of every batch; where it is not, peft's way is taken. So it is for small
models and long batches. Not covered, and left to peft: dropout on the adapter's input, DoRA, quantized bases, several
adapters at once, biases of adapters, and CUDA, whose speed does not hang on the number of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def one_product(model: nn.Module) -> Iterator[int]:
    """Compute every layer that allows it in one product, until the end of the block; gives their number."""
    changed = [module for module in model.modules() if _fits(module)]
    for layer in changed:
        layer.forward = _forward(layer, layer.forward)
    try:
        yield len(changed)
    finally:
        for layer in changed:
            del layer.forward  # the class's own shows again


def _fits(layer: Any) -> bool:
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return False
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or len(layer.lora_A) != 1:
        return False
    (name,) = layer.lora_A
    dropout = layer.lora_dropout[name] if name in layer.lora_dropout else nn.Identity()
    return (
        layer.base_layer.weight.device.type == "cpu"
        and not layer.base_layer.weight.requires_grad
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0)
        and layer.lora_B[name].bias is None
        and not layer.fan_in_fan_out
        and name not in layer.lora_variant
    )


def _forward(layer: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    (name,) = layer.lora_A
    inputs, outputs = layer.in_features, layer.out_features

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = x.numel() // inputs
        usual = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if (
            not usual
            or layer.active_adapters != [name]
            or tokens * (inputs + outputs) <= 2 * inputs * outputs
        ):
            return plain(x, *args, **kwargs)
        base = layer.base_layer
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else base.weight.dtype
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.autocast("cpu", enabled=False):
            y: Tensor = _OneProduct.apply(x, base.weight.to(low), down, up, layer.scaling[name])  # type: ignore[no-untyped-call]
            return y if base.bias is None else y + base.bias.to(low)

    return forward


class _OneProduct(torch.autograd.Function):
    """x [..., in], W [out, in], A [r, in], B [out, r] → [..., out] in the type of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # [T, in]
        ctx.save_for_backward(flat, weight, down, up)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return (flat @ _sum(weight, down, up, scale).t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, weight, down, up = ctx.saved_tensors
        low = weight.dtype
        dy = gradient.reshape(-1, gradient.shape[-1]).to(low)  # [T, out]
        dx = None
        if ctx.needs_input_grad[0]:
            # M is made again rather than kept: it costs little, and a second copy of the model would not
            whole = dy @ _sum(weight, down, up, ctx.scale)
            dx = whole.view(ctx.shape).to(ctx.dtype)
        thin = dy @ (up * ctx.scale).to(low)  # [T, r]
        d_down = thin.t() @ flat
        d_up = (flat @ down.t().to(low)).t() @ dy  # [r, out]: the faster of the two orders
        return dx, None, d_down.to(down.dtype), d_up.t().to(up.dtype) * ctx.scale, None


def _sum(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, (up * scale).to(weight.dtype), down.to(weight.dtype))
