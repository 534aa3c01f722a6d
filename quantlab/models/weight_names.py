"""What a skeleton's tensors are called in the model's files.

Modules and files do not always agree: Mixtral's files say ``block_sparse_moe`` where transformers 5 has ``mlp``,
GPT-NeoX's head is ``embed_out`` on disk and ``lm_head`` in memory, a checkpoint of the bare model lacks the
``model.`` in front, a tied head is in no file. transformers keeps such renamings with its models and applies them
when it loads; here the same renamings are applied to the names alone, once, which gives a table from the skeleton's
names to those on disk.

Tensors that transformers would *compute* from those in the files (split, permuted, merged) are refused: what is
written back must be what was read. The one exception, experts, is undone in the skeleton itself (see ``experts``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from quantlab.errors import DataError


class Names:
    """Both directions between a skeleton's names and those in the files.

    ``stored`` has every tensor of the skeleton that the files hold, by its name in the skeleton. ``packed`` names
    linears (as the files do) that are stored in other tensors than their weight.

    Raises:
        DataError: a parameter is in no file, or only in another shape or order.
    """

    def __init__(
        self, model: nn.Module, tensors: Iterable[str], called: str, packed: Iterable[str] = ()
    ) -> None:
        from transformers.core_model_loading import apply_converters, rename_source_key

        renamings, converters = conversions(model)
        known = dict.fromkeys(model.state_dict(), True)
        base = str(getattr(model, "base_model_prefix", "")) or None
        self.stored: dict[str, str] = {}
        # A packed linear has no weight; that its module is there is all that its name needs.
        for name in [*tensors, *(f"{module}.weight" for module in packed)]:
            inside, _ = rename_source_key(name, renamings, [], base, known)
            if inside not in known and name in known:
                inside = name
            target, computed = apply_converters(inside, converters)
            if computed is not None and target in known:  # experts taken apart are no target any more
                raise DataError(
                    f"{called}: {target} of {type(model).__name__} is computed from {name} in its files",
                    hint="such an architecture cannot be quantized here",
                )
            if inside in known:
                self.stored.setdefault(inside, name)
        self._outward = _owners(self.stored.items())
        self._inward = _owners((b, a) for a, b in self.stored.items())
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for one, other in [*tied.items(), *((b, a) for a, b in tied.items())]:
            if one in known and one not in self.stored and other in self.stored:
                self.stored[one] = self.stored[other]
        missing = [n for n, _ in model.named_parameters() if n not in self.stored]
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


def conversions(model: nn.Module, legacy: bool = True) -> tuple[list[Any], list[Any]]:
    """The renamings and the computed conversions that transformers applies to the files of ``model``, in order;
    ``legacy``: with those of very old files (``gamma``, ``beta``), which it applies to every model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model, add_legacy=legacy)  # type: ignore[arg-type]
    renamings = [c for c in found if isinstance(c, WeightRenaming)]
    return renamings, [c for c in found if isinstance(c, WeightConverter)]


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
