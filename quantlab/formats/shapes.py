"""Which layers a layout can hold, told from shapes alone (no torch, so that a misfit is refused at once)."""

from __future__ import annotations

from quantlab.recipe.quantize import LAYOUTS

BITS = {name: held.bits for name, held in LAYOUTS.items()}
GROUP_SIZES = (16, 32, 64, 128)


def refuse(layout: str, bits: int, group_size: int, in_features: int, out_features: int) -> str | None:
    """Why a linear of this shape cannot be stored in ``layout``, or None if it can."""
    if bits not in BITS[layout]:
        return f"the {layout} layout holds {', '.join(map(str, BITS[layout]))} bits, not {bits}"
    if group_size != -1 and in_features % group_size:
        fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0] + ["-1 (one group a row)"]
        return (
            f"its {in_features} inputs are not divisible by group_size {group_size}; "
            f"group sizes that work for it: {', '.join(fitting)}"
        )
    if layout == "compressed-tensors":  # says how long a row is, so its last word may be half empty
        return None
    step = 8 if layout == "awq" else 32 if bits == 3 else 32 // bits  # codes that fill whole packed words
    if out_features % step:
        return (
            f"its {out_features} outputs are not divisible by {step}, which fill packed words at {bits} bits"
        )
    if layout == "gptq" and in_features % step:
        return f"its {in_features} inputs are not divisible by {step}, which fill packed words at {bits} bits"
    return None


def widths(layout: str, group_size: int, in_features: int, out_features: int) -> tuple[int, ...]:
    """The widths at which ``layout`` can hold a linear of this shape; empty where none fits."""
    return tuple(
        bits for bits in BITS[layout] if refuse(layout, bits, group_size, in_features, out_features) is None
    )


def common_group_sizes(inputs: set[int]) -> list[int]:
    """Group sizes that divide every one of these input widths."""
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)]
