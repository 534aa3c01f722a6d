"""Which layers a layout can hold, told from shapes alone (no torch, so that a misfit is refused at once)."""

from __future__ import annotations

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
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
    step = 8 if layout == "awq" else 32 if bits == 3 else 32 // bits  # codes that fill whole packed words
    if out_features % step:
        return (
            f"its {out_features} outputs are not divisible by {step}, which fill packed words at {bits} bits"
        )
    if layout == "gptq" and in_features % step:
        return f"its {in_features} inputs are not divisible by {step}, which fill packed words at {bits} bits"
    return None


def common_group_sizes(widths: set[int]) -> list[int]:
    """Group sizes that divide every one of these input widths."""
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
