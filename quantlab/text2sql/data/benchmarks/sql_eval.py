"""defog's sql-eval: questions in CSV files, several queries accepted for one question.

Columns: `db_name`, `query_category`, `question`, `query`, often `instructions` (a hint; others as they come). A
gold is PostgreSQL unless `db_type` or the file's name (`questions_gen_mysql.csv`) says otherwise. It may be several
queries with semicolons between them, and `{a, b}` in it stands for any of its columns, one at least; `{}` later
on, after GROUP BY, for the same choice. Every reading becomes an accepted query, in the order that sql-eval tries
them; of more than `MAX_GOLDS` readings the row is refused. The text as written stays in `extra["query"]`.

Databases are SQLite files `<db_name>.sqlite`, alone or in a folder of that name, in `database/` beside the CSV
file or in the folder given. A folder with defog-data's dumps (`<db_name>/<db_name>.sql`) gives the DDL but no
database.

    sql-eval:/path/questions_gen_postgres.csv[:databases=DIR]
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.benchmarks.base import Benchmark, RawRow
from quantlab.text2sql.data.benchmarks.files import (
    csv_rows,
    read_text,
    split_source,
    take_mapping,
    take_text,
    tried,
)
from quantlab.text2sql.data.benchmarks.schemas import (
    Schemas,
    create_statements,
    find_database,
    find_dump,
    safe_name,
)
from quantlab.text2sql.data.item import Item, parse_row

MAX_GOLDS = 128
DIALECTS = ("postgres", "mysql", "sqlite", "tsql", "bigquery", "snowflake")
FORM = "sql-eval:/path/to/questions_gen_postgres.csv[:databases=DIR]"
_EXTRA = ("query_category", "instructions", "full_instructions", "glossary")
# Quotes hide semicolons and braces; a doubled quote is two quoted texts in a row, which changes nothing here.
_TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*|/\*.*?(?:\*/|\Z)|[{};]|[^'\"{};/-]+|.", re.DOTALL)


def load(rest: str, schemas: Schemas) -> Benchmark:
    """The rows of one file. DataError where it or the folder of databases is missing."""
    rest, option, given = rest.partition(":databases=")
    path, _ = split_source(rest, (), FORM)
    if not path.is_file():
        raise DataError(f"{path} is a folder", hint=f"name the CSV file: {FORM}")
    folders = [path.parent / name for name in ("database", "databases")]
    if option:
        folders = [Path(given).expanduser()]
        if not given or not folders[0].is_dir():
            raise DataError(f"databases={given}: no such folder", hint=f"form: {FORM}")
    return Benchmark(str(path), csv_rows(path), _Reader(path, folders, schemas).read)


class _Reader:
    def __init__(self, path: Path, folders: list[Path], schemas: Schemas) -> None:
        self.folders, self.schemas = folders, schemas
        self.dialect = next((name for name in DIALECTS if path.stem.lower().endswith(f"_{name}")), "postgres")
        self._dumped: dict[Path, str] = {}

    def read(self, row: RawRow) -> Item:
        values = take_mapping(row)
        name = safe_name(values.get("db_name"), row, "db_name")
        dump = find_dump(self.folders, name)
        try:
            database: Path | None = find_database(self.folders, name, row)
        except DataError:
            if dump is None:
                raise
            database = None
        written = take_text(row, "query")
        golds = expand(written, row.where)
        dialect = take_text(row, "db_type", empty=True).strip().lower() or self.dialect
        # Excel left #NAME? in place of hints that begin with a sign.
        hint = take_text(row, "instructions", empty=True).strip()
        hint = "" if hint == "#NAME?" else hint
        item: dict[str, Any] = {
            "id": row.id,
            "db_id": name,
            "context": self._ddl(database, dump),
            "question": take_text(row, "question"),
            "answer": golds[0],
            "alternatives": golds[1:],
            "database": None if database is None else str(database),
            "benchmark": "sql-eval",
            "query": written,
            "evidence": hint,
            **{key: values[key] for key in _EXTRA if isinstance(values.get(key), str)},
        }
        read = parse_row(item | {"dialect": dialect}, row.where)
        return replace(read, extra={**read.extra, "dialect": read.dialect})

    def _ddl(self, database: Path | None, dump: Path | None) -> str:
        if database is not None:
            return self.schemas.ddl(database)
        assert dump is not None
        if dump not in self._dumped:
            statements = create_statements(read_text(dump))
            if not statements:
                raise DataError(f"{dump}: no CREATE TABLE statement ({tried(self.folders)} for SQLite files)")
            self._dumped[dump] = "\n".join(statements)
        return self._dumped[dump]


def expand(query: str, where: str = "gold", limit: int = MAX_GOLDS) -> list[str]:
    """Every query that a gold stands for: its parts at semicolons, each with every choice of optional columns.

    DataError where there is none, or more than `limit`, or a brace without its other half.
    """
    golds: list[str] = []
    for part in _parts(query):
        golds += _choices(part, where, limit - len(golds))
    if not golds:
        raise DataError(f"{where}: 'query' holds no query")
    return list(dict.fromkeys(golds))


def _parts(query: str) -> list[list[str]]:
    """The tokens of each query between semicolons that stand in no quotes; empty queries are left out."""
    parts: list[list[str]] = [[]]
    for token in _TOKEN.findall(query):
        if token == ";":
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if "".join(part).strip()]


def _choices(tokens: list[str], where: str, limit: int) -> list[str]:
    """One query's readings. Its first pair of braces that is not empty names the columns to choose from."""
    braces = "".join(token for token in tokens if token in ("{", "}"))
    if braces.replace("{}", ""):
        raise DataError(f"{where}: braces do not match in {''.join(tokens)[:80]!r}")
    start = next((i for i, token in enumerate(tokens) if token == "{" and tokens[i + 1] != "}"), None)
    if start is None:
        if "{" in tokens:
            raise DataError(f"{where}: {{}} stands for columns that no braces name")
        return _bounded(["".join(tokens).strip()], where, limit)
    end = tokens.index("}", start)
    columns = _columns("".join(tokens[start + 1 : end]))
    if 2 ** len(columns) - 1 > limit:
        raise DataError(f"{where}: more than {MAX_GOLDS} accepted queries ({len(columns)} optional columns)")
    found: list[str] = []
    for size in range(1, len(columns) + 1):
        for chosen in combinations(columns, size):
            rest = _fill(tokens[end + 1 :], ", ".join(chosen))
            found += _choices([*tokens[:start], ", ".join(chosen), *rest], where, limit - len(found))
    return found


def _columns(text: str) -> list[str]:
    """The expressions between braces, split at commas that stand in no parentheses."""
    columns, depth = [""], 0
    for token in re.findall(r"'[^']*'|\"[^\"]*\"|.", text, re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token == "," and depth == 0:
            columns.append("")
        else:
            columns[-1] += token
    return [column.strip() for column in columns if column.strip()]


def _fill(tokens: list[str], columns: str) -> list[str]:
    """`tokens` with the columns in place of each `{}`."""
    filled: list[str] = []
    for token in tokens:
        if token == "}" and filled and filled[-1] == "{":
            filled[-1] = columns
        else:
            filled.append(token)
    return filled


def _bounded(golds: list[str], where: str, limit: int) -> list[str]:
    if len(golds) > limit:
        raise DataError(f"{where}: more than {MAX_GOLDS} accepted queries")
    return golds
