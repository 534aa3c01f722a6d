"""`shangrilar/ko_text2sql`, the data of the book: Korean questions on tables that come as MySQL-flavoured DDL.

Columns `db_id` (a number), `context` (DDL), `question`, `answer`. There are no databases: execution needs witness
databases. Read from a CSV, JSON Lines, JSON or parquet file, from a folder that holds the files of the dataset
repository (`test.csv`, `data/test-00000-of-00001.parquet`, `origin/…`), or from the hub or its local cache.
Columns that pandas leaves behind (its index) are dropped. A row without an answer, of which the training split
has some, is a DataError that names it.

    ko_text2sql:/path/test.csv, or a bundled file: ko_text2sql:ko_text2sql/test_book_columns.csv
    ko_text2sql:/path/ko_text2sql[:test|train]
    ko_text2sql:hf:shangrilar/ko_text2sql/origin:test

`ko_text2sql:test`, `:dev` and `:train` are not this dataset but the ones that quantlab brings along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.paths import DATA
from quantlab.text2sql.data.benchmarks.base import Benchmark, RawRow
from quantlab.text2sql.data.benchmarks.files import read_rows, split_source, take_mapping, take_text
from quantlab.text2sql.data.benchmarks.schemas import Schemas
from quantlab.text2sql.data.hub import hub_rows
from quantlab.text2sql.data.item import Item, parse_row

SPLITS = ("test", "train", "validation")
SUFFIXES = (".parquet", ".jsonl", ".csv", ".json")
INNER = ("", "data", "origin", "clean")
FORM = "ko_text2sql:/path/file.csv, ko_text2sql:/path/folder[:test|train] or ko_text2sql:hf:owner/name/config:test"
_INDEX = ("", "Unnamed: 0", "__index_level_0__")


def load(rest: str, schemas: Schemas) -> Benchmark:
    """The rows of a file, of a split in a folder, or of a split on the hub."""
    if rest.startswith("hf:"):
        found = [
            RawRow(where, str(number), row) for number, (where, row) in enumerate(hub_rows(rest), start=1)
        ]
        return Benchmark(rest, found, read)
    bundled = DATA / rest
    if rest and not Path(rest).expanduser().exists() and bundled.is_file():
        rest = str(bundled)
    path, split = split_source(rest, SPLITS, FORM)
    rows: list[RawRow] = []
    for file in [path] if path.is_file() else _files(path, split or "test"):
        rows += read_rows(file, first=len(rows) + 1)
    return Benchmark(str(path), rows, read)


def read(row: RawRow) -> Item:
    """One row as an Item, its dialect MySQL."""
    values = take_mapping(row)
    number = values.get("db_id")
    if isinstance(number, float) and number.is_integer():  # a column with gaps comes out of pandas as floats
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise DataError(f"{row.where}: 'db_id' must be a number or a name, found {number!r:.80}")
    known = {name: take_text(row, name) for name in ("context", "question", "answer")}
    extra = {
        key: value
        for key, value in values.items()
        if key not in _INDEX and not str(key).startswith("Unnamed")
    }
    item: dict[str, Any] = {
        **extra,
        **known,
        "id": row.id,
        "db_id": number,
        "dialect": "mysql",
        "benchmark": "ko_text2sql",
    }
    item.pop("database", None)  # the dataset has none; a column of that name must not point anywhere
    return parse_row(item, row.where)


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split: the first place and kind of which there is one, all its shards."""
    for inner in INNER:
        for suffix in SUFFIXES:
            found = sorted(
                file
                for file in (folder / inner).glob(f"{split}*{suffix}")
                if file.is_file()
                and file.name.removesuffix(suffix).removeprefix(split)[:1] in ("", "-", "_", ".")
            )
            if found:
                return found
    places = ", ".join(str(folder / inner) for inner in INNER)
    kinds = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise DataError(f"no {split} rows of ko_text2sql: looked for {kinds} in {places}", hint=f"form: {FORM}")
