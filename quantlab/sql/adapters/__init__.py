"""Published Text2SQL benchmarks as users have them on disk, read into `quantlab.sql.dataset.Item`.

    spider:/data/spider[:dev|train|test]        bird:/data/minidev[:mini_dev|dev|train|…]
    wikisql:/data/WikiSQL/data[:dev|test|train] sql-eval:/data/questions_gen_postgres.csv[:databases=DIR]
    ko_text2sql:/data/ko_text2sql[:test|train], ko_text2sql:FILE, ko_text2sql:hf:shangrilar/ko_text2sql/origin:test

An adapter is one file and one line in `ADAPTERS`. It is a function

    def load(rest: str, schemas: Schemas) -> Benchmark

that is given what follows the benchmark's name, and answers with the rows as they stand on disk and a function
that makes an Item of one of them, so that only the rows asked for cost anything.

Not covered: downloading, and building databases from dumps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlab.sql.adapters.schemas import Schemas
    from quantlab.sql.dataset import Item

ADAPTERS: dict[str, str] = {
    "spider": "quantlab.sql.adapters.spider:load",
    "bird": "quantlab.sql.adapters.bird:load",
    "wikisql": "quantlab.sql.adapters.wikisql:load",
    "sql-eval": "quantlab.sql.adapters.sql_eval:load",
    "ko_text2sql": "quantlab.sql.adapters.ko_text2sql:load",
}


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


def load(name: str, rest: str, schemas: Schemas) -> Benchmark:
    """The benchmark of an adapter in `ADAPTERS`; DataError where its files are missing or bad."""
    module, _, function = ADAPTERS[name].partition(":")
    benchmark: Benchmark = getattr(import_module(module), function)(rest, schemas)
    return benchmark
