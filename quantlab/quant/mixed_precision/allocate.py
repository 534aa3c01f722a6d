"""Which width each layer gets, so that the model loses least within a budget of bits.

Every layer offers a few widths; width b costs ``size(b)`` bits of storage and ``sensitivity * loss(b)`` of the model's
quality. Exactly one width a layer (or a tied group of layers) is chosen, the sum of costs minimal, the sum of sizes
within the budget: the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: "Knapsack Problems", 2004,
chapter 11).

* The relaxation: each layer's lower convex hull of (size, cost); walking all hull edges in the order of what a bit
  saves fills the budget greedily. The first edge that does not fit gives the price of a bit, and with it a lower bound
  on every solution (Lagrangian duality, Everett 1963); the edges taken are a solution close to that bound.
* The refinement: layers are added one by one, and of all partial choices only those are kept that no other beats in
  size and cost at once (Nemhauser and Ullmann 1969), and that can still lead below the best solution known, told from
  the price of a bit. What is left at the end is the optimum.

That takes few partial choices in practice, but could take too many; beyond ``limit`` the least promising are dropped,
and ``Allocation.gap`` is what the answer may then be away from the optimum. A larger budget never gives a larger
objective where both answers are exact. Nothing depends on the order of the layers.

Not covered: costs that are not sums over layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

SLACK = 1e-12  # relative; sums of floats in another order differ by this much at most


@dataclass(frozen=True)
class Layer:
    """What is to be decided about one layer.

    weights: how many it has.
    loss: by width in bits, what quantizing it costs; only the widths that its layout can hold. Where ``size`` is given,
        a width may be any number that names an option.
    sensitivity: what one unit of loss is worth, equal units for all layers.
    size: bits of storage by width, scales and all; None counts the codes alone, ``weights * width``.
    """

    name: str
    weights: int
    loss: Mapping[int, float]
    sensitivity: float = 1.0
    size: Mapping[int, int] | None = None

    def bits(self, width: int) -> int:
        """Storage at a width."""
        return self.weights * width if self.size is None else self.size[width]


@dataclass(frozen=True)
class Allocation:
    """``widths`` by layer; ``objective`` the sum of their costs; ``bound``: no choice within the budget costs less;
    ``size`` and ``budget`` in bits; ``weights`` of all layers together."""

    widths: dict[str, int]
    objective: float
    bound: float
    size: int
    budget: int
    weights: int

    @property
    def average_bits(self) -> float:
        """Bits a weight, of what ``size`` counts."""
        return self.size / self.weights

    @property
    def gap(self) -> float:
        """How far the objective may be from the best possible, as a share of it; 0 for a proven optimum."""
        return (self.objective - self.bound) / self.objective if self.objective > self.bound else 0.0


class BudgetError(ValueError):
    """No choice of widths is that small. ``smallest`` is the least target that is possible, rounded up to 0.001."""

    def __init__(self, target: float, smallest: float) -> None:
        super().__init__(
            f"an average of {target:g} bits is not possible; the smallest for these layers is {smallest:g}"
        )
        self.smallest = smallest


def allocate(
    layers: Sequence[Layer], target_bits: float, *, tied: Iterable[Sequence[str]] = (), limit: int = 20_000
) -> Allocation:
    """The widths that cost least with at most ``target_bits`` bits a weight on average.

    Args:
        tied: groups of layer names that must share a width (those that a kernel runs as one matrix); names that are no
            layer here are ignored.
        limit: how many partial choices are kept at once.

    Raises:
        BudgetError: even the smallest widths are too large.
        ValueError: a layer without widths or weights, a loss or sensitivity that is negative or not finite, a name that
            occurs twice, a tied group without a common width.
    """
    _refuse(layers)
    weights = sum(layer.weights for layer in layers)
    return allocate_within(layers, math.floor(Fraction(target_bits) * weights), tied=tied, limit=limit)


def allocate_within(
    layers: Sequence[Layer], budget: int, *, tied: Iterable[Sequence[str]] = (), limit: int = 20_000
) -> Allocation:
    """As :func:`allocate`, with at most ``budget`` bits in all."""
    _refuse(layers)
    weights = sum(layer.weights for layer in layers)
    items = [_Item.of(members) for members in _groups(layers, tied)]
    smallest = sum(item.options[0].size for item in items)
    if smallest > budget:
        raise BudgetError(budget / weights, math.ceil(Fraction(1000 * smallest, weights)) / 1000)
    relaxed = _relax(items, budget)
    chosen, exact = _refine(items, relaxed, budget, limit)
    widths = {
        layer.name: option.width for item, option in zip(items, chosen, strict=True) for layer in item.layers
    }
    ordered = {layer.name: widths[layer.name] for layer in layers}
    objective = _total(layers, ordered)
    size = sum(layer.bits(ordered[layer.name]) for layer in layers)
    bound = objective if exact else min(relaxed.bound, objective)
    return Allocation(ordered, objective, bound, size, budget, weights)


def _refuse(layers: Sequence[Layer]) -> None:
    if not layers:
        raise ValueError("there are no layers to choose widths for")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError(f"layer {next(n for n in names if names.count(n) > 1)} occurs twice")
    for layer in layers:
        if layer.weights <= 0 or not layer.loss:
            raise ValueError(f"layer {layer.name} has no weights or no widths")
        for value in (layer.sensitivity, *layer.loss.values()):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"layer {layer.name}: a loss or sensitivity of {value} is not a cost")


def _groups(layers: Sequence[Layer], tied: Iterable[Sequence[str]]) -> list[list[Layer]]:
    """Layers that share a width, in an order that does not depend on theirs."""
    known = {layer.name: layer for layer in layers}
    leader = {name: name for name in known}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for group in tied:
        present = [name for name in group if name in known]
        for name in present[1:]:
            leader[find(name)] = find(present[0])
    groups: dict[str, list[Layer]] = {}
    for name in sorted(known):
        groups.setdefault(find(name), []).append(known[name])
    return list(groups.values())


def _total(layers: Iterable[Layer], widths: Mapping[str, int]) -> float:
    return math.fsum(layer.sensitivity * layer.loss[widths[layer.name]] for layer in layers)


@dataclass(frozen=True)
class _Option:
    width: int
    size: int
    cost: float


@dataclass(frozen=True)
class _Item:
    """Layers of one width. ``options``: those that none other beats, sizes rising and costs falling."""

    layers: tuple[Layer, ...]
    options: tuple[_Option, ...]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> _Item:
        shared = sorted(set.intersection(*(set(layer.loss) for layer in layers)))
        if not shared:
            raise ValueError(
                f"{', '.join(layer.name for layer in layers)} must share a width, and have none in common"
            )
        found = [
            _Option(
                width,
                sum(layer.bits(width) for layer in layers),
                _total(layers, {layer.name: width for layer in layers}),
            )
            for width in shared
        ]
        kept: list[_Option] = []
        for option in sorted(found, key=lambda o: (o.size, o.cost, o.width)):
            if not kept or option.cost < kept[-1].cost:
                kept.append(option)
        return cls(tuple(layers), tuple(kept))

    def hull(self) -> list[_Option]:
        """The lower convex hull of the options: along it each further bit saves less than the one before."""
        kept: list[_Option] = []
        for option in self.options:
            while len(kept) > 1 and _saving(kept[-2], kept[-1]) <= _saving(kept[-1], option):
                kept.pop()
            kept.append(option)
        return kept


def _saving(small: _Option, large: _Option) -> float:
    """Cost saved by a bit of storage."""
    return (small.cost - large.cost) / (large.size - small.size)


@dataclass(frozen=True)
class _Relaxed:
    price: float  # what a bit is worth at this budget
    bound: float  # no solution costs less
    choice: tuple[_Option, ...]  # a solution


def _relax(items: Sequence[_Item], budget: int) -> _Relaxed:
    """Fill the budget along the hulls, the most saving edges first; edges that do not fit are passed over, as are those
    beyond them in their hull."""
    hulls = [item.hull() for item in items]
    edges = [
        (-_saving(a, b), number, place)
        for number, hull in enumerate(hulls)
        for place, (a, b) in enumerate(pairwise(hull))
    ]
    taken = [0] * len(items)
    size = sum(item.options[0].size for item in items)
    price: float | None = None
    for saving, number, place in sorted(edges):
        step = hulls[number][place + 1].size - hulls[number][place].size
        if taken[number] == place and size + step <= budget:
            taken[number], size = place + 1, size + step
        elif price is None:
            price = -saving
    price = price or 0.0
    reduced = (min(o.cost + price * o.size for o in item.options) for item in items)
    bound = math.fsum([*reduced, -price * budget])
    return _Relaxed(price, bound, tuple(hull[place] for hull, place in zip(hulls, taken, strict=True)))


@dataclass(frozen=True)
class _State:
    """A choice for some of the items; ``before`` is the same without the last of them."""

    size: int
    cost: float
    option: _Option | None = None
    before: _State | None = None


def _refine(items: Sequence[_Item], relaxed: _Relaxed, budget: int, limit: int) -> tuple[list[_Option], bool]:
    """The best solution, and whether it is proven to be: false where partial choices were dropped."""
    price = relaxed.price
    best = math.fsum(option.cost for option in relaxed.choice)
    ceiling = best + SLACK * (best + price * budget)
    reduced = [sorted(o.cost + price * o.size for o in item.options) for item in items]
    # Those whose choice matters most come first: their wrong options are out before there are many partial choices.
    regret = [values[1] - values[0] if len(values) > 1 else math.inf for values in reduced]
    order = sorted(range(len(items)), key=lambda number: (-regret[number], number))
    cheapest, least = [0.0], [0]  # of the items still to come, the last item first
    for number in reversed(order):
        cheapest.append(cheapest[-1] + reduced[number][0])
        least.append(least[-1] + items[number].options[0].size)
    states, exact = [_State(0, 0.0)], True
    for position, number in enumerate(order):
        left = len(order) - position - 1
        room, rest = budget - least[left], ceiling - cheapest[left] + price * budget
        grown = [
            _State(state.size + option.size, state.cost + option.cost, option, state)
            for state in states
            for option in items[number].options
        ]
        grown = [s for s in grown if s.size <= room and s.cost + price * s.size <= rest]
        grown.sort(key=lambda state: (state.size, state.cost))
        states = []
        for state in grown:
            if not states or state.cost < states[-1].cost:
                states.append(state)
        if len(states) > limit:
            exact = False
            states.sort(key=lambda state: state.cost + price * state.size)
            states = sorted(states[:limit], key=lambda state: state.size)
    end = min(states, key=lambda state: (state.cost, state.size), default=None)
    if end is None or end.cost > best:  # the kin of the relaxation's own solution were dropped
        return list(relaxed.choice), exact
    chosen = [item.options[0] for item in items]
    at: _State | None = end
    for number in reversed(order):
        assert at is not None and at.option is not None
        chosen[number], at = at.option, at.before
    return chosen, exact
