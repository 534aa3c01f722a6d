"""WikiSQL (Zhong et al. 2017): questions on single web tables, the query given as a structure.

As it is unpacked: `dev.jsonl` (`table_id`, `question`, `sql: {sel, agg, conds}`, `phase`), `dev.tables.jsonl` (`id`,
`header`, `types`, `rows`) and `dev.db`, one SQLite file in which table `1-10007452-3` is `table_1_10007452_3` and its
columns are `col0`, `col1`, …, so the headers go into the DDL as comments. All text in the file is lower case.

The structure is written out as SQL that does what the published `dbengine` does: text is lowered, and what is
compared with a number column is read as a number (`1,000` is 1000; else the first number in it). Where that tool
goes wrong and SQL does not have to: of two conditions on one column it binds the last value to both.

    wikisql:/data/WikiSQL/data[:dev|test|train], dev when left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.benchmarks.base import Benchmark, RawRow
from quantlab.text2sql.data.benchmarks.files import jsonl_rows, split_source, take_mapping, take_text
from quantlab.text2sql.data.benchmarks.schemas import Schemas
from quantlab.text2sql.data.item import Item, parse_row

SPLITS = ("dev", "test", "train")
AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
FORM = "wikisql:/path/to/WikiSQL/data[:dev|test|train]"
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_GROUPED = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[-+]?\.\d+")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def load(rest: str, schemas: Schemas) -> Benchmark:
    """The rows of a split. DataError where one of its three files is missing or bad."""
    path, split = split_source(rest, SPLITS, FORM)
    if path.is_file():
        folder, split = path.parent, path.name.removesuffix(".jsonl")
    else:
        folder, split = path, split or "dev"
        if not (folder / f"{split}.jsonl").is_file() and (folder / "data").is_dir():
            folder = folder / "data"
    questions, tables, database = (folder / f"{split}{end}" for end in (".jsonl", ".tables.jsonl", ".db"))
    for file in (questions, tables, database):
        if not file.is_file():
            raise DataError(
                f"no {file}", hint="tar xvjf data.tar.bz2 gives dev.jsonl, dev.tables.jsonl and dev.db"
            )
    headers = {str(values["id"]): values for values in map(_table, jsonl_rows(tables))}
    return Benchmark(str(questions), jsonl_rows(questions), _Reader(split, headers, database, schemas).read)


class _Reader:
    def __init__(
        self, split: str, headers: Mapping[str, Mapping[str, Any]], database: Path, schemas: Schemas
    ) -> None:
        self.split, self.headers, self.database, self.schemas = split, headers, database, schemas

    def read(self, row: RawRow) -> Item:
        values = take_mapping(row)
        key = take_text(row, "table_id")
        table = self.headers.get(key)
        if table is None:
            raise DataError(f"{row.where}: table {key[:80]!r} is not in the tables file")
        name = key if key.startswith("table") else f"table_{key.replace('-', '_')}"
        if name not in self.schemas.tables(self.database):
            raise DataError(f"{row.where}: no table {name[:80]} in {self.database}")
        header, types = table["header"], table["types"]
        columns = [
            f"  col{number} {'REAL' if kind == 'real' else 'TEXT'}{',' if number + 1 < len(types) else ''}"
            f" -- {' '.join(str(title).split())[:200]}"
            for number, (title, kind) in enumerate(zip(header, types, strict=True))
        ]
        item: dict[str, Any] = {
            "id": row.id,
            "db_id": name,
            "context": f"CREATE TABLE {name} (\n" + "\n".join(columns) + "\n);",
            "question": take_text(row, "question"),
            "answer": write_query(values.get("sql"), name, types, row.where),
            "database": str(self.database),
            "dialect": "sqlite",
            "benchmark": "wikisql",
            "split": self.split,
            "header": tuple(str(title) for title in header),
        }
        return parse_row(item, row.where)


def write_query(query: Any, table: str, types: list[str], where: str) -> str:
    """`{"sel": 1, "agg": 3, "conds": [[0, 0, "1998"]]}` → `SELECT COUNT(col1) FROM table WHERE col0 = '1998'`."""
    if not isinstance(query, Mapping):
        raise DataError(f"{where}: 'sql' must be an object with sel, agg and conds")
    column = f"col{_index(query.get('sel'), len(types), 'sel', where)}"
    aggregate = AGGREGATES[_index(query.get("agg"), len(AGGREGATES), "agg", where)]
    conditions = query.get("conds")
    if not isinstance(conditions, list) or not all(isinstance(c, list) and len(c) == 3 for c in conditions):
        raise DataError(f"{where}: 'conds' must be a list of [column, operator, value]")
    words = []
    for left, operator, value in conditions:
        number = _index(left, len(types), "column of a condition", where)
        sign = OPERATORS[_index(operator, len(OPERATORS), "operator of a condition", where)]
        words.append(f"col{number} {sign} {_literal(value, types[number], where)}")
    selected = f"{aggregate}({column})" if aggregate else column
    return f"SELECT {selected} FROM {table}" + (" WHERE " + " AND ".join(words) if words else "")


def _literal(value: Any, kind: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise DataError(f"{where}: the value of a condition must be text or a number, found {value!r:.80}")
    if isinstance(value, str) and kind == "real":
        value = _number(value, where)
    if isinstance(value, str):
        return "'" + value.lower().replace("'", "''").replace("\x00", "") + "'"
    if value != value or value in (float("inf"), float("-inf")):
        raise DataError(f"{where}: {value} is no value of a column")
    return repr(value)


def _number(text: str, where: str) -> float:
    if _GROUPED.fullmatch(text.strip()):
        return float(text.replace(",", ""))
    found = _NUMBER.search(text)
    if found is None:
        raise DataError(f"{where}: a number column is compared with {text[:80]!r}, which holds no number")
    return float(found.group())


def _index(value: Any, size: int, what: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise DataError(f"{where}: {what} must be a number from 0 to {size - 1}, found {value!r:.80}")
    return value


def _table(row: RawRow) -> Mapping[str, Any]:
    values = take_mapping(row)
    if not _ID.fullmatch(take_text(row, "id")):
        raise DataError(f"{row.where}: 'id' must be letters, digits and hyphens")
    header, types = values.get("header"), values.get("types")
    if (
        not isinstance(header, list)
        or not isinstance(types, list)
        or not 0 < len(header) == len(types) <= 2000
    ):
        raise DataError(f"{row.where}: 'header' and 'types' must be lists of the same length")
    return {"id": values["id"], "header": header, "types": [str(kind) for kind in types]}
