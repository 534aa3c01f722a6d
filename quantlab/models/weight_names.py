"""What a skeleton's tensors are called in the model's files.

Modules and files do not always agree: Mixtral's files say ``block_sparse_moe`` where transformers 5 has ``mlp``,
GPT-NeoX's head is ``embed_out`` on disk and ``lm_head`` in memory, a checkpoint of the bare model lacks the
``model.`` in front, a tied head is in no file. transformers keeps such renamings with its models and applies them
when it loads; here the same renamings are applied to the names alone, once, which gives a table from the skeleton's
names to those on disk.

Tensors that transformers *computes* from those in the files (split, permuted, merged) are computed here by its own
conversions when they are needed, and never quantized: what is written back must be what was read. Experts, which it
merges, are taken apart in the skeleton instead (see ``experts``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError
from quantlab.models.experts import Part


@dataclass(frozen=True)
class Computation:
    """How a tensor of the skeleton comes from others in the files: transformers' conversion, what it calls its result,
    and (pattern, name in the files) of what it starts from."""

    converter: Any
    result: str
    sources: tuple[tuple[str, str], ...]

    def run(self, read: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Everything that the conversion gives, by name in the skeleton. ``read`` gives a tensor of the files."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.result, name, pattern, lambda name=name: read(name))
        found = converter.convert(self.result, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class Names:
    """Both directions between a skeleton's names and those in the files.

    ``stored`` has every tensor of the skeleton that the files hold, by its name in the skeleton. ``packed`` names
    linears (as the files do) that are stored in other tensors than their weight. ``computed`` has what is made of
    several tensors of the files, by its name in the skeleton; ``parts`` what is a part of one of them; ``tensors`` has
    the shapes of those in the files.

    Raises:
        DataError: a parameter is in no file.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, tuple[int, ...]],
        called: str,
        packed: Iterable[str] = (),
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        from transformers.core_model_loading import apply_converters, rename_source_key

        renamings, converters = conversions(model)
        known = dict.fromkeys(model.state_dict(), True)
        base = str(getattr(model, "base_model_prefix", "")) or None
        self.stored: dict[str, str] = {}
        self.parts: Mapping[str, Part] = parts or {}
        sources: dict[str, list[tuple[str, str]]] = {}
        # A packed linear has no weight; that its module is there is all that its name needs.
        for name in [*tensors, *(f"{module}.weight" for module in packed)]:
            inside, _ = rename_source_key(name, renamings, [], base, known)
            if inside not in known and name in known:
                inside = name
            target, pattern = apply_converters(inside, converters)
            if pattern is not None and inside not in known:
                target, _ = rename_source_key(name, renamings, converters, base, known)
                sources.setdefault(target, []).append((pattern, name))
            elif inside in known:
                self.stored.setdefault(inside, name)
        self.computed = _computations(model, converters, sources, tensors, known)
        self._outward = _owners(self.stored.items())
        self._inward = _owners((b, a) for a, b in self.stored.items())
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for one, other in [*tied.items(), *((b, a) for a, b in tied.items())]:
            if one in known and one not in self.stored and other in self.stored:
                self.stored[one] = self.stored[other]
        held = {*self.stored, *self.computed, *self.parts}
        missing = [n for n, _ in model.named_parameters() if n not in held]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise DataError(
                f"{called}: tensor {missing[0]}{more} of {type(model).__name__} is not in its files"
            )

    def on_disk(self, name: str) -> str:
        """The name in files of a tensor or module of the skeleton. Tensors that a module has only once it is packed
        (``qweight``) are called after the module."""
        return _translate(name, self.stored, self._outward)

    def in_model(self, name: str) -> str:
        """The inverse of :meth:`on_disk`."""
        return _translate(name, {}, self._inward)


def _computations(
    model: nn.Module,
    converters: list[Any],
    sources: dict[str, list[tuple[str, str]]],
    tensors: Mapping[str, tuple[int, ...]],
    known: dict[str, bool],
) -> dict[str, Computation]:
    """What each conversion gives that the skeleton has, told by running it on tensors without data."""
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Computation] = {}
    for result, parts in sources.items():
        one = Computation(by_pattern[parts[0][0]], result, tuple(parts))
        try:
            made = one.run(lambda name: torch.empty(tensors[name], device="meta"), model)
        except Exception:  # a conversion that its results do not fit: what is missing is named by the caller
            continue
        found.update({name: one for name in made if name in known})
    return found


def conversions(model: nn.Module, legacy: bool = True) -> tuple[list[Any], list[Any]]:
    """The renamings and the computed conversions that transformers applies to the files of ``model``, in order;
    ``legacy``: with those of very old files (``gamma``, ``beta``), which it applies to every model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model, add_legacy=legacy)  # type: ignore[arg-type]
    renamings = [c for c in found if isinstance(c, WeightRenaming)]
    return renamings, [c for c in found if isinstance(c, WeightConverter)]


def renamed(model: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    """Tensors of a skeleton that the files hold as they are, and what they are called there."""
    from transformers.core_model_loading import apply_converters, rename_source_key

    renamings, converters = conversions(model)
    known = dict.fromkeys(model.state_dict(), True)
    base = str(getattr(model, "base_model_prefix", "")) or None
    found = {name: rename_source_key(name, renamings, [], base, known)[0] for name in tensors}
    return {
        inside: name
        for name, inside in found.items()
        if inside in known and apply_converters(inside, converters)[1] is None
    }


def _owners(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Modules on both sides, and every ancestor whose name differs from its counterpart's only further up."""
    found: dict[str, str] = {}
    for one, other in pairs:
        while one.rpartition(".")[2] == other.rpartition(".")[2] and "." in one:
            one, other = one.rpartition(".")[0], other.rpartition(".")[0]
            if one in found:
                break
            found[one] = other
    return found


def _translate(name: str, exact: dict[str, str], owners: dict[str, str]) -> str:
    if name in exact:
        return exact[name]
    owner, rest = name, ""
    while owner not in owners:
        owner, _, leaf = owner.rpartition(".")
        rest = f".{leaf}{rest}"
        if not owner:
            return name
    return f"{owners[owner]}{rest}"
