"""What stands behind the DDL in a prompt: lines that say what columns mean, and which values they hold.

Descriptions come from a row's own `descriptions` (`{"table.column": "text"}` or `{"table": {"column": "text"}}`), else
from the CSV files that BIRD keeps beside its databases (`database_description/<table>.csv` with the columns
`original_column_name`, `column_name`, `column_description`, `value_description`). Values are the first distinct ones of
a column, looked for in its table's first `SCANNED` rows, asked through the sandbox.

Both are somebody's data. Each is one comment line: line breaks and control characters become blanks, texts are quoted
as in SQL, and everything has a length and a number that it does not exceed. Only tables that the row's DDL defines are
described, so that a linker that leaves a table out leaves its lines out too."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item, Note
from quantlab.text2sql.prompt.template import Template, fill
from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.schema.name_check import known_names

FOLDER = "database_description"
SCANNED = 10_000  # rows
MAX_VALUE = 60  # characters
MAX_DESCRIPTION = 300
MAX_NAME = 100
MAX_LINES = 500  # for one row
MAX_FILE = 2**20  # bytes of a CSV file

Columns = Mapping[str, Sequence[str]]  # table as written → its columns as written
Described = Mapping[tuple[str, str], str]  # (table, column), lower case → what it means


def annotate(items: Sequence[Item], template: Template, *, values: int, descriptions: bool) -> list[Item]:
    """The items with their notes, as `template` writes them: up to `values` values of each column, descriptions.

    Raises:
        DataError: a row's `descriptions` are no such mapping, or a CSV file lacks its columns.
    """
    if not values and not descriptions:
        return list(items)
    beside: dict[Path, Described] = {}
    with _Values(values) as found:
        return [replace(item, notes=_notes(item, template, found, descriptions, beside)) for item in items]


def _notes(
    item: Item, template: Template, values: _Values, descriptions: bool, beside: dict[Path, Described]
) -> tuple[Note, ...]:
    meaning: Described = {}
    if descriptions:
        meaning = own_descriptions(item) or _beside(item.database, beside)
    lines = []
    for table, columns in tables_of(item.context).items():
        for column in columns:
            key = (table.lower(), column.lower())
            names = {"table": one_line(table, MAX_NAME), "column": one_line(column, MAX_NAME)}
            if meaning.get(key):
                lines.append(Note(table, fill(template.description, **names, description=meaning[key])))
            if shown := values.of(item.database, table, column):
                lines.append(Note(table, fill(template.values, **names, values=shown)))
    return tuple(lines[:MAX_LINES])


def tables_of(context: str) -> Columns:
    """Table → columns of DDL, in its order; empty where no dialect reads it."""
    known = known_names(context)
    if known is None:
        return {}
    return {name: list(columns.values()) for name, columns in known.tables.values() if columns}


def own_descriptions(item: Item) -> Described:
    """What the row's `descriptions` say. DataError for anything but names and texts."""
    given = item.extra.get("descriptions")
    found: dict[tuple[str, str], str] = {}
    if given is None:
        return found
    if not isinstance(given, Mapping):
        raise _no_descriptions(item, f"found {type(given).__name__}")
    for name, text in given.items():
        if isinstance(text, Mapping):
            pairs: list[tuple[str, str, Any]] = [(name, column, said) for column, said in text.items()]
        else:
            table, dot, column = name.partition(".")
            if not dot:
                raise _no_descriptions(item, f"{name!r} names no column")
            pairs = [(table, column, text)]
        for table, column, said in pairs:
            if not isinstance(said, str):
                raise _no_descriptions(item, f"{table}.{column} is {type(said).__name__}")
            found[table.lower(), column.lower()] = one_line(said, MAX_DESCRIPTION)
    return found


def _no_descriptions(item: Item, why: str) -> DataError:
    return DataError(
        f"row {item.id}: 'descriptions' must map columns to texts: {why}",
        hint='as in {"players.hp": "hit points"} or {"players": {"hp": "hit points"}}',
    )


def _beside(database: Path | None, known: dict[Path, Described]) -> Described:
    if database is None:
        return {}
    folder = database.parent / FOLDER
    if folder not in known:
        found: dict[tuple[str, str], str] = {}
        for path in sorted(folder.glob("*.csv"))[:MAX_LINES] if folder.is_dir() else []:
            found |= read_descriptions(path)
        known[folder] = found
    return known[folder]


def read_descriptions(path: Path) -> dict[tuple[str, str], str]:
    """A CSV file of BIRD: what the columns of the table that it is called after mean. DataError for another file."""
    if path.stat().st_size > MAX_FILE:
        raise DataError(f"{path}: more than {MAX_FILE:,} bytes; it describes the columns of a table")
    # Some of the published files are in an encoding of Windows: a dash more or less, in text for people.
    text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\0", "")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "original_column_name" not in (reader.fieldnames or ()):
            raise DataError(
                f"{path}:1: no column 'original_column_name'", hint="the form of BIRD's database_description"
            )
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: no CSV: {error}") from error
    found = {}
    for row in rows:
        name = (row.get("original_column_name") or "").strip()
        parts = [
            one_line(row.get(key) or "", MAX_DESCRIPTION) for key in ("column_name", "column_description")
        ]
        said = " — ".join(dict.fromkeys(part for part in parts if part and part.lower() != name.lower()))
        if meaning := one_line(row.get("value_description") or "", MAX_DESCRIPTION):
            said = f"{said} ({meaning})" if said else meaning
        if name and said:
            found[path.stem.lower(), name.lower()] = one_line(said, MAX_DESCRIPTION)
    return found


class _Values:
    """Distinct values of columns, each column asked once; a context manager, since it holds a worker process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._known: dict[tuple[Path, str, str], str] = {}
        self._sandbox: Sandbox | None = None

    def __enter__(self) -> _Values:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sandbox is not None:
            self._sandbox.close()

    def of(self, database: Path | None, table: str, column: str) -> str:
        """Up to `count` values, quoted, with commas between them; "" where there are none or they cannot be read."""
        if not self.count or database is None:
            return ""
        key = (database, table.lower(), column.lower())
        if key not in self._known:
            self._known[key] = ", ".join(self._ask(database, table, column))
        return self._known[key]

    def _ask(self, database: Path, table: str, column: str) -> list[str]:
        if self._sandbox is None:
            self._sandbox = Sandbox(Limits(seconds=10.0))
        # Qualified: a bare name in double quotes that no column has is a text to SQLite.
        query = (
            f"SELECT DISTINCT value FROM (SELECT t.{_quoted(column)} AS value FROM {_quoted(table)} AS t "
            f"LIMIT {SCANNED}) WHERE value IS NOT NULL LIMIT {self.count}"
        )
        found = self._sandbox.run(database, query, role="gold")
        return [literal(row[0]) for row in found.rows if not isinstance(row[0], bytes)]


def literal(value: Any) -> str:
    """A value as SQL writes it, on one line, of at most `MAX_VALUE` characters."""
    if isinstance(value, int | float):
        return repr(value)
    return "'" + one_line(str(value), MAX_VALUE).replace("'", "''") + "'"


def one_line(text: str, most: int) -> str:
    """`text` on one line without control characters, its blanks single, cut to `most` characters."""
    shown = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text[: 20 * most])
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
