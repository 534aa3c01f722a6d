"""One Text2SQL row as an ``Item``: its columns, checked, with what is wrong and where.

The columns are those of the book's `shangrilar/ko_text2sql`: `{db_id, context (DDL), question, answer (SQL)}`.
`database` names a SQLite file (relative to the JSONL file) that gold and prediction run on, `alternatives` are other
accepted queries, `dialect` is what the golds are written in (sqlite, mysql, postgres, …; unknown when left out),
`evidence` is what one must know to understand the question (BIRD's external knowledge; every prompt shows it), `id`
defaults to the row's number. The bundled training rows leave `context` out; it is filled from their domain's DDL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from quantlab.errors import DataError

_REQUIRED = ("db_id", "question", "answer")


_KNOWN = frozenset({*_REQUIRED, "id", "context", "database", "alternatives", "dialect", "schema_notes"})


_ALIASES = {"postgresql": "postgres", "mariadb": "mysql", "sqlite3": "sqlite"}


class Note(NamedTuple):
    """A line that stands behind the DDL in a prompt, about one table: what a column means, which values it holds."""

    table: str
    line: str


@dataclass(frozen=True)
class Item:
    """One question. `extra` holds the row's other columns (db, tables, level, kind, …); `notes` is filled where a
    prompt is to show more of the schema than its DDL."""

    id: str
    db_id: str
    context: str
    question: str
    answer: str
    database: Path | None = None
    alternatives: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""  # of the golds, "" when unknown
    notes: tuple[Note, ...] = ()
    shared_id: str = ""  # the id that the data give to this row and to others, "" where it is the row's alone

    @property
    def golds(self) -> tuple[str, ...]:
        return (self.answer, *self.alternatives)

    @property
    def evidence(self) -> str:
        """What one must know to understand the question, without surrounding blanks; "" where there is nothing."""
        found = self.extra.get("evidence")
        return found.strip() if isinstance(found, str) else ""


@dataclass(frozen=True)
class BadRow:
    """A row that is no Item; `where` is "file:line"."""

    where: str
    reason: str


def parse_row(row: Any, where: str, folder: Path | None = None) -> Item:
    """One row as an Item; `where` ("file:line") opens every complaint."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    for name in _REQUIRED:
        if name not in row:
            raise DataError(f"{where}: no {name!r}", hint=f"the columns are {', '.join(row) or 'none'}")
    for name in ("question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where}: {name!r} must be text that is not empty")
    if not isinstance(row["db_id"], int | str):
        raise DataError(f"{where}: 'db_id' must be a number or a name")
    alternatives = row.get("alternatives") or ()
    if not isinstance(alternatives, list | tuple) or not all(isinstance(sql, str) for sql in alternatives):
        raise DataError(f"{where}: 'alternatives' must be a list of queries")
    check_evidence(row.get("evidence"), where)
    dialect = row.get("dialect") or ""
    if not isinstance(dialect, str):
        raise DataError(f"{where}: 'dialect' must be a name such as sqlite, mysql or postgres")
    return Item(
        id=_id_of(row, where),
        db_id=str(row["db_id"]),
        context=_context(row, where),
        question=row["question"],
        answer=row["answer"],
        database=_database(row, where, folder),
        alternatives=tuple(alternatives),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
        dialect=_ALIASES.get(dialect.strip().lower(), dialect.strip().lower()),
        notes=_notes(row.get("schema_notes"), where),
    )


def _notes(found: Any, where: str) -> tuple[Note, ...]:
    """As prepared rows keep them: a list of [table, line]."""
    pairs = found or []
    shaped = isinstance(pairs, list) and all(isinstance(one, list) and len(one) == 2 for one in pairs)
    if not shaped or not all(isinstance(text, str) and "\n" not in text for one in pairs for text in one):
        raise DataError(f"{where}: 'schema_notes' must be a list of [table, line]")
    return tuple(Note(*one) for one in pairs)


def _id_of(row: Any, where: str) -> str:
    """A row's id: the one it has, else the number it stands at."""
    named = row.get("id") if isinstance(row, Mapping) else None
    return str(named) if named is not None else where.rpartition(":")[2]


def check_evidence(found: Any, where: str) -> None:
    """It is text, blank text, null, or not there."""
    if found is None or isinstance(found, str):
        return
    kinds = {list: "a list", dict: "an object", bool: "true or false"}
    raise DataError(
        f"{where}: 'evidence' must be text, found {kinds.get(type(found), 'a number')}",
        hint="it is shown to models beside the question; leave it out where there is none",
    )


def _context(row: Mapping[str, Any], where: str) -> str:
    context = row.get("context")
    if isinstance(context, str) and context.strip():
        return context
    if "db" not in row or "tables" not in row:
        raise DataError(f"{where}: no 'context' (the DDL of the tables)")
    from quantlab.data.domains import tables_ddl

    return tables_ddl(row["db"], row["tables"], where)


def _database(row: Mapping[str, Any], where: str, folder: Path | None) -> Path | None:
    name = row.get("database")
    if name is None:
        return None
    if not isinstance(name, str):
        raise DataError(f"{where}: 'database' must be the path of a SQLite file")
    path = Path(name) if folder is None else folder / name
    if not path.is_file():
        raise DataError(f"{where}: no database {path}", hint="paths are relative to the file that names them")
    return path
