"""What an adapter answers with: rows as they stand on disk, and a function that makes an Item of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from quantlab.text2sql.data.item import Item


@dataclass(frozen=True)
class RawRow:
    """One row as it stands on disk; `where` ("file:line" or "file:row 7") opens every complaint about it."""

    where: str
    id: str
    value: Any


@dataclass(frozen=True)
class Benchmark:
    """`read` makes an Item of a row, or raises DataError. `id_of` tells a row's id as the benchmark has it, which need
    not be the row's alone, at no cost and of any row."""

    name: str
    rows: Sequence[RawRow]
    read: Callable[[RawRow], Item]
    id_of: Callable[[RawRow], str] = attrgetter("id")
