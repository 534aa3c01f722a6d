"""Attention over packed blocks that computes only what the packing lets a token see.

A mask over a whole block of L tokens costs L² scores, most of them masked. Here every group of a block is computed by
itself: its shared beginning (p tokens) causally, then its S rows (at most n tokens each) as a batch whose keys are the
beginning and the row, S · n · (p + n) scores. The numbers are those of the masked computation.

It is an entry of transformers' attention table, so any model that looks its attention up there can use it; the layout
of the batch travels as a keyword of the forward call. Worth it where scores cost compute, on CPUs; a GPU prefers one
dense masked call to many small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quantlab.distill.data import Block

NAME = "quantlab_packed"


@dataclass(frozen=True)
class Group:
    """Rows with a common beginning, at ``start`` of its block: ``prefix`` tokens, then rows of ``lengths`` tokens."""

    start: int
    prefix: int
    lengths: tuple[int, ...]


Layout = tuple[tuple[Group, ...], ...]  # the groups of every block of a batch, in order and without gaps


def layout_of(blocks: Sequence[Block]) -> Layout:
    """How the tokens of every block are grouped."""
    return tuple(tuple(_groups(block)) for block in blocks)


def _groups(block: Block) -> list[Group]:
    found, start = [], 0
    for _, members in groupby(zip(block.groups, block.segments, strict=True), key=lambda pair: pair[0]):
        lengths = {s: len(list(run)) for s, run in groupby(members, key=lambda pair: pair[1])}
        prefix = lengths.pop(0, 0)
        found.append(Group(start, prefix, tuple(lengths.values())))
        start += prefix + sum(lengths.values())
    return found


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
    if torch.is_autocast_enabled(
        query.device.type
    ):  # positions were turned in float32; attention is not computed in it
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    length = query.shape[2]
    rows = []
    for number, groups in enumerate(packed_layout):
        q, k, v = query[number], key[number], value[number]  # [H, L, D]
        pieces = [_attend(q, k, v, group, scaling, dropout) for group in groups]
        used = sum(piece.shape[1] for piece in pieces)
        if used < length:  # padding of the block
            pieces.append(q.new_zeros(q.shape[0], length - used, v.shape[-1]))
        rows.append(torch.cat(pieces, dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous(), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, scale: float | None, dropout: float
) -> torch.Tensor:
    """One group of a block, from [H, L, D] to [H, p + Σ lengths, D]."""
    first, prefix, count = group.start, group.prefix, len(group.lengths)
    own, end = first + prefix, first + prefix + sum(group.lengths)

    def causal(part: slice) -> torch.Tensor:
        mask = torch.ones(part.stop - part.start, part.stop - part.start, dtype=torch.bool, device=q.device)
        return _masked(q[None, :, part], k[None, :, part], v[None, :, part], mask.tril_(), scale, dropout)[0]

    if count == 1:  # nothing is shared: one causal sequence
        return causal(slice(first, end))
    longest = max(group.lengths)
    sizes = torch.tensor(group.lengths, device=q.device)[:, None]  # [S, 1]
    steps = torch.arange(longest, device=q.device)[None]  # [1, n]
    held = steps < sizes  # [S, n]
    starts = own + torch.cat([sizes.new_zeros(1, 1), sizes.cumsum(0)[:-1]])
    index = torch.where(held, starts + steps, starts)  # padding repeats a token; causality keeps it unseen

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, index].transpose(0, 1)  # [S, H, n, D]

    def with_prefix(tensor: torch.Tensor) -> torch.Tensor:
        start = tensor[:, first:own].expand(count, -1, -1, -1)  # [S, H, p, D]
        return torch.cat([start, rows(tensor)], dim=2)

    mask = torch.ones(longest, prefix + longest, dtype=torch.bool, device=q.device).tril(prefix)
    found = _masked(rows(q), with_prefix(k), with_prefix(v), mask, scale, dropout)  # [S, H, n, D]
    flat = found.transpose(0, 1)[:, held]  # [H, Σ lengths, D]
    if not prefix:
        return flat
    return torch.cat([causal(slice(first, own)), flat], dim=1)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, dropout: float
) -> torch.Tensor:
    """Attention [S, H, n, D] over keys [S, H, m, D] under a mask [n, m].

    Two products and a softmax: for rows this short they take half the time of PyTorch's fused CPU kernel in bfloat16.
    """
    if q.dtype == torch.float32:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5) + hidden  # [S, H, n, m]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ v
