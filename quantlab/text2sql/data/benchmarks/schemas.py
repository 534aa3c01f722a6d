"""The databases of a benchmark: finding the file of a `db_id`, and the CREATE TABLE statements that describe it.

A `db_id` comes out of a downloaded file and becomes part of a path, so it must be one plain name. A database is
somebody's file too: what its `sqlite_master` says is asked through the sandbox, in a process that can be killed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.benchmarks.base import RawRow
from quantlab.text2sql.data.benchmarks.files import is_pointer, read_text, tried
from quantlab.text2sql.sandbox.pool import Limits, Sandbox

SUFFIXES = (".sqlite", ".db", ".sqlite3")
_TABLES = (
    "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL "
    "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid"
)
_CREATE = re.compile(r"(?:^|;)[^\S\n]*(CREATE\s+TABLE\b)", re.IGNORECASE | re.MULTILINE)
# What a semicolon may hide in: text, quoted names, comments. What has no end hides the rest, so that each character
# is looked at once; a doubled quote is two texts in a row, which changes nothing here.
_HIDDEN = re.compile(
    r"'[^']*(?:'|\Z)" r'|"[^"]*(?:"|\Z)' r"|`[^`]*(?:`|\Z)|\[[^\[\]\n]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|;",
    re.DOTALL,
)
_NAME = re.compile(
    r'CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?((?:"[^"]+"|`[^`]+`|\[[^\]]+\]|\'[^\']+\'|[^\s("`\[.]+)'
    r'(?:\.(?:"[^"]+"|`[^`]+`|\[[^\]]+\]|[^\s("`\[.]+))?)',
    re.IGNORECASE,
)


class Schemas:
    """The tables of SQLite files, each file asked once; a context manager, since it holds a worker process."""

    def __init__(self) -> None:
        self._sandbox = Sandbox(Limits(seconds=30.0, steps=200_000_000))
        self._known: dict[Path, dict[str, str]] = {}

    def __enter__(self) -> Schemas:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sandbox.close()

    def tables(self, path: Path) -> dict[str, str]:
        """Table name → its CREATE TABLE statement, in the order of creation. DataError for what is no database."""
        if path not in self._known:
            self._known[path] = self._ask(path)
        return self._known[path]

    def ddl(self, path: Path, written: Path | None = None) -> str:
        """The DDL of a database: the text in `written` (schema.sql) where it names the tables the file has.

        Published schema files are older than their databases here and there; a prompt must describe the tables that
        the query will meet, so a file that names others is not used.
        """
        tables = self.tables(path)
        if written is not None and written.is_file():
            statements = create_statements(_lenient_text(written))
            if sorted(map(table_name, statements)) == sorted(name.lower() for name in tables):
                return "\n".join(statements)
        return "\n".join(complete(sql) for sql in tables.values())

    def _ask(self, path: Path) -> dict[str, str]:
        found = self._sandbox.run(path, _TABLES, role="gold")
        if found.status != "rows":
            with path.open("rb") as stream:
                pointer = is_pointer(stream.read(64).decode("latin-1"))
            hint = "it is a Git LFS pointer: git lfs pull" if pointer else ""
            reason = found.reason.replace(f"{path} ", "it ")
            raise DataError(f"{path} is no SQLite database that can be read: {reason}", hint=hint)
        if not found.rows:
            raise DataError(f"{path} has no tables")
        return dict(found.rows)


def safe_name(value: Any, row: RawRow, column: str = "db_id") -> str:
    """A name out of a row that becomes part of a path: text without separators that names nothing above itself."""
    name = value if isinstance(value, str) else ""
    refused = not name or name.startswith(".") or len(name.encode("utf-8", "replace")) > 200
    if refused or any(char in '/\\:*?"<>|' or ord(char) < 32 for char in name):
        shown = repr(value)
        raise DataError(
            f"{row.where}: {column!r} must be the plain name of a database, found {shown[:80]}",
            hint="no slashes, no leading dot: it becomes the name of a folder",
        )
    return name


def find_database(folders: Sequence[Path], name: str, row: RawRow) -> Path:
    """`<folder>/<name>/<name>.sqlite` or `<folder>/<name>.sqlite`; DataError with the paths that were tried."""
    found = next(
        (path for folder in folders for path in _places(folder, name, SUFFIXES) if path.is_file()), None
    )
    if found is None:
        usual = [path for folder in folders for path in _places(folder, name, SUFFIXES[:1])]
        raise DataError(f"{row.where}: no database for {name!r}: {tried(usual)}")
    return found


def find_dump(folders: Sequence[Path], name: str) -> Path | None:
    """`<folder>/<name>/<name>.sql` or `<folder>/<name>.sql`, if there is one."""
    candidates = (path for folder in folders for path in _places(folder, name, (".sql",)))
    return next((path for path in candidates if path.is_file()), None)


def beside(database: Path, name: str) -> tuple[str, ...]:
    """The SQLite files in a database's own folder, itself first: those of a test suite. () where it is alone."""
    if database.parent.name != name:
        return ()
    others = sorted(path for path in database.parent.iterdir() if ".sqlite" in path.name and path != database)
    return tuple(str(path) for path in [database, *others]) if others else ()


def create_statements(text: str) -> list[str]:
    """The CREATE TABLE statements of a dump, each ended by a semicolon; rows, settings and comments are left out."""
    statements = []
    at = 0
    while (match := _CREATE.search(text, at)) is not None:
        end = _end(text, match.start(1))
        statements.append(complete(text[match.start(1) : end]))
        at = max(end, match.end())
    return statements


def complete(sql: str) -> str:
    return sql.strip().rstrip("; \t\r\n") + ";"


def table_name(statement: str) -> str:
    """The name of the table that a CREATE TABLE statement makes, lower case and unquoted; "" where it has none."""
    match = _NAME.match(statement.lstrip())
    name = match.group(1) if match else ""
    return name.strip("\"`'[]").lower()


def _end(text: str, start: int) -> int:
    """Where the statement that starts at `start` ends: at its semicolon, which is not in quotes or comments."""
    for match in _HIDDEN.finditer(text, start):
        if match.group() == ";":
            return match.start()
    return len(text)


def _lenient_text(path: Path) -> str:
    try:
        return read_text(path)
    except DataError:
        return ""  # a schema file in another encoding: the database itself says the same


def _places(folder: Path, name: str, suffixes: Sequence[str]) -> Iterator[Path]:
    for suffix in suffixes:
        yield folder / name / f"{name}{suffix}"
        yield folder / f"{name}{suffix}"
