"""Which layers of a model a recipe quantizes, at which width and in which groups, and which stay as they are. Told from
the model's skeleton; no weight is read.

A layer stays in 16 bits where the recipe says so (``ignore``), where no packed form of it can be written or read, and
where ``group_size: auto`` finds no size that divides its inputs. A group size that was written is kept to: a layer
that it does not fit is refused, with the sizes that fit.

``group_size: auto`` takes the largest of 128, 64 and 32 that divides the inputs of every layer that one of them
divides. A format that holds a size for each layer gets the largest for each, but one for all experts, which readers
merge and unpack alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import regex

from quantlab.errors import DataError, RecipeError
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, PACKING, common_group_sizes, fitting_widths, misfit
from quantlab.registry.methods import METHODS

if TYPE_CHECKING:
    from quantlab.models.layers import Layers

SUBCLASS = "bitsandbytes passes over subclasses of nn.Linear"
AUTO_SIZES = (128, 64, 32)
AUTO = 0  # a group size that is still to be chosen
IGNORED = "the recipe ignores it"
EXPERTS = r"re:\.experts\.\d+\."  # what is ignored where a recipe names no format and none is read
SECONDS_A_NAME = 1.0  # what a pattern, which may be a stranger's, may take on the name of one layer
UNREAD = "transformers reads such experts packed in no format"


class Width(NamedTuple):
    """How a layer is quantized. ``method`` is empty where it is the recipe's, ``type`` where the format has no block
    types. Of a layer of a block type, ``bits`` and ``group_size`` are those of the type."""

    bits: int
    group_size: int
    method: str = ""
    type: str = ""


class Open(NamedTuple):
    """A matrix whose block type is still to be chosen: from which ``types``, fewest bits first, and its ``shape``."""

    types: tuple[str, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Selection:
    """``widths``: of the layers that are quantized, by name in the files. ``kept``: layers in the blocks that could be
    and are not, and why. In a format of block types, ``outside``: the types of the embedding and the head; ``open``:
    the matrices whose type is still to be chosen, which have the smallest meanwhile."""

    widths: Mapping[str, Width] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    open: Mapping[str, Open] = field(default_factory=dict)
    unread: str = ""  # packed experts that transformers alone does not read: "merged" or "stacked"

    def at(self, bits: int) -> Selection:
        """The same layers, all at ``bits``."""
        return replace(self, widths={name: width._replace(bits=bits) for name, width in self.widths.items()})

    def stored(self) -> dict[str, tuple[int, int]]:
        """Bits and group size of each layer."""
        return {name: (width.bits, width.group_size) for name, width in self.widths.items()}

    def usual_size(self) -> int:
        """The group size that most weights have; a format of one size has no other."""
        sizes = [width.group_size for width in self.widths.values()]
        return max(set(sizes), key=sizes.count)

    def sizes(self) -> list[int]:
        """The group sizes in use, largest first."""
        return sorted({width.group_size for width in self.widths.values()}, reverse=True)


def select(recipe: QuantizeRecipe, layers: Layers, called: str) -> Selection:
    """What ``recipe`` does with each layer. With ``bits: auto`` the width is the widest that the format holds.

    Args:
        called: the model's name, for messages.

    Raises:
        RecipeError: a layer does not fit a group size or width that was written; a name in ``ignore`` or ``overrides``
            is that of no layer; the format cannot say what was asked for; nothing is left to quantize.
    """
    if METHODS[recipe.method].whole:
        return _by_library(recipe, layers, called)
    held = FORMATS[recipe.format]
    if layers.computed and not held.converts:
        raise RecipeError(
            f"{called}: transformers computes tensors of {layers.architecture} from others in the files, and cannot "
            f"where the {recipe.format} format is",
            hint=_other_formats(recipe, layers),
        )
    kept = dict(layers.kept)
    open_layers: dict[str, Width] = {}
    used: set[str] = set()
    for name, (rows, columns) in layers.shapes.items():
        odd = [held.unread[trait] for trait in sorted(layers.traits.get(name, ())) if trait in held.unread]
        if pattern := _first(recipe.ignore, name):
            used.add(pattern)
            kept[name] = UNREAD if pattern == EXPERTS else IGNORED
            continue
        wish = Width(max(recipe.widths), _size(recipe.group_size), "", recipe.type or "")
        if pattern := _first(recipe.overrides, name):
            used.add(pattern)
            wish = _overridden(recipe, pattern)
        if wish.bits == 16:
            kept[name] = IGNORED
        elif odd:
            kept[name] = odd[0]
        elif (reason := _unfit(recipe.format, recipe.bits == "auto", wish, rows, columns)) is None:
            open_layers[name] = wish
        elif wish.group_size > 0 and columns % wish.group_size and not held.types:  # a size that was written
            raise _misfit(called, name, reason, layers)
        else:
            kept[name] = reason
    _refuse_unused(recipe, used, layers, called)
    widths = _with_sizes(open_layers, layers, mixed=held.mixed)
    if held.by_name:
        _leave_out_by_name(widths, kept, recipe, called)
    if not held.mixed:
        _refuse_several(set(widths.values()), recipe, called, "all layers")
    elif layers.merged:
        _refuse_several({widths[n] for n in layers.experts & widths.keys()}, recipe, called, "all experts")
    if not widths:
        reasons = "; ".join(dict.fromkeys(kept.values()))
        raise RecipeError(
            f"{called}: no layer of {layers.architecture} is left to quantize in the {recipe.format} format: {reasons}",
            hint=_other_formats(recipe, layers),
        )
    packed = bool(layers.experts & widths.keys()) and not reads_experts(recipe.format, layers)
    unread = ("stacked" if layers.stacked else "merged") if packed else ""
    return Selection(widths, {n: kept[n] for n in sorted(kept)}, unread=unread)


def _by_library(recipe: QuantizeRecipe, layers: Layers, called: str) -> Selection:
    """What bitsandbytes quantizes of the layers in the blocks: all that are ``nn.Linear`` or ``Conv1D`` themselves.

    Raises:
        DataError: experts that transformers merges, which it would leave in 16 bits.
    """
    if layers.merged or layers.stacked or layers.whole:
        raise DataError(
            f"{called}: {recipe.format} would leave the experts of {layers.architecture} in 16 bits: transformers "
            "merges them into one parameter",
            hint="rtn-int4 and gptq-int4 quantize experts one by one",
        )
    passed_over = [name for name in layers.shapes if "subclass" in layers.traits.get(name, ())]
    kept = dict(layers.kept) | dict.fromkeys(passed_over, SUBCLASS)
    if len(passed_over) == len(layers.shapes):
        raise DataError(f"{called}: no layer of {layers.architecture} is left to quantize: {SUBCLASS}")
    width = Width(int(recipe.bits), int(recipe.group_size))
    return Selection({name: width for name in layers.shapes if name not in kept}, kept)


def summary(chosen: Selection, layers: Layers, params: int) -> list[str]:
    """What a recipe does with a model, in lines for people: how much is quantized, and what stays as it is, why, and
    how often. ``params``: of the whole model."""
    share = layers.weights(chosen.widths) / max(params, 1)
    sizes = ", ".join(f"groups of {size}" if size > 0 else "per channel" for size in chosen.sizes())
    grouped = "" if chosen.open else f" ({sizes})"
    lines = [f"{len(chosen.widths)} layers are quantized{grouped}, {share:.1%} of the parameters"]
    if chosen.open:
        kinds = sorted({kind for one in chosen.open.values() for kind in one.types})
        lines.append(
            f"{len(chosen.open)} matrices get one of {', '.join(kinds)} each, chosen after the calibration pass"
        )
    lines += [
        f"{name} stays in 16 bits ({count}): {why}" for (name, why), count in alike(chosen.kept).items()
    ]
    return lines


def alike(kept: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many layers stay by name, the same in every block, and reason."""
    return Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), why) for name, why in kept.items())


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of ``ignore`` or ``overrides`` means the layer ``name``: its whole name, the end of it after a
    dot, a part of the tree that holds it, or a regular expression (``re:...``) that is found in it."""
    if pattern.startswith("re:"):
        try:
            return regex.search(pattern.removeprefix("re:"), name, timeout=SECONDS_A_NAME) is not None
        except TimeoutError:
            raise RecipeError(
                f"the pattern {pattern!r} takes longer than {SECONDS_A_NAME:g} s on {name}",
                hint="write it without a repetition inside a repetition",
            ) from None
    return name == pattern or name.endswith("." + pattern) or name.startswith(pattern + ".")


def _first(patterns: Iterable[str], name: str) -> str:
    return next((pattern for pattern in patterns if matches(pattern, name)), "")


def _size(written: int | str) -> int:
    return AUTO if written == "auto" else int(written)


def _overridden(recipe: QuantizeRecipe, pattern: str) -> Width:
    change = recipe.overrides[pattern]
    size = recipe.group_size if change.group_size is None else change.group_size
    kind = change.type or recipe.type or ""
    return Width(change.bits or max(recipe.widths), _size(size), change.method or "", kind)


def _unfit(format: str, any_width: bool, wish: Width, rows: int, columns: int) -> str | None:
    """Why a layer cannot be stored as wished, or at ``any_width``, None where it can."""
    size = wish.group_size if wish.group_size != AUTO else _largest(columns)
    if not size:
        return f"its {columns} inputs are not divisible by {AUTO_SIZES[-1]}"
    if any_width and fitting_widths(format, size, columns, rows):
        return None
    return misfit(format, wish.bits, size, columns, rows)


def _largest(columns: int) -> int:
    return next((size for size in AUTO_SIZES if columns % size == 0), 0)


def _misfit(called: str, name: str, reason: str, layers: Layers) -> RecipeError:
    common = common_group_sizes({columns for _, columns in layers.shapes.values()})
    sizes = f"for every layer of this model: group_size {', '.join(map(str, common))}; " if common else ""
    return RecipeError(
        f"{called}: layer {name} does not fit: {reason}",
        hint=f"{sizes}group_size: auto chooses, and leaves what fits none in 16 bits",
    )


def _with_sizes(wishes: Mapping[str, Width], layers: Layers, *, mixed: bool) -> dict[str, Width]:
    """The wishes with a size for every layer that was left to choose one."""
    columns = {name: layers.shapes[name][1] for name, wish in wishes.items() if wish.group_size == AUTO}
    shared = {name for name in columns if not mixed or name in layers.experts}
    one = next((size for size in AUTO_SIZES if all(columns[name] % size == 0 for name in shared)), AUTO)
    chosen = {name: one if name in shared else _largest(width) for name, width in columns.items()}
    return {
        name: wish._replace(group_size=chosen.get(name, wish.group_size)) for name, wish in wishes.items()
    }


def _leave_out_by_name(
    widths: dict[str, Width], kept: dict[str, str], recipe: QuantizeRecipe, called: str
) -> None:
    """For a format that leaves a layer of one name out in every block or in none: what does not fit in one block stays
    as it is in all; what a recipe ignores in some of them is refused."""
    for name, reason in list(kept.items()):
        inside = _inside(name)
        others = [other for other in widths if _inside(other) == inside]
        if others and reason == IGNORED:
            raise RecipeError(
                f"{called}: the {recipe.format} format leaves {inside} out in every block or in none; "
                f"ignored is {name}, not {others[0]}",
                hint="format: compressed-tensors and awq leave out single layers",
            )
        for other in others:
            del widths[other]
            kept[other] = f"as in another block: {reason}"


def _inside(name: str) -> str:
    """A layer's name after the number of its block."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def _refuse_several(widths: set[Width], recipe: QuantizeRecipe, called: str, what: str) -> None:
    """Refuse what a format of one width for all cannot say."""
    kinds = sorted({(width.bits, width.group_size) for width in widths})
    if len(kinds) > 1:
        shown = ", ".join(f"{bits} bits in groups of {size}" for bits, size in kinds)
        raise RecipeError(
            f"{called}: the {recipe.format} format is read with one width and group size for {what}, not {shown}",
            hint="format: compressed-tensors has a width and a group size for each layer"
            if what == "all layers"
            else "give all experts the same",
        )


def _refuse_unused(recipe: QuantizeRecipe, used: set[str], layers: Layers, called: str) -> None:
    for key, patterns in (("ignore", recipe.ignore), ("overrides", recipe.overrides)):
        for pattern in patterns:
            known = any(matches(pattern, name) for name in [*layers.shapes, *layers.kept, *layers.plain])
            if pattern not in used and not known:
                example = next(iter(layers.shapes), "")
                raise RecipeError(
                    f"{key}: {pattern!r} is the name of no layer of {called}",
                    hint=f"layers are called as {example}; the end of a name does, or re: and a regular expression",
                )


def reads_experts(format: str, layers: Layers) -> bool:
    """Whether transformers reads packed experts in a format: as one tensor they are looked for under another name, and
    merging goes only with some formats; what its own class keeps apart is read as any layer."""
    if layers.stacked:
        return format in layers.apart
    return FORMATS[format].merges or not layers.merged


def coverage(recipe: QuantizeRecipe, format: str, layers: Layers) -> int:
    """How many weights a recipe could quantize in a ``format``, as far as shapes and what transformers reads tell."""
    unread, total = FORMATS[format].unread.keys(), 0
    if layers.computed and not FORMATS[format].converts:
        return 0
    experts = frozenset() if reads_experts(format, layers) else layers.experts
    for name, (rows, columns) in layers.shapes.items():
        wish = Width(max(recipe.widths), _size(recipe.group_size))
        reads = name not in experts and not unread & layers.traits.get(name, frozenset())
        if reads and _unfit(format, recipe.bits == "auto", wish, rows, columns) is None:
            total += rows * columns
    return total


def _other_formats(recipe: QuantizeRecipe, layers: Layers) -> str:
    others = [name for name in PACKING if name != recipe.format and recipe.bits in FORMATS[name].bits]
    fitting = [name for name in others if coverage(recipe, name, layers)]
    if fitting:
        return f"format: {' or '.join(fitting)}"
    wider = [
        name for name in PACKING if any(not FORMATS[name].unread.keys() & t for t in layers.traits.values())
    ]
    held = [f"{name} ({', '.join(map(str, FORMATS[name].bits))} bits)" for name in wider]
    return f"format: {' or '.join(held)}" if held else "there is no format for this architecture"
