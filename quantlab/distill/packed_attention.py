"""Attention over packed blocks that computes only what the packing lets a token see.

A mask over a whole block of L tokens costs L² scores, most of them masked. Here the groups of a block are computed one
by one: the shared beginning (p tokens) causally; its rows, each against the beginning and causally against itself.
Rows of about the same length are computed together, padded to the longest of them, so a bucket of S rows of at most n
tokens costs S · n · (p + n) scores, and against the beginning all of them are one matrix product. Rows that share
nothing with others have p = 0 and are one group. The numbers are those of the masked computation.

It is an entry of transformers' attention table, so any model that looks its attention up there can use it; the layout
of the batch travels as a keyword of the forward call. Worth it where scores cost compute, on CPUs; a GPU prefers one
dense masked call to many small ones.

Forward and backward are written by hand. With scores S = q kᵀ / √D, weights P = softmax(S) and output O = P v, a
gradient G of O gives

    dv = Pᵀ G,  dP = G vᵀ,  dS = P ∘ (dP − rowsum(dP ∘ P)),  dq = dS k / √D,  dk = dSᵀ q / √D.

Autograd would arrive at the same, by way of a zeroed copy of all queries, keys and values for every piece that is cut
from them; here each piece's gradient is written where it belongs. Heads that share keys (grouped queries) are more
rows of the same products, so nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    # int64 [count · longest]: the token at each padded place; padding repeats a row's first
    index: torch.Tensor
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
    place = query.device.type
    if torch.is_autocast_enabled(place):  # positions were turned in float32; attention is not computed in it
        low = torch.get_autocast_dtype(place)
        query, key, value = query.to(low), key.to(low), value.to(low)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(place, enabled=False):
        return grouped_attention(query, key, value, packed_layout, scale, dropout), None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float = 0.0
) -> Tensor:
    """[B, H, L, D], [B, KV, L, D], [B, KV, L, E] → [B, L, H, E]; zero at tokens of no group."""
    out: Tensor = _Attention.apply(query, key, value, layout, scale, dropout)  # type: ignore[no-untyped-call]
    return out


class _Piece(NamedTuple):
    """What the backward of a beginning, or of a bucket of rows, needs: Q = R · n rows of queries a key head."""

    query: Tensor  # [KV, Q, D], scaled
    key: Tensor  # [KV · S, n, D]
    value: Tensor  # [KV · S, n, E]
    weights: Tensor  # [KV, Q, p + n]
    kept: Tensor | None  # of the weights, 0 or 1 / (1 − dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
    ) -> Tensor:
        heads, shared = query.shape[1], key.shape[1]
        repeat = heads // shared
        q = (query * scale).transpose(1, 2)  # token first: a piece is then whole rows of memory
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        out = v.new_zeros(*q.shape[:3], v.shape[-1])
        pieces: list[_Piece] = []
        for number, groups in enumerate(layout):
            for group in groups:
                begin = None
                if group.prefix:
                    span = slice(group.start, group.start + group.prefix)
                    begin = _attend(
                        _queries(q[number, span], shared, 1),
                        _keys(k[number, span], 1),
                        _keys(v[number, span], 1),
                        None,
                        dropout,
                    )
                    pieces.append(begin[0])
                    out[number, span] = _tokens(begin[1], 1, repeat)
                for rows in group.buckets:
                    piece, found = _attend(
                        _queries(q[number, rows.index], shared, rows.count),
                        _keys(k[number, rows.index], rows.count),
                        _keys(v[number, rows.index], rows.count),
                        begin[0] if begin else None,
                        dropout,
                    )
                    pieces.append(piece)
                    out[number].index_copy_(0, rows.tokens, _tokens(found, rows.count, repeat)[rows.places])
        ctx.pieces, ctx.layout, ctx.scale = pieces, layout, scale
        ctx.shapes = query.shape, key.shape, value.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (_, heads, _, _), (_, shared, _, _), _ = ctx.shapes
        repeat = heads // shared
        dq, dk, dv = (gradient.new_zeros(b, length, h, d) for b, h, length, d in ctx.shapes)
        pieces = iter(ctx.pieces)
        for number, groups in enumerate(ctx.layout):
            for group in groups:
                begin, begin_k, begin_v = None, None, None
                span = slice(group.start, group.start + group.prefix)
                if group.prefix:
                    begin = next(pieces)
                    own = _queries(gradient[number, span], shared, 1)
                    gq, begin_k, begin_v, _, _ = _differentiate(begin, own, None)
                    dq[number, span] = _tokens(gq, 1, repeat)
                for rows in group.buckets:
                    own = _queries(_padded(gradient[number], rows), shared, rows.count)
                    gq, gk, gv, more_k, more_v = _differentiate(next(pieces), own, begin)
                    if begin_k is not None and begin_v is not None:
                        begin_k += more_k
                        begin_v += more_v
                    for total, part in (
                        (dq, _tokens(gq, rows.count, repeat)),
                        (dk, _tokens(gk.reshape(shared, -1, gk.shape[-1]), rows.count, 1)),
                        (dv, _tokens(gv.reshape(shared, -1, gv.shape[-1]), rows.count, 1)),
                    ):
                        total[number].index_copy_(0, rows.tokens, part[rows.places])
                if begin_k is not None and begin_v is not None:
                    dk[number, span] = begin_k.transpose(0, 1)
                    dv[number, span] = begin_v.transpose(0, 1)
        dq *= ctx.scale
        return *(total.transpose(1, 2) for total in (dq, dk, dv)), None, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, begin: _Piece | None, dropout: float
) -> tuple[_Piece, Tensor]:
    """Queries [KV, Q, D] over the S rows of their own and over the beginning → what to keep, and [KV, Q, E]."""
    shared, many, width = query.shape
    batch, length, _ = key.shape  # KV · S, n
    own = query.reshape(batch, -1, width) @ key.transpose(1, 2)  # [KV · S, R · n, n]
    later = torch.full((length, length), -torch.inf, dtype=own.dtype, device=own.device).triu_(1)
    own.view(batch, -1, length, length).add_(later)
    scores = own.view(shared, many, length)
    if begin is not None:
        scores = torch.cat([query @ begin.key.transpose(1, 2), scores], dim=-1)
    weights = torch.softmax(scores, dim=-1)  # computed in float32 whatever the type
    kept = None
    if dropout:
        kept = torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout)
    piece = _Piece(query, key, value, weights, kept)
    before, inside = _split(weights if kept is None else weights * kept, batch, length)
    found = (inside @ value).view(shared, many, -1)
    if begin is not None:
        found += before @ begin.value
    return piece, found


def _differentiate(
    piece: _Piece, gradient: Tensor, begin: _Piece | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """From the output's gradient [KV, Q, E]: dq [KV, Q, D], dk and dv as the piece has them, dk and dv of the
    beginning [KV, p, ·]."""
    query, key, value, weights, kept = piece
    shared, many, width = query.shape
    batch, length, _ = key.shape
    own = gradient.reshape(batch, -1, gradient.shape[-1])
    towards = (own @ value.transpose(1, 2)).view(shared, many, length)
    if begin is not None:
        towards = torch.cat([gradient @ begin.value.transpose(1, 2), towards], dim=-1)
    if kept is not None:
        towards = towards * kept
    scores = torch._softmax_backward_data(towards, weights, -1, weights.dtype)
    score_before, score_inside = _split(scores, batch, length)
    before, inside = _split(weights if kept is None else weights * kept, batch, length)
    dq = (score_inside @ key).view(shared, many, width)
    dk = score_inside.transpose(1, 2) @ query.reshape(batch, -1, width)
    dv = inside.transpose(1, 2) @ own
    if begin is None:
        return dq, dk, dv, None, None
    dq += score_before @ begin.key
    return dq, dk, dv, score_before.transpose(1, 2) @ query, before.transpose(1, 2) @ gradient


def _split(scores: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """[KV, Q, p + n] → [KV, Q, p] and [KV · S, R · n, n]."""
    shared, many, keys = scores.shape
    inside = scores[..., keys - length :].reshape(batch, shared * many // batch, length)
    return scores[..., : keys - length], inside


def _queries(tokens: Tensor, shared: int, count: int) -> Tensor:
    """[S · n, H, D] → [KV, S · R · n, D]: of a key head the rows, of a row its R query heads, of a head its tokens."""
    total, heads, width = tokens.shape
    split = tokens.reshape(count, total // count, shared, heads // shared, width)
    return split.permute(2, 0, 3, 1, 4).reshape(shared, -1, width)


def _keys(tokens: Tensor, count: int) -> Tensor:
    """[S · n, KV, D] → [KV · S, n, D]."""
    total, shared, width = tokens.shape
    split = tokens.reshape(count, total // count, shared, width)
    return split.permute(2, 0, 1, 3).reshape(shared * count, -1, width)


def _tokens(values: Tensor, count: int, repeat: int) -> Tensor:
    """The way back: [KV, S · R · n, D] → [S · n, H, D]."""
    shared, many, width = values.shape
    split = values.reshape(shared, count, repeat, many // (count * repeat), width)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, shared * repeat, width)


def _padded(tokens: Tensor, rows: Rows) -> Tensor:
    """A gradient [L, H, E] at the places of a bucket, zero where it is padded: what repeats a token adds nothing."""
    found = tokens.new_zeros(rows.count * rows.longest, *tokens.shape[1:])
    return found.index_copy_(0, rows.places, tokens[rows.tokens])
