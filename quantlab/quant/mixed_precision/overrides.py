"""Which layers of a quantized model hurt, from what its run recorded, and which of them to widen within a budget.

A layer's cost is about the Kullback-Leibler divergence a token, in nats, that its error causes alone: measured on that
error (``error_cost``), or, where the run could not, ``sensitivity * loss`` (``sensitivity``). A wider grid divides the
loss by four for every bit more, as the step of a uniform quantizer halves
(Gersho and Gray, "Vector Quantization and Signal Compression", 1992, section 5.5). So

    what widening from b to B bits saves  =  cost * (1 - 4^(b - B)),

and the layers to widen are those that save most within the budget: the same knapsack as of `bits: auto` with two widths
a layer (``allocate``). No weight is read.

Not covered: interactions between layers, and what a wider layer changes in the calibration of the layers after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.quant.mixed_precision.allocate import Layer, allocate

EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class LayerRecord:
    """What a run recorded of one quantized layer; None is what it did not measure.

    weights: how many it has. bits: of a code; group_size: inputs that share a scale, -1 for all of a row; ``type``: the
    block type, in formats that have those.
    loss: mean squared output error a token. output: mean squared output a token. sensitivity: nats a token that a unit
    of loss costs; ``divergence``: that this error costs. outliers: input channels that stand out;
    ``largest``: (channel, times the median) of some of them.
    """

    name: str
    weights: int
    bits: int
    group_size: int = -1
    type: str = ""
    loss: float | None = None
    output: float | None = None
    sensitivity: float | None = None
    divergence: float | None = None
    outliers: int | None = None
    largest: tuple[tuple[int, float], ...] = ()

    @property
    def relative_error(self) -> float | None:
        """Root mean square of the output's error over that of the output."""
        if self.loss is None or not self.output:
            return None
        return math.sqrt(self.loss / self.output)

    @property
    def cost(self) -> float | None:
        """Nats a token that the layer's error costs, about."""
        if self.divergence is not None:
            return self.divergence
        return None if self.loss is None or self.sensitivity is None else self.sensitivity * self.loss


def read_records(made: Mapping[str, Any]) -> list[LayerRecord]:
    """The layers of a checkpoint, of the content of its quantlab.json; empty where it has no record of them."""
    loss = made.get("loss") or {}
    found = []
    for name, one in (made.get("layers") or {}).items():
        largest = tuple((int(channel), float(times)) for channel, times in one.get("largest", ()))
        told = {
            key: one[key]
            for key in ("group_size", "type", "output", "sensitivity", "divergence", "outliers")
            if key in one
        }
        found.append(
            LayerRecord(name, one["weights"], one["bits"], loss=loss.get(name), largest=largest, **told)
        )
    return found


def shares(records: Iterable[LayerRecord]) -> dict[str, float]:
    """Each layer's share of the sum of all costs, by name; layers whose cost is not known are left out."""
    costs = {record.name: record.cost for record in records if record.cost is not None}
    total = math.fsum(costs.values())
    return {name: cost / total if total else 0.0 for name, cost in costs.items()}


@dataclass(frozen=True)
class Suggestion:
    """``names``: the layers to widen, those that save most for a bit first. ``saved``: the share of the sum of all
    costs that this takes away, about. ``weights``: their share of the quantized weights. ``extra_bits``: of storage.
    ``average_bits``: of a code, over all quantized weights, then."""

    names: tuple[str, ...]
    saved: float
    weights: float
    extra_bits: int
    average_bits: float


def suggest(
    records: Sequence[LayerRecord],
    budget: float,
    *,
    bits: int = 8,
    stored: Mapping[str, float] | None = None,
    tied: Iterable[Sequence[str]] = (),
) -> Suggestion:
    """The layers that are worth ``bits`` bits within ``budget`` bits of storage beyond what all take now.

    Args:
        records: all with a cost. stored: bits of storage that a code takes by width or block type, where it is not the
            width itself. tied: groups of layers that must be stored alike.

    Raises:
        ValueError: a layer without a cost, tied layers of several widths.
    """
    unknown = [record.name for record in records if record.cost is None]
    if unknown:
        raise ValueError(f"what {unknown[0]} costs is not known ({len(unknown)} of {len(records)} layers)")
    layers = []
    for record in records:
        cost = record.cost or 0.0
        now = (stored or {}).get(record.type, record.bits)
        then = (stored or {}).get(str(bits), bits)
        size = {record.bits: math.ceil(record.weights * now)}
        loss = {record.bits: cost}
        if record.bits < bits:
            size[bits] = math.ceil(record.weights * then)
            loss[bits] = cost * 4.0 ** (record.bits - bits)
        layers.append(Layer(record.name, record.weights, loss, size=size))
    weights = sum(layer.weights for layer in layers)
    before = sum(layer.bits(record.bits) for layer, record in zip(layers, records, strict=True))
    total = math.fsum(record.cost or 0.0 for record in records)
    average = (
        before + math.floor(max(budget, 0.0)) + 0.5
    ) / weights  # half a bit, so that rounding takes none away
    found = allocate(layers, average, tied=tied).widths
    chosen = [record for record in records if found[record.name] > record.bits]
    gain = {r.name: (r.cost or 0.0) * (1 - 4.0 ** (r.bits - bits)) for r in chosen}
    chosen = [record for record in chosen if gain[record.name] > 0]  # what costs nothing is left as it is
    chosen.sort(key=lambda record: (-gain[record.name] / record.weights, record.name))
    names = {record.name for record in chosen}
    sizes = {layer.name: layer.size or {} for layer in layers}
    return Suggestion(
        tuple(record.name for record in chosen),
        math.fsum(gain.values()) / total if total else 0.0,
        sum(record.weights for record in chosen) / weights,
        sum(sizes[r.name][bits] - sizes[r.name][r.bits] for r in chosen),
        sum(r.weights * (bits if r.name in names else r.bits) for r in records) / weights,
    )


def kin(names: Iterable[str], *, whole: bool) -> list[list[str]]:
    """Experts that are stored alike: all of a model where it is the ``whole``, else the same linear of a block's."""
    found: dict[str, list[str]] = {}
    for name in names:
        if EXPERT.search(name):
            found.setdefault("" if whole else EXPERT.sub(".experts.*.", name), []).append(name)
    return list(found.values())
