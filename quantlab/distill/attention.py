"""Attention over packed blocks that computes only what the packing lets a token see.

A mask over a whole block of L tokens costs L² scores, most of them masked. Here the groups of a block are computed one
by one: the shared beginning (p tokens) causally; its rows, each against the beginning and causally against itself.
Rows of about the same length are computed together, padded to the longest of them, so a bucket of S rows of at most n
tokens costs S · n · (p + n) scores, and against the beginning all of them are one matrix product. Rows that share
nothing with others have p = 0 and are one group. The numbers are those of the masked computation.

It is an entry of transformers' attention table, so any model that looks its attention up there can use it; the layout
of the batch travels as a keyword of the forward call. Worth it where scores cost compute, on CPUs; a GPU prefers one
dense masked call to many small ones. The gradient is in ``quantlab.distill.attention_rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from quantlab.distill.data import Block

NAME = "quantlab_packed"
# What a bucket costs beyond its scores, in scores: a forward and a backward of a few dozen small operations.
BUCKET = 30_000
Span = tuple[int, int]  # first token and number of tokens


@dataclass(frozen=True)
class Rows:
    """``count`` rows, padded to ``longest`` tokens each."""

    count: int
    longest: int
    index: (
        torch.Tensor
    )  # int64 [count · longest]: the token at each padded place; padding repeats a row's first
    places: torch.Tensor  # int64 [Σ lengths]: the padded places that are not padding
    tokens: torch.Tensor  # int64 [Σ lengths]: the tokens there


@dataclass(frozen=True)
class Group:
    """Rows with a common beginning, ``prefix`` tokens from ``start`` of the block on."""

    start: int
    prefix: int
    buckets: tuple[Rows, ...]


Layout = tuple[tuple[Group, ...], ...]  # the groups of every block of a batch


def layout_of(blocks: Sequence[Block]) -> Layout:
    """How the tokens of every block are grouped."""
    return tuple(tuple(_groups(block)) for block in blocks)


def _groups(block: Block) -> list[Group]:
    found: list[Group] = []
    alone: list[Span] = []
    start = 0
    for _, members in groupby(zip(block.groups, block.segments, strict=True), key=lambda pair: pair[0]):
        lengths = {s: len(list(run)) for s, run in groupby(members, key=lambda pair: pair[1])}
        prefix = lengths.pop(0, 0)
        spans, next_row = [], start + prefix
        for length in lengths.values():
            spans.append((next_row, length))
            next_row += length
        if prefix:
            found.append(Group(start, prefix, _buckets(spans, prefix)))
        else:
            alone += spans
        start = next_row
    return [*found, Group(0, 0, _buckets(alone, 0))] if alone else found


def _buckets(spans: Sequence[Span], prefix: int) -> tuple[Rows, ...]:
    """Rows, longest first, cut where padded scores and the cost of a bucket are least together."""
    ordered = sorted(spans, key=lambda span: -span[1])
    least, cut = [0.0], [0]  # for the first rows: the least cost, and where its last bucket begins
    for end in range(1, len(ordered) + 1):
        costs = [
            least[begin] + (end - begin) * ordered[begin][1] * (prefix + ordered[begin][1]) + BUCKET
            for begin in range(end)
        ]
        least.append(min(costs))
        cut.append(costs.index(least[-1]))
    found: list[Rows] = []
    end = len(ordered)
    while end:
        found.append(_rows(ordered[cut[end] : end]))
        end = cut[end]
    return tuple(found)


def _rows(spans: Sequence[Span]) -> Rows:
    starts = torch.tensor([start for start, _ in spans])[:, None]  # [S, 1]
    lengths = torch.tensor([length for _, length in spans])[:, None]
    longest = int(lengths.max())
    steps = torch.arange(longest)[None]  # [1, n]
    held = steps < lengths  # [S, n]
    index = torch.where(held, starts + steps, starts).reshape(-1)
    places = held.reshape(-1).nonzero()[:, 0]
    return Rows(len(spans), longest, index, places, index[places])


def register() -> None:
    """Enter the function into transformers' tables (again is harmless)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the layout says all a mask would


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, H, L, D], [B, KV, L, D], [B, KV, L, D] → [B, L, H, D]; without a layout plain causal attention."""
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    from quantlab.distill.attention_rows import grouped_attention

    place = query.device.type
    if torch.is_autocast_enabled(place):  # positions were turned in float32; attention is not computed in it
        low = torch.get_autocast_dtype(place)
        query, key, value = query.to(low), key.to(low), value.to(low)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(place, enabled=False):
        return grouped_attention(query, key, value, packed_layout, scale, dropout), None
