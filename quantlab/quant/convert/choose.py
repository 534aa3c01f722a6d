"""What a layout holds of a checkpoint without a change, told from the range of its codes: which width, zeros and block
types, or why not.

The rules are few. A layout of integer codes takes codes of their own width or narrower, where the levels that are
really there fit; ``widen`` lets it take more bits than the source has. It is symmetric where every linear can be,
since that is what most kernels are fast at. A GGUF file takes the block type of least bits in which every weight stays
as it is. ``tolerance`` is how far a scale or minimum may be off, relative to itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from quantlab.errors import DataError
from quantlab.formats.codes import Codes, rounding_error, spans, zeros_for
from quantlab.formats.gguf.groups import SIMPLE, block_error, no_blocks
from quantlab.quant.selection import alike
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS, misfit

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCALES = "float16"  # what formats with a type of their own for scales store them in
WIDTHS = (2, 3, 4, 8)  # of all layouts of integer codes


@dataclass(frozen=True)
class Fits:
    """What holds a linear. ``shape``: [out, in]. ``bits``, ``group_size``: as it is stored now. ``ordered``: columns of
    a group are neighbours. ``grids``: (bits, symmetric, least zero) of integer codes that hold it. ``scale_errors``:
    how far a scale is off, by dtype. ``kinds``: block types that hold it, and how far a scale or minimum is off.
    ``no_blocks``: why it cannot be blocks of 32 columns. ``levels``: the least and the greatest."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    ordered: bool
    grids: frozenset[tuple[int, bool, int]]
    scale_errors: Mapping[str, float]
    kinds: Mapping[str, float]
    no_blocks: str
    levels: tuple[int, int]


def fits_of(held: Codes, bits: int, group_size: int) -> Fits:
    """What holds a linear, of its codes. ``bits``, ``group_size``: as it is stored."""
    low, high = spans(held)
    grids = {
        (width, symmetric, zero_min)
        for width in WIDTHS
        for symmetric in (True, False)
        for zero_min in (0, 1)
        if zeros_for(held.zeros, low, high, width, symmetric=symmetric, zero_min=zero_min) is not None
    }
    reason = no_blocks(held)
    errors = {} if reason else {
        kind.name: block_error(held.scales, held.zeros, low, high, kind) for kind in SIMPLE
    }  # fmt: skip
    return Fits(
        (len(held.codes), held.columns),
        bits,
        group_size,
        held.ordered,
        frozenset(grids),
        {name: rounding_error(held.scales, dtype) for name, dtype in DTYPES.items()},
        {name: error for name, error in errors.items() if error is not None},
        reason,
        (int(low.min()), int(high.max())),
    )


@dataclass(frozen=True)
class Allowed:
    """``tolerance``: how far a scale or minimum may be off, relative to itself. ``widen``: codes may take more bits
    than they have now. ``dtype``: of the checkpoint's plain tensors."""

    tolerance: float = 0.0
    widen: bool = False
    dtype: str = "float16"


@dataclass(frozen=True)
class Choice:
    """How each linear is stored. ``widths``: its bits and group size. ``kinds``: its block type, in a GGUF file.
    ``error``: how far a scale or minimum is off at most. ``notes``: what is worth saying of it."""

    widths: Mapping[str, tuple[int, int]]
    symmetric: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    error: float = 0.0
    notes: tuple[str, ...] = ()


class Unfit(Exception):
    """``reasons``: by linear, why the layout does not hold it."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__()
        self.reasons = reasons


def choose(
    to: str,
    linears: Mapping[str, Fits],
    allowed: Allowed,
    called: str,
    others: tuple[str, ...] = (),
    together: Callable[[str], str] = str,
) -> Choice:
    """How a layout stores these linears.

    Args:
        called: the checkpoint's name, for messages. others: layouts to name where this one does not hold them.
        together: the linears that give the same name are one tensor in a GGUF file, of one type.

    Raises:
        DataError: it does not hold one of them; says which, why, and what does.
    """
    try:
        return _choose(to, linears, allowed, together)
    except Unfit as unfit:
        raise DataError(
            f"{called} cannot be converted to {to} without a change: {listed(unfit.reasons)}",
            hint=_what_holds(to, linears, allowed, others, together),
        ) from None


def listed(reasons: Mapping[str, str]) -> str:
    """Linears and why they are not held, for a message: each reason with the names it is about, the same in every
    block."""
    said: dict[str, list[str]] = {}
    for (name, why), count in alike(reasons).items():
        said.setdefault(why, []).append(f"{name} ({count})")
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in said.items())


def _what_holds(
    to: str,
    linears: Mapping[str, Fits],
    allowed: Allowed,
    others: tuple[str, ...],
    together: Callable[[str], str],
) -> str:
    """For the hint: other layouts, and what options would do."""

    def held(layout: str, by: Allowed) -> bool:
        try:
            _choose(layout, linears, by, together)
        except Unfit:
            return False
        return True

    said = []
    wider = Allowed(allowed.tolerance, True, allowed.dtype)
    if held(to, wider):
        said.append(f"--widen stores them in more bits, in {to}, without a change")
    if fitting := [name for name in others if held(name, allowed)]:
        said.append(f"{' and '.join(fitting)} {'hold' if len(fitting) > 1 else 'holds'} it as it is")
    if not said and held(to, Allowed(1.0, True, allowed.dtype)):
        least = _least_tolerance(to, linears, allowed, together)
        widen = "" if held(to, Allowed(least, allowed.widen, allowed.dtype)) else " --widen"
        said.append(f"--tolerance {least:.2g}{widen} allows it, with scales that much off")
    return "; ".join(said) or "quantize the original model into this format: `quantlab quantize`"


def _least_tolerance(
    to: str, linears: Mapping[str, Fits], allowed: Allowed, together: Callable[[str], str]
) -> float:
    """The error that a conversion with any tolerance would make, rounded up to two digits."""
    error = _choose(to, linears, Allowed(1.0, True, allowed.dtype), together).error
    return float(f"{error * 1.05:.1e}")


def _choose(to: str, linears: Mapping[str, Fits], allowed: Allowed, together: Callable[[str], str]) -> Choice:
    return _blocks(linears, allowed, together) if FORMATS[to].types else _grids(to, linears, allowed)


def _grids(to: str, linears: Mapping[str, Fits], allowed: Allowed) -> Choice:
    """In a layout of integer codes."""
    held = FORMATS[to]
    dtype = SCALES if held.own_dtype else allowed.dtype
    reasons = {name: why for name, fits in linears.items() if (why := _not_alone(to, fits, allowed, dtype))}
    if reasons:
        raise Unfit(reasons)
    signs = (True, False) if held.asymmetric else (True,)
    found = {}
    for symmetric in signs:
        widths = {n: _widths(to, fits, allowed, symmetric) for n, fits in linears.items()}
        if not held.mixed:
            common = set.intersection(*(set(w) for w in widths.values()))
            widths = {name: [w for w in of if w in common] for name, of in widths.items()}
        if all(widths.values()):
            found[symmetric] = {name: min(of) for name, of in widths.items()}
    if not found:
        raise Unfit(dict.fromkeys(linears, _several(to, linears)))
    # of two that hold all, the one of fewer bits; of equal ones the symmetric one
    symmetric = min(found, key=lambda sign: (sum(found[sign].values()), not sign))
    sizes = {fits.group_size for fits in linears.values()}
    if not held.mixed and len(sizes) > 1:
        usual = Counter(fits.group_size for fits in linears.values()).most_common(1)[0][0]
        odd = {n: f"its groups are of {f.group_size}, others of {usual}, and {to} knows one size"
               for n, f in linears.items() if f.group_size != usual}  # fmt: skip
        raise Unfit(odd)
    chosen = {name: (found[symmetric][name], fits.group_size) for name, fits in linears.items()}
    error = max(fits.scale_errors[dtype] for fits in linears.values())
    return Choice(chosen, symmetric, {}, error, tuple(_changes(linears, chosen)))


def _changes(linears: Mapping[str, Fits], chosen: Mapping[str, tuple[int, int]]) -> list[str]:
    changed = Counter(
        (fits.bits, chosen[name][0]) for name, fits in linears.items() if fits.bits != chosen[name][0]
    )
    return [
        f"{count} linears of {old} bits are stored in {new} bits" for (old, new), count in changed.items()
    ]


def _widths(to: str, fits: Fits, allowed: Allowed, symmetric: bool) -> list[int]:
    """The widths at which a layout holds a linear."""
    held, (rows, columns) = FORMATS[to], fits.shape
    return [
        bits
        for bits in held.bits
        if (bits, symmetric, held.zero_min) in fits.grids
        and (allowed.widen or bits <= fits.bits)
        and misfit(to, bits, fits.group_size, columns, rows) is None
    ]


def _not_alone(to: str, fits: Fits, allowed: Allowed, dtype: str) -> str:
    """Why a layout does not hold a linear, whatever the others are; empty where it does."""
    held, (rows, columns) = FORMATS[to], fits.shape
    if not fits.ordered and not held.ordered:
        return "its columns are out of order (act_order), for which the layout has no room"
    if (error := fits.scale_errors[dtype]) > allowed.tolerance:
        off = f"off by up to {error:.2g} of their value" if error < 1 else "beyond its range"
        return f"its scales would be stored in {dtype}, in which they are {off}"
    if any(_widths(to, fits, allowed, symmetric) for symmetric in (True, False)[: 1 + held.asymmetric]):
        return ""
    grids = {(bits, symmetric) for bits, symmetric, least in fits.grids if least == 0}
    own = [bits for bits in held.bits if allowed.widen or bits <= fits.bits]
    if (fits.bits, True) not in grids and not held.asymmetric and any((bits, False) in grids for bits in own):
        return "its grid is asymmetric, and the layout is read with symmetric grids only"
    if held.zero_min and any((bits, sign) in grids for bits in own for sign in (True, False)):
        return "a group has the zero 0, and the layout stores zeros from 1 on"
    fitting = min((bits for bits, _ in grids), default=None)
    if (
        fitting is not None
        and fitting in held.bits
        and (reason := misfit(to, fitting, fits.group_size, columns, rows))
    ):
        return reason
    low, high = fits.levels
    wide = ", ".join(map(str, held.bits))
    return f"its {fits.bits}-bit codes have levels from {low} to {high}, the layout holds {wide} bits"


def _several(to: str, linears: Mapping[str, Fits]) -> str:
    widths = sorted({fits.bits for fits in linears.values()})
    return f"the linears have {' and '.join(map(str, widths))} bits, and {to} knows one width"


def _blocks(linears: Mapping[str, Fits], allowed: Allowed, together: Callable[[str], str]) -> Choice:
    """In a GGUF file."""
    reasons = {name: fits.no_blocks for name, fits in linears.items() if fits.no_blocks}
    reasons |= {
        name: f"its levels go from {fits.levels[0]} to {fits.levels[1]}, the widest block type has -128 to 127"
        for name, fits in linears.items()
        if not fits.kinds and name not in reasons
    }
    if reasons:
        raise Unfit(reasons)
    stacks: dict[str, list[str]] = {}
    for name in linears:
        stacks.setdefault(together(name), []).append(name)
    kinds: dict[str, str] = {}
    passed: Counter[tuple[str, str]] = Counter()
    off = worst = 0.0
    for names in stacks.values():
        errors = {
            kind.name: max(linears[name].kinds.get(kind.name, float("inf")) for name in names)
            for kind in SIMPLE
        }
        good = [kind for kind, error in errors.items() if error <= allowed.tolerance]
        if not good:
            least = min(errors, key=lambda kind: errors[kind])
            why = (
                f"its scales would be stored in float16, in which they are off by up to {errors[least]:.2g}"
                if errors[least] < 1
                else "no block type holds its codes and scales"
            )
            reasons |= dict.fromkeys(names, why)
            continue
        kinds |= dict.fromkeys(names, good[0])
        worst = max(worst, errors[good[0]])
        near = next(iter(kind for kind, error in errors.items() if error < 1), good[0])
        if near != good[0]:
            passed[near, good[0]] += len(names)
            off = max(off, errors[near])
    if reasons:
        raise Unfit(reasons)
    widths = {name: (BLOCK_TYPES[kind].bits, BLOCK_TYPES[kind].group) for name, kind in kinds.items()}
    notes = [
        f"{count} linears are {kind}, which holds them without a change; {near} has "
        f"{BLOCK_TYPES[kind].bits_per_weight - BLOCK_TYPES[near].bits_per_weight:g} bits a weight less and minima that "
        f"would be off by up to {off:.2g} of their value (--tolerance {off * 1.05:.1e} takes it)"
        for (near, kind), count in passed.items()
    ]
    return Choice(widths, False, kinds, worst, tuple(notes))
