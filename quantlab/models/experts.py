"""Mixture-of-experts layers as the quantizer needs them: each expert's matrices as linears of their own.

transformers 5 keeps all experts of a layer in two parameters, ``gate_up_proj`` [experts, 2 * width, hidden] and
``down_proj`` [experts, hidden, width], and merges them on loading from files in which every expert has its own
matrices (``experts.3.w1.weight``). Quantization needs the latter: a second moment for every expert from the tokens
routed to it, and checkpoints that are named as the originals are, which is what vLLM and gptqmodel read. So the
merged module is replaced in the skeleton by a list of experts whose linears carry the names on disk; the router and
whatever surrounds the experts stay.

That both compute the same is tried, not assumed: a miniature of the merged module (its own class, two small experts)
and of the replacement must agree on random tokens, or the architecture is refused. Not covered: experts with biases,
interleaved or transposed matrices (gpt-oss); experts that are one tensor on disk as well (Granite, Llama 4) are
refused from the file headers (``files.refuse_unfit``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError

# what transformers says of experts that differ
UNUSUAL = (
    "has_bias",
    "is_transposed",
    "has_post_expert_norm",
)
MINIATURE = 8  # hidden size and width of the experts that are tried


class Expert(nn.Module):
    """One gated (or plain) perceptron of two layers. ``roles`` names its linears: gate, up, down, or up, down."""

    def __init__(self, roles: tuple[str, ...], hidden: int, width: int, act: Any, **placed: Any) -> None:
        super().__init__()
        self.roles, self.act_fn = roles, act
        for role in roles[:-1]:
            self.add_module(role, nn.Linear(hidden, width, bias=False, **placed))
        self.add_module(roles[-1], nn.Linear(width, hidden, bias=False, **placed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *inner, down = (self.get_submodule(role) for role in self.roles)
        hidden = self.act_fn(inner[0](x))
        if len(inner) == 2:
            hidden = hidden * inner[1](x)
        found: torch.Tensor = down(hidden)
        return found


class Experts(nn.ModuleList):
    """Experts as a list. Called as the merged module is.

    Every expert is run, also one that no token chose: on no rows, so that whoever watches its linears sees them."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, chosen]. Returns [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, slot = torch.where(top_k_index == number)
            part = expert(hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def merged(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of merged experts in ``model``, by name: those with a three-dimensional ``down_proj``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(p := module._parameters.get("down_proj"), nn.Parameter) and p.dim() == 3
    }


def separate(model: nn.Module, converters: Iterable[Any], *, tried: bool = False) -> int:
    """Replace every module of merged experts in ``model`` by :class:`Experts`; returns how many there were.

    Args:
        model: any device; the new linears are on the old parameters' device, uninitialised.
        converters: transformers' conversions for this model's files, which say what the linears are called there.
        tried: a model of this class was taken apart before.

    Raises:
        DataError: the experts compute something else than a gated perceptron each.
    """
    found = merged(model)
    known: set[type] = set()
    for name, module in found.items():
        roles = _roles(name, module, list(converters))
        if not tried and type(module) not in known:
            _try(module, roles, type(model).__name__)
            known.add(type(module))
        down: torch.Tensor = module._parameters["down_proj"]  # type: ignore[assignment]
        count, hidden, width = down.shape
        parent, _, leaf = name.rpartition(".")
        placed = {"device": down.device, "dtype": down.dtype}
        experts = Experts(Expert(roles, hidden, width, module.act_fn, **placed) for _ in range(count))
        setattr(model.get_submodule(parent), leaf, experts.train(module.training))
    return len(found)


def _roles(name: str, module: nn.Module, converters: list[Any]) -> tuple[str, ...]:
    """What the linears of an expert are called on disk: gate and up in the order they are merged in, then down."""

    def sources(parameter: str) -> list[str]:
        target = f"{name}.{parameter}"
        for converter in converters:
            if any(target.endswith(p.lstrip("^").rstrip("$")) for p in converter.target_patterns):
                found = [re.search(r"\*\.(\w+)\.weight$", s) for s in converter.source_patterns]
                return [m.group(1) for m in found if m]
        return []

    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    plain = ["gate_proj", "up_proj"] if first == "gate_up_proj" else ["up_proj"]
    return tuple((sources(first) or plain) + (sources("down_proj") or ["down_proj"]))


def _try(module: nn.Module, roles: tuple[str, ...], architecture: str) -> None:
    """Compare a miniature of ``module`` with its replacement."""
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    known = {first, "down_proj"}
    refusal = DataError(
        f"{architecture}: its experts ({type(module).__name__}) are not gated perceptrons without biases",
        hint="only such experts can be quantized one by one",
    )
    if set(module._parameters) != known or any(getattr(module, flag, False) for flag in UNUSUAL):
        raise refusal
    if len(roles) != (3 if first == "gate_up_proj" else 2):
        raise refusal
    size = MINIATURE
    seeded = torch.Generator().manual_seed(0)
    inner = torch.randn(2, (len(roles) - 1) * size, size, generator=seeded)
    down = torch.randn(2, size, size, generator=seeded)
    small = copy.copy(module)
    small.__dict__ = dict(module.__dict__) | {"num_experts": 2, "hidden_dim": size, "intermediate_dim": size}
    small._parameters = {first: nn.Parameter(inner), "down_proj": nn.Parameter(down)}
    experts = Experts(Expert(roles, size, size, module.act_fn) for _ in range(2))
    for number, expert in enumerate(experts):
        for role, part in zip(roles, [*inner[number].split(size), down[number]], strict=True):
            expert.get_submodule(role)._parameters["weight"] = nn.Parameter(part)
    tokens = torch.randn(5, size, generator=seeded) * 4  # wide enough to meet limits on what is let through
    chosen = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    weights = torch.rand(5, 2, generator=seeded)
    with torch.no_grad():
        try:
            expected = small(tokens, chosen, weights)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise refusal from error
        if expected.shape != tokens.shape or not torch.allclose(
            experts(tokens, chosen, weights), expected, rtol=1e-4, atol=1e-4
        ):
            raise refusal
