"""Allocation of widths against brute force, and what it promises besides."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from quantlab.quant.mixed_precision.allocate import Allocation, BudgetError, Layer, allocate

WIDTHS = (2, 3, 4, 8)


def random_layers(random_: random.Random, count: int, *, whole: bool = False) -> list[Layer]:
    """Layers of uneven sizes; some widths missing, some losses rising with the width, some ties (``whole``)."""
    layers = []
    for number in range(count):
        widths = random_.sample(WIDTHS, random_.randint(1, 4))
        if whole:
            loss = {b: float(random_.randint(0, 3)) for b in widths}
        else:
            loss = {b: 4.0**-b * math.exp(random_.gauss(0, 1.5)) for b in widths}
        sensitivity = 1.0 if whole else math.exp(random_.gauss(0, 1))
        layers.append(Layer(f"l{number}", random_.choice((3, 8, 8, 24, 50)), loss, sensitivity))
    return layers


def brute_force(layers: list[Layer], budget: int, tied: list[list[str]]) -> float:
    """The least cost within the budget, infinite if nothing fits."""
    best = math.inf
    for choice in itertools.product(*(sorted(layer.loss) for layer in layers)):
        widths = {layer.name: width for layer, width in zip(layers, choice, strict=True)}
        if any(len({widths[name] for name in group}) > 1 for group in tied):
            continue
        if sum(layer.bits(widths[layer.name]) for layer in layers) <= budget:
            cost = sum(layer.sensitivity * layer.loss[widths[layer.name]] for layer in layers)
            best = min(best, cost)
    return best


def check(layers: list[Layer], found: Allocation, target: float) -> None:
    """What must hold of any answer."""
    assert list(found.widths) == [layer.name for layer in layers]
    assert found.size == sum(layer.bits(found.widths[layer.name]) for layer in layers)
    assert found.size <= found.budget <= target * found.weights
    assert found.average_bits <= target
    cost = math.fsum(layer.sensitivity * layer.loss[found.widths[layer.name]] for layer in layers)
    assert found.objective == pytest.approx(cost, rel=1e-12)
    assert found.bound <= found.objective and found.gap >= 0


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_as_good_as_every_other_choice(seed: int, whole: bool) -> None:
    random_ = random.Random(seed)
    layers = random_layers(random_, random_.randint(1, 6), whole=whole)
    common = [layer.name for layer in layers[:3] if 3 in layer.loss]
    tied = [common] if len(common) > 1 and seed % 2 else []
    target = random_.uniform(2, 8.5)
    budget = math.floor(target * sum(layer.weights for layer in layers))
    expected = brute_force(layers, budget, tied)
    if math.isinf(expected):
        with pytest.raises(BudgetError) as caught:
            allocate(layers, target, tied=tied)
        assert caught.value.smallest > target
        least = allocate(layers, caught.value.smallest, tied=tied)
        assert least.average_bits > caught.value.smallest - 0.002  # and nothing smaller exists
        return
    found = allocate(layers, target, tied=tied)
    check(layers, found, target)
    assert found.objective == pytest.approx(expected, rel=1e-9)
    assert found.gap == 0
    for group in tied:
        assert len({found.widths[name] for name in group}) == 1


@pytest.mark.parametrize("seed", range(8))
def test_more_budget_never_costs_more(seed: int) -> None:
    layers = random_layers(random.Random(seed), 24)
    least = sum(min(layer.bits(b) for b in layer.loss) for layer in layers)
    weights = sum(layer.weights for layer in layers)
    before = math.inf
    for budget in range(least, 8 * weights + 1, 37):
        found = allocate(layers, budget / weights + 1e-9)
        assert found.objective <= before * (1 + 1e-12)
        before = found.objective


def test_the_order_of_layers_and_ties_between_choices_change_nothing() -> None:
    random_ = random.Random(5)
    # any of them may have the odd bits
    layers = [Layer(f"l{i}", 16, {2: 5.0, 3: 2.0, 4: 1.0}) for i in range(12)]
    first = allocate(layers, 2.9)
    for _ in range(20):
        shuffled = random_.sample(layers, len(layers))
        again = allocate(shuffled, 2.9)
        assert again.widths == first.widths
        assert (again.objective, again.size) == (first.objective, first.size)


def test_choices_off_the_hull_are_used_where_they_fill_the_budget() -> None:
    # Of layer a the 3 bits lie above the line from 2 to 4, so that no price of a bit selects them.
    layers = [Layer("a", 8, {2: 10.0, 3: 7.0, 4: 1.0}), Layer("b", 8, {2: 1.0})]
    found = allocate(layers, 2.5)
    assert found.widths == {"a": 3, "b": 2}
    assert found.gap == 0


def test_a_wider_code_that_loses_more_is_never_chosen() -> None:
    assert allocate([Layer("a", 8, {2: 3.0, 3: 1.0, 4: 2.0, 8: 1.0})], 8).widths == {"a": 3}


def test_uniform_widths_come_out_where_layers_are_alike() -> None:
    layers = [Layer(f"l{i}", 64, {2: 30.0, 3: 5.0, 4: 1.1, 8: 0.004}) for i in range(30)]
    assert set(allocate(layers, 3).widths.values()) == {3}
    assert set(allocate(layers, 4).widths.values()) == {4}


def test_exact_sizes_are_what_counts_where_they_are_given() -> None:
    # Scales of 1 bit a weight at 2 bits and none at 3: two bits save nothing.
    dear = Layer("a", 10, {2: 5.0, 3: 1.0}, size={2: 30, 3: 30})
    other = Layer("b", 10, {2: 1.0, 4: 0.5}, size={2: 22, 4: 42})
    found = allocate([dear, other], 2.6)
    assert found.widths == {"a": 3, "b": 2} and found.size == 52
    with pytest.raises(BudgetError) as caught:
        allocate([dear, other], 2.59)
    assert caught.value.smallest == 2.6


def test_a_target_that_floats_cannot_hold_is_not_exceeded() -> None:
    layers = [Layer("a", 10, {2: 1.0, 3: 0.5})]
    assert allocate(layers, 3.0).widths == {"a": 3}
    assert allocate(layers, math.nextafter(3.0, 0)).widths == {"a": 2}


def test_tied_groups_that_share_a_layer_are_one() -> None:
    layers = [Layer(name, 8, {2: 4.0 + i, 3: 2.0, 4: 1.0}) for i, name in enumerate("abcd")]
    found = allocate(layers, 2.8, tied=[["a", "b"], ["b", "c"], ["x", "d"]])
    assert len({found.widths[name] for name in "abc"}) == 1
    check(layers, found, 2.8)


def test_too_few_partial_choices_are_owned_up_to() -> None:
    layers = random_layers(random.Random(3), 40)
    exact = allocate(layers, 4)
    assert exact.gap == 0
    rough = allocate(layers, 4, limit=1)
    check(layers, rough, 4)
    assert rough.objective >= exact.objective >= rough.bound
    assert rough.gap >= (rough.objective - exact.objective) / rough.objective


def test_as_many_layers_as_a_large_model_has() -> None:
    random_ = random.Random(0)
    layers = []
    for i in range(560):
        weights = random_.choice((64, 64, 8, 8, 224, 224, 224)) * 2**20
        scale = weights * math.exp(random_.gauss(0, 1.2))
        layers.append(
            Layer(f"l{i}", weights, {2: 30 * scale, 3: 5 * scale, 4: 1.1 * scale, 8: 0.004 * scale})
        )
    found = allocate(layers, 3.5)
    check(layers, found, 3.5)
    assert found.gap < 1e-6


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "no layers"),
        ([Layer("a", 1, {2: 1.0}), Layer("a", 1, {2: 1.0})], "a occurs twice"),
        ([Layer("a", 1, {})], "no weights or no widths"),
        ([Layer("a", 0, {2: 1.0})], "no weights or no widths"),
        ([Layer("a", 1, {2: math.nan})], "nan is not a cost"),
        ([Layer("a", 1, {2: -1.0})], "-1.0 is not a cost"),
        ([Layer("a", 1, {2: 1.0}, math.inf)], "inf is not a cost"),
    ],
)
def test_nonsense_is_refused(layers: list[Layer], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allocate(layers, 4)


def test_a_tied_group_without_a_common_width_is_refused() -> None:
    with pytest.raises(ValueError, match="a, b must share a width"):
        allocate([Layer("a", 1, {2: 1.0}), Layer("b", 1, {4: 1.0})], 8, tied=[["a", "b"]])
