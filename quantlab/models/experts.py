"""Mixture-of-experts layers as the quantizer needs them: each expert's matrices as linears of their own.

transformers 5 keeps all experts of a layer in two parameters, ``gate_up_proj`` [experts, 2 * width, hidden] and
``down_proj`` [experts, hidden, width]. Some it merges on loading from files in which every expert has its own matrices
(``experts.3.w1.weight``); of others the files hold one tensor as well (gpt-oss, Llama 4, Granite). Quantization needs
them one by one: a second moment for every expert from the tokens routed to it, and checkpoints in which experts have
names of their own, which is what vLLM and gptqmodel read. So the merged module is replaced in the skeleton by a list of
experts whose linears carry the names on disk, or ``gate_proj``, ``up_proj`` and ``down_proj``; the router and whatever
surrounds the experts stay.

Matrices may be kept transposed [experts, in, out], gate and up may be interleaved, there may be biases, and a class may
have a gate of its own: its flags say so (``is_transposed``, ``is_concatenated``, ``has_bias``, ``_apply_gate``). That
both compute the same is tried, not assumed: a miniature of the merged module (its own class, two small experts) and of
the replacement must agree on random tokens, or the experts stay as they are, in 16 bits.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

MINIATURE = 8  # hidden size and width of the experts that are tried


class Part(NamedTuple):
    """Where a linear's tensor lies in one that holds all experts: the parameter in the merged module, the expert's
    number, which outputs, and whether the matrix is kept as [in, out]."""

    parameter: str
    expert: int
    outputs: slice
    transposed: bool

    def of(self, one: torch.Tensor) -> torch.Tensor:
        """The part, from the tensor of its expert: a matrix [outputs, inputs] or a bias [outputs]."""
        return (one.t() if self.transposed and one.dim() == 2 else one)[self.outputs].contiguous()


@dataclass(frozen=True)
class Kind:
    """How a class of merged experts keeps its parameters. ``gate``: a gate of its own, [tokens, 2 width] to
    [tokens, width]; ``sorted``: it is called with the tokens of every expert in turn, without routing."""

    transposed: bool
    concatenated: bool
    biased: bool
    gated: bool
    sorted: bool
    gate: Callable[[torch.Tensor], torch.Tensor] | None

    def parts(self, roles: tuple[str, ...], index: int, width: int) -> dict[str, Part]:
        """The tensors of an expert's linears by their names in it."""
        inner, found = ("gate_up_proj" if self.gated else "up_proj"), {}
        for number, role in enumerate(roles):
            if role == roles[-1]:
                parameter, outputs = "down_proj", slice(None)
            elif not self.gated:
                parameter, outputs = inner, slice(None)
            elif self.concatenated:
                parameter, outputs = inner, slice(number * width, (number + 1) * width)
            else:
                parameter, outputs = inner, slice(number, None, 2)
            found[f"{role}.weight"] = Part(parameter, index, outputs, self.transposed)
            if self.biased:
                found[f"{role}.bias"] = Part(f"{parameter}_bias", index, outputs, False)
        return found


class Expert(nn.Module):
    """One gated (or plain) perceptron of two layers. ``roles`` names its linears: gate, up, down, or up, down."""

    def __init__(
        self,
        roles: tuple[str, ...],
        hidden: int,
        width: int,
        act: Any,
        kind: Kind | None = None,
        **placed: Any,
    ) -> None:
        super().__init__()
        self.roles, self.act_fn, self.kind = roles, act, kind
        biased = kind is not None and kind.biased
        for role in roles[:-1]:
            self.add_module(role, nn.Linear(hidden, width, bias=biased, **placed))
        self.add_module(roles[-1], nn.Linear(width, hidden, bias=biased, **placed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *inner, down = (self.get_submodule(role) for role in self.roles)
        if self.kind is not None and self.kind.gate is not None:
            gate, up = (layer(x) for layer in inner)
            whole = (
                torch.cat([gate, up], -1)
                if self.kind.concatenated
                else torch.stack([gate, up], -1).flatten(-2)
            )
            hidden = self.kind.gate(whole)
        else:
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


class SortedExperts(Experts):
    """Experts that are handed every token once each, all zeros where it was not routed to them (Llama 4)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [experts * tokens, hidden]. Returns the same shape."""
        out = torch.zeros_like(hidden_states)
        tokens = len(hidden_states) // max(len(self), 1)
        for number, expert in enumerate(self):
            part = slice(number * tokens, (number + 1) * tokens)
            mine = hidden_states[part].abs().amax(dim=-1) > 0
            out[part][mine] = expert(hidden_states[part][mine])
        return out


def merged(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of merged experts in ``model``, by name: those with a three-dimensional ``down_proj``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(p := module._parameters.get("down_proj"), nn.Parameter) and p.dim() == 3
    }


def stacks(blocks: nn.Module, prefix: str) -> list[str]:
    """Modules of experts in the blocks, by full name, that hold one matrix each in one parameter: not taken apart."""
    return [
        f"{prefix}.{name}"
        for name, module in blocks.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        and any(p is not None and p.dim() == 3 for p in module._parameters.values())
    ]


def taken_apart(kinds: Iterable[str]) -> frozenset[str]:
    """The quantization methods for which transformers itself takes these classes of merged experts apart."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED

    methods = [PATCHED[kind]["quantization_methods"] for kind in set(kinds) if kind in PATCHED]
    return frozenset(str(method.value) for several in methods for method in several)


def separate(
    model: nn.Module, converters: Iterable[Any], *, tried: bool = False, plain: Collection[str] = ()
) -> dict[str, Part]:
    """Replace modules of merged experts in ``model`` by :class:`Experts`. Those that compute something else than a
    perceptron each stay as they are.

    Args:
        model: any device; the new linears are on the old parameters' device, uninitialised.
        converters: transformers' conversions for this model's files, which say what the linears are called there.
        tried: a model of this class was taken apart before. plain: names of parameters that the files hold as they are.

    Returns:
        Tensors of the new linears that the files hold as parts of ``plain`` ones, by name in ``model``; the parameter
        of a part is by its full name too.
    """
    known: dict[type, Kind | None] = {}
    parts: dict[str, Part] = {}
    for name, module in merged(model).items():
        held = [f"{name}.{parameter}" in plain for parameter in module._parameters]
        stacked = all(held)
        counts = {len(p) for p in module._parameters.values() if p is not None}
        if len(counts) > 1 or (any(held) and not stacked):  # experts of which some lack a part
            continue
        roles = _roles(name, module, [] if stacked else list(converters))
        if type(module) not in known:
            kind = _kind(module)
            known[type(module)] = kind if tried or _alike(module, roles, kind) else None
        found = known[type(module)]
        if found is None:
            continue
        down: torch.Tensor = module._parameters["down_proj"]  # type: ignore[assignment]
        experts_in, hidden, width = (
            down.shape if not found.transposed else (len(down), down.shape[2], down.shape[1])
        )
        parent, _, leaf = name.rpartition(".")
        placed = {"device": down.device, "dtype": down.dtype}
        experts = _list(found, roles, experts_in, hidden, width, getattr(module, "act_fn", None), **placed)
        setattr(model.get_submodule(parent), leaf, experts.train(module.training))
        for index in range(experts_in) if stacked else ():
            for tensor, part in found.parts(roles, index, width).items():
                parts[f"{name}.{index}.{tensor}"] = part._replace(parameter=f"{name}.{part.parameter}")
    return parts


def _list(
    kind: Kind, roles: tuple[str, ...], count: int, hidden: int, width: int, act: Any, **placed: Any
) -> Experts:
    own = kind if kind.biased or kind.gate is not None else None
    every = (Expert(roles, hidden, width, act, own, **placed) for _ in range(count))
    return SortedExperts(every) if kind.sorted else Experts(every)


def _kind(module: nn.Module) -> Kind:
    """What a class says of how it keeps its experts."""
    held, kind = module._parameters, type(module)
    gated = "gate_up_proj" in held
    sorted_ = len(inspect.signature(kind.forward).parameters) == 2
    transposed = bool(getattr(module, "is_transposed", False)) or sorted_
    gate = None
    if "_apply_gate" in vars(kind) and vars(kind)["_apply_gate"].__module__ == kind.__module__:
        light = copy.copy(module)  # its numbers without its parameters
        light._parameters = {}
        gate = light._apply_gate
    return Kind(
        transposed, bool(getattr(module, "is_concatenated", True)), f"{'gate_' if gated else ''}up_proj_bias" in held,
        gated, sorted_, gate,
    )  # fmt: skip


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


def _alike(module: nn.Module, roles: tuple[str, ...], kind: Kind) -> bool:
    """Whether a miniature of ``module`` computes what its replacement does."""
    inner = "gate_up_proj" if kind.gated else "up_proj"
    names = {inner, "down_proj"} | ({f"{inner}_bias", "down_proj_bias"} if kind.biased else set())
    if set(module._parameters) != names or len(roles) != (3 if kind.gated else 2):
        return False
    if kind.gate is None and not hasattr(module, "act_fn"):
        return False
    size = MINIATURE
    seeded = torch.Generator().manual_seed(0)
    wide = (len(roles) - 1) * size
    shapes = {
        inner: (wide, size),
        "down_proj": (size, size),
        f"{inner}_bias": (wide,),
        "down_proj_bias": (size,),
    }
    values = {}
    for name in sorted(names):
        shape = shapes[name][::-1] if kind.transposed else shapes[name]
        values[name] = nn.Parameter(torch.randn(2, *shape, generator=seeded))
    small = copy.copy(module)
    small.__dict__ = dict(module.__dict__) | {"num_experts": 2}
    small.__dict__ |= dict.fromkeys(
        ("hidden_dim", "hidden_size", "intermediate_dim", "intermediate_size", "expert_dim"), size
    )
    small._parameters = dict(values)
    experts = _list(kind, roles, 2, size, size, getattr(module, "act_fn", None))
    for number, expert in enumerate(experts):
        for name, part in kind.parts(roles, number, size).items():
            owner, _, leaf = name.rpartition(".")
            value = part.of(values[part.parameter][number].detach())
            expert.get_submodule(owner)._parameters[leaf] = nn.Parameter(value)
    tokens = torch.randn(10, size, generator=seeded) * 4  # wide enough to meet limits on what is let through
    given: tuple[torch.Tensor, ...] = (tokens,)
    if not kind.sorted:
        chosen = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]] * 2)
        given = (tokens, chosen, torch.rand(10, 2, generator=seeded))
    with torch.no_grad():
        try:
            expected = small(*given)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            return False
        return expected.shape == tokens.shape and torch.allclose(
            experts(*given), expected, rtol=1e-4, atol=1e-4
        )
