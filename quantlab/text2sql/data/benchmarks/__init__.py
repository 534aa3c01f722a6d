"""Published Text2SQL benchmarks as users have them on disk, read into `quantlab.text2sql.data.dataset.Item`.

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

from typing import TYPE_CHECKING

from quantlab import registry
from quantlab.text2sql.data.benchmarks.base import Benchmark

if TYPE_CHECKING:
    from quantlab.text2sql.data.benchmarks.schemas import Schemas

ADAPTERS: dict[str, str] = {
    "spider": "quantlab.text2sql.data.benchmarks.spider:load",
    "bird": "quantlab.text2sql.data.benchmarks.bird:load",
    "wikisql": "quantlab.text2sql.data.benchmarks.wikisql:load",
    "sql-eval": "quantlab.text2sql.data.benchmarks.sql_eval:load",
    "ko_text2sql": "quantlab.text2sql.data.benchmarks.ko_text2sql:load",
}


def load(name: str, rest: str, schemas: Schemas) -> Benchmark:
    """The benchmark of an adapter in `ADAPTERS`; DataError where its files are missing or bad."""
    benchmark: Benchmark = registry.load(ADAPTERS[name])(rest, schemas)
    return benchmark
