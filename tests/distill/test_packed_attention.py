"""Grouped attention against the masked computation, its gradient, dropout, and how rows are put together."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quantlab.distill.data import Block, Example, collate, pack
from quantlab.distill.packed_attention import grouped_attention, layout_of


def blocks(seed: int, how: str = "shared", max_len: int = 120) -> list[Block]:
    """Families of rows with a common beginning, of very different lengths."""
    rng = random.Random(seed)
    rows = []
    for family in range(5):
        common = [rng.randrange(1, 50) for _ in range(rng.randint(0, 20))]
        for number in range(rng.randint(1, 6)):
            own = [rng.randrange(1, 50) for _ in range(rng.choice((3, 5, 20, 40)))]
            tokens = (*common, family + 50, *own)
            rows.append(Example(f"{family}-{number}", tokens, 2, f"family {family}"))
    return pack(rows, how, max_len, seed)


def tensors(seed: int, chosen: Sequence[Block], heads: int, shared: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, chosen)) + 3  # the longest has padding too
    shapes = ((heads, 8), (shared, 8), (shared, 6))  # values are narrower than keys
    return [
        torch.randn(len(chosen), h, longest, d, generator=generator, dtype=dtype).requires_grad_()
        for h, d in shapes
    ]


def masked(query: Tensor, key: Tensor, value: Tensor, chosen: Sequence[Block]) -> Tensor:
    """[B, L, H, E]: all scores, those that may not be seen at -inf."""
    seen = collate(chosen, 0, True)["attention_mask"]
    longest = seen.shape[-1]
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (
        t[:, :, :longest].repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (query, key, value)
    )
    assert repeat >= 1
    scores = (q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("how", ["rows", "shared"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_masked_attention_with_its_gradients(seed: int, how: str, heads: int, shared: int) -> None:
    chosen = blocks(seed, how)
    query, key, value = tensors(seed, chosen, heads, shared, torch.float64)
    found = grouped_attention(query, key, value, layout_of(chosen), query.shape[-1] ** -0.5)
    wanted = masked(query, key, value, chosen)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(found.shape[:2], dtype=torch.float64)
    for number, block in enumerate(chosen):
        held[number, : len(block)] = 1
    assert not found[held == 0].any()
    weight = weight * held[:, :, None, None]
    longest = wanted.shape[1]
    assert torch.allclose(found[:, :longest] * held[:, :longest, None, None],
                          wanted * held[:, :longest, None, None], atol=1e-12)  # fmt: skip
    mine = torch.autograd.grad((found * weight).sum(), (query, key, value))
    other = torch.autograd.grad((wanted * weight[:, :longest]).sum(), (query, key, value))
    for left, right in zip(mine, other, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


def test_with_dropout_the_gradient_is_that_of_the_weights_that_were_kept() -> None:
    chosen = blocks(1)
    inputs = tensors(2, chosen, 4, 2, torch.float64)
    layout = layout_of(chosen)

    def value_at(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(7)
        return grouped_attention(query, key, value, layout, 0.3, dropout=0.4).square().sum()

    gradients = torch.autograd.grad(value_at(*inputs), inputs)
    generator = torch.Generator().manual_seed(8)
    for place, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        moved = [[*inputs], [*inputs]]
        moved[0][place], moved[1][place] = (inputs[place] + step * direction for step in (1e-6, -1e-6))
        wanted = (value_at(*moved[0]) - value_at(*moved[1])) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_dropout_keeps_the_mean() -> None:
    chosen = blocks(3)
    query, key, value = (t.detach() for t in tensors(3, chosen, 4, 2, torch.float32))
    layout = layout_of(chosen)
    wanted = grouped_attention(query, key, value, layout, 0.3)
    torch.manual_seed(0)
    mean = torch.stack(
        [grouped_attention(query, key, value, layout, 0.3, dropout=0.25) for _ in range(400)]
    ).mean(0)
    assert float((mean - wanted).abs().max()) < 0.25
    assert float((mean - wanted).abs().mean()) < 0.02


@pytest.mark.parametrize("how", ["rows", "shared"])
def test_every_token_is_in_one_place(how: str) -> None:
    for seed in range(10):
        chosen = blocks(seed, how)
        for block, groups in zip(chosen, layout_of(chosen), strict=True):
            places = [range(g.start, g.start + g.prefix) for g in groups]
            tokens = [int(t) for part in places for t in part]
            tokens += [int(t) for g in groups for rows in g.buckets for t in rows.tokens]
            assert sorted(tokens) == list(range(len(block)))
            for group in groups:
                for rows in group.buckets:
                    assert torch.equal(rows.index[rows.places], rows.tokens)
                    assert len(rows.index) == rows.count * rows.longest


def test_rows_of_unlike_lengths_are_not_padded_to_the_longest() -> None:
    rows = [Example(str(n), tuple(range(1, 12)), 2, "") for n in range(80)]
    rows.append(Example("long", tuple(range(1, 1200)), 2, ""))
    (block,) = pack(rows, "rows", 4000)
    (group,) = layout_of([block])[0]
    assert [(rows.count, rows.longest) for rows in group.buckets] == [(80, 11), (1, 1199)]
