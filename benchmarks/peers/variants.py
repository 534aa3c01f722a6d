"""What the comparison of quality compares: models with their texts, and every tool's ways of quantizing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BITS = (4, 3)
ORDERS = {"none": "false", "group": "group", "true": "true", "static": "true, static"}


@dataclass(frozen=True)
class LoadedModel:
    """A model, where its calibration rows come from, and the text that it is measured on."""

    name: str
    model: str
    calibration: str
    test: str
    group_size: int
    seq_len: int


@dataclass(frozen=True)
class Variant:
    """One way of quantizing. ``recipe``: quantlab's; ``settings``: of a peer's worker."""

    tool: str
    method: str
    bits: int
    how: str  # what distinguishes it from other variants of the tool
    recipe: Mapping[str, Any] | None = field(default=None, compare=False)
    settings: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return (
            f"{self.tool}-{self.method}{self.bits}-{self.how}".replace(" ", "")
            .replace(",", "-")
            .replace("=", "-")
        )


def own_variants(group_size: int, orders: Sequence[str] = tuple(ORDERS)) -> Iterator[Variant]:
    """quantlab's, with these of :data:`ORDERS`."""
    for bits in BITS:
        common = {"bits": bits, "group_size": group_size}
        for propagate in ("original", "quantized"):
            for order in orders:
                shown = ORDERS[order]
                ordered: dict[str, Any] = {"act_order": {"none": False, "group": "group"}.get(order, True)}
                if order == "static":
                    ordered["static_groups"] = True
                recipe = common | {"method": "gptq", "damp": 0.01, "propagate": propagate} | ordered
                yield Variant("quantlab", "gptq", bits, f"{propagate}, act_order={shown}", recipe)
            recipe = common | {
                "method": "awq", "symmetric": False, "propagate": propagate, "format": "awq" if bits == 4 else "gptq",
            }  # fmt: skip
            yield Variant("quantlab", "awq", bits, propagate, recipe)


def peer_variants(group_size: int, clip: bool, orders: Sequence[str] = tuple(ORDERS)) -> Iterator[Variant]:
    """The peers', as far as they can. ``clip``: whether autoawq can clip this model's layers."""
    for bits in BITS:
        common = {"bits": bits, "group_size": group_size, "damp": 0.01, "act_order": "none"}
        for order in orders:
            shown = ORDERS[order]
            settings = common | {"method": "gptq", "symmetric": True, "act_order": order}
            yield Variant("gptqmodel", "gptq", bits, f"act_order={shown}", settings=settings)
        if bits == 4:
            settings = common | {"method": "awq", "symmetric": False}
            yield Variant("gptqmodel", "awq", bits, "default", settings=settings)
        how = "default" if clip else "no clipping"
        settings = common | {"method": "awq", "symmetric": False, "clip": clip}
        yield Variant("autoawq", "awq", bits, how, settings=settings)


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """The text cut in two at the line end before its middle; as files in the work folder."""
    content = text.read_text(encoding="utf-8")
    middle = content.rfind("\n", 0, len(content) // 2) + 1
    work.mkdir(parents=True, exist_ok=True)
    paths = work / f"{text.stem}-first.txt", work / f"{text.stem}-second.txt"
    for path, part in zip(paths, (content[:middle], content[middle:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths[0].absolute(), paths[1].absolute()
