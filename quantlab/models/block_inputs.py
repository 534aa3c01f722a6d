"""What decoder blocks are called with besides their hidden states, recorded and handed back to any rows.

Most of it is the same for every row: rotary tables, masks, positions. Some is the same but wanted once for each row
(BLOOM's biases, one for each head of each row), some is a row's own (Gemma's per-layer embeddings). Which is which is
told from three calls: with one row, with another, and with both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Dependent(Exception):
    """Something depends on the tokens in a way that cannot be followed."""


@dataclass
class Repeated:
    """A tensor [k, ...] that a call with n rows gets as [n k, ...], the same for every row."""

    one: torch.Tensor

    def of(self, rows: slice | None, count: int) -> torch.Tensor:
        if len(self.one) == 1:
            return self.one.expand(count, *self.one.shape[1:])
        return self.one.repeat(count, *[1] * (self.one.dim() - 1))


@dataclass
class PerRow:
    """A tensor [rows, ...] of which each row has its own part."""

    values: torch.Tensor

    def of(self, rows: slice | None, count: int) -> torch.Tensor:
        if rows is not None:
            return self.values[rows]
        return self.values[torch.arange(count, device=self.values.device) % len(self.values)]


@dataclass
class BlockInputs:
    """Arguments of a block besides its hidden states; in place of a tensor there may be a rule how to have it for some
    rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, count: int, rows: slice | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For a call with ``count`` rows. ``rows``: which of those recorded; None for the first ones, over again where
        there are more."""

        def made(value: Any) -> Any:
            return value.of(rows, count) if isinstance(value, Repeated | PerRow) else value

        return _mapped(made, self.args), _mapped(made, self.kwargs)

    @property
    def own(self) -> list[PerRow]:
        """Whatever is each row's own, in a fixed order."""
        found: list[PerRow] = []

        def seen(value: Any) -> Any:
            if isinstance(value, PerRow):
                found.append(value)
            return value

        _mapped(seen, (self.args, self.kwargs))
        return found


def record(first: Sequence[Any], second: Sequence[Any], both: Sequence[Any]) -> list[BlockInputs]:
    """The inputs of blocks from their recorded calls ``(args, kwargs)``: of one row, of another, and of both together.

    Tensors of equal content are kept once, however many blocks get a copy of their own.

    Raises:
        Dependent: a tensor differs between the rows, and is not one part for each.
    """
    kept: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def once(value: torch.Tensor) -> torch.Tensor:
        same = kept.setdefault((value.shape, value.dtype, value.device), [])
        for known in same:
            if known is value or torch.equal(known, value):
                return known
        same.append(value)
        return value

    def rule(one: Any, other: Any, together: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        if (
            not isinstance(other, torch.Tensor)
            or not isinstance(together, torch.Tensor)
            or one.shape != other.shape
        ):
            raise Dependent
        alike = torch.equal(one, other)
        if together.shape == one.shape:
            if not alike:
                raise Dependent
            return once(one)
        if not one.dim() or together.shape[0] != 2 * one.shape[0] or together.shape[1:] != one.shape[1:]:
            raise Dependent
        return Repeated(once(one)) if alike else PerRow(together)

    if not len(first) == len(second) == len(both):
        raise Dependent
    found = [_mapped(rule, *calls) for calls in zip(first, second, both, strict=True)]
    return [BlockInputs(args, kwargs) for args, kwargs in found]


def _mapped(rule: Callable[..., Any], *values: Any) -> Any:
    """A structure of tuples, lists and dictionaries with every leaf replaced by what ``rule`` makes of it."""
    one = values[0]
    if type(one) is dict:
        if any(type(v) is not dict or v.keys() != one.keys() for v in values):
            raise Dependent
        return {key: _mapped(rule, *(v[key] for v in values)) for key in one}
    if type(one) in (tuple, list):
        if any(type(v) is not type(one) or len(v) != len(one) for v in values):
            raise Dependent
        return type(one)(_mapped(rule, *parts) for parts in zip(*values, strict=True))
    return rule(*values)
