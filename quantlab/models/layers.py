"""Which layers a model has, told from its skeleton: those that can be quantized, and those that never are, with the
reason. No weight is read.

Names are those in the model's files. A layer is a matrix that is multiplied with what arrives: ``nn.Linear``, and
GPT-2's ``Conv1D``, which keeps the same matrix transposed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn

from quantlab.models.safetensors.files import has_experts, quantizable

# What is peculiar about a layer, in so far as some reader minds; which formats do is said in ``registry.formats``.
Trait = Literal["transposed", "subclass", "numbered", "read by its block", "read by itself", "read when run"]


@dataclass(frozen=True)
class Layers:
    """The layers of a model by their names in its files.

    architecture: the class of the model. prefix: of the list of decoder blocks. blocks: how many.
    shapes: (outputs, inputs) of the layers that can be quantized, all inside the blocks, in their order.
    kept: what else is in the blocks and stays in 16 bits, and why. plain: layers that are never quantized (the head,
    routers). experts: layers in ``shapes`` that belong to experts.
    merged: transformers merges the experts into one parameter while it loads them. held_in: of experts that the files
    hold as one tensor, which tensors hold a layer: its weight, then its bias. whole: modules whose experts stay one
    parameter. apart: the quantization methods for which transformers takes experts apart all the same.
    computed: transformers computes other tensors too from those in the files.
    carried: tensors of what surrounds the language model in one that sees, which stay as they are, byte for byte.
    exact: parts of the names of tensors that keep their type. traits: of those layers in ``shapes`` that have any.
    """

    architecture: str
    prefix: str
    blocks: int
    shapes: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]
    plain: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    merged: bool = False
    held_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    computed: bool = False
    carried: frozenset[str] = frozenset()
    exact: tuple[str, ...] = ()
    traits: Mapping[str, frozenset[Trait]] = field(default_factory=dict)

    def weights(self, names: Iterable[str]) -> int:
        """How many weights these layers have together."""
        return sum(math.prod(self.shapes[name]) for name in names)

    @property
    def stacked(self) -> bool:
        """Whether the files hold all experts of a layer as one tensor."""
        return bool(self.held_in)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a ``Conv1D``, whose weight is [inputs, outputs]."""
    return "Conv1D" in {kind.__name__ for kind in type(module).__mro__}


def is_layer(module: nn.Module) -> bool:
    """Whether it multiplies what arrives by a matrix."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as [outputs, inputs]; a view."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if is_transposed(module) else weight


def as_weight(module: nn.Module, found: torch.Tensor) -> torch.Tensor:
    """What a layer has for weight, of a matrix [outputs, inputs]: the inverse of :func:`matrix`."""
    return found.t().contiguous() if is_transposed(module) else found


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The layers inside a block that can be quantized, by their name in it: not its routers."""
    every = dict(block.named_modules())
    routed = has_experts(every)
    found = {name: module for name, module in every.items() if is_layer(module)}
    return {name: module for name, module in found.items() if quantizable(name, routed)}


def traits(model: Any) -> dict[str, set[Trait]]:
    """The traits of a skeleton's layers, by name; layers without are left out.

    transformers runs a model's own initialisation on what it loads, and some look at the weight of a layer there: of a
    packed one there is none. So it is run here on layers without a weight, to see which are missed.
    """
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    found: dict[str, set[Trait]] = {}
    for name, module in layers.items():
        if is_transposed(module):
            found.setdefault(name, set()).add("transposed")
        elif type(module) is not nn.Linear:
            found.setdefault(name, set()).add("subclass")
        parent, _, leaf = name.rpartition(".")
        if leaf.isdecimal():
            found.setdefault(name, set()).add("numbered")
        owner: Any = type(model.get_submodule(parent))
        if f"self.{leaf}.weight" in source_of(owner):
            found.setdefault(name, set()).add("read when run")
    names = {id(module): name for name, module in layers.items()}
    with _missing(layers) as missed, torch.no_grad():
        for run, module in _initialisations(model, model):
            for name in missed(run):
                alone = names.get(id(module)) == name
                found.setdefault(name, set()).add("read by itself" if alone else "read by its block")
    return found


@cache
def source_of(kind: Any) -> str:
    """The source of a class's methods but for its construction; empty where there is none to be had."""
    methods = [m for name, m in vars(kind).items() if inspect.isfunction(m) and name != "__init__"]
    try:
        return "\n".join(inspect.getsource(inspect.unwrap(method)) for method in methods)
    except (OSError, TypeError):
        return ""


def _initialisations(module: nn.Module, model: Any) -> Iterator[tuple[Callable[[], object], nn.Module]]:
    """The initialisation of a module and of all inside it, each by the model class that it is in; left out where that
    class has none of its own."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else model
    if type(owner)._init_weights is not PreTrainedModel._init_weights:
        yield partial(owner._init_weights, module), module
    for child in module.children():
        yield from _initialisations(child, owner)


@contextmanager
def _missing(layers: Mapping[str, nn.Module]) -> Iterator[Callable[[Callable[[], object]], list[str]]]:
    """Inside, layers have no ``weight``. What is given is a function that runs another one and names the layers without
    whose weight that fails."""
    kinds = {name: type(module) for name, module in layers.items()}
    there: set[str] = set()
    last: list[str] = []

    def without(kind: type[nn.Module], name: str) -> type[nn.Module]:
        def look(self: nn.Module, key: str) -> Any:
            if key == "weight" and name not in there:
                last[:] = [name]
                raise AttributeError(key)
            return nn.Module.__getattr__(self, key)

        return type(kind.__name__, (kind,), {"__getattr__": look})

    def missed(run: Callable[[], object]) -> list[str]:
        found: list[str] = []
        there.clear()
        while True:
            last.clear()
            try:
                run()
            except Exception:  # what else a class may stumble over on tensors without data is its own affair
                if not last or last[0] in found:
                    return found
                found += last
                there.update(last)
                continue
            return found

    for name, module in layers.items():
        module.__class__ = without(kinds[name], name)
    try:
        yield missed
    finally:
        for name, module in layers.items():
            module.__class__ = kinds[name]
