"""DDL text to a `Schema`: which statements count, in which dialect.

Three dialects are tried, the likeliest by its words first (`tokens.guess_dialects`); the first that reads every
CREATE TABLE wins. CREATE TABLE, ALTER TABLE, CREATE UNIQUE INDEX and PostgreSQL's CREATE TYPE and DOMAIN say what the
data may be; every other statement is stepped over with a note. Column lists are read in `columns.py`, keys settled in
 `keys.py`, CHECKs translated in `checks.py`.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

from quantlab.text2sql.schema.columns import (
    RawTable,
    Surroundings,
    column_names,
    read_definition,
    type_tokens,
)
from quantlab.text2sql.schema.keys import finish
from quantlab.text2sql.schema.schema import DIALECTS, Schema, SchemaError, shorten
from quantlab.text2sql.schema.tokens import (
    MAX_DDL,
    Cursor,
    guess_dialects,
    split_commas,
    split_statements,
    tokenize,
)
from quantlab.text2sql.schema.types import Type, read_type

MAX_TABLES = 2000
_CREATED = ("TABLE", "VIEW", "INDEX", "TYPE", "DOMAIN")


@functools.lru_cache(maxsize=4096)
def read_schema(ddl: str, dialect: str | None = None) -> Schema:
    """The tables of `ddl`, read as `dialect` ("sqlite", "mysql", "postgres") or as what it looks like.

    Raises SchemaError, with the statement and the reason, where it cannot be read, makes no table, or makes one
    that SQLite cannot hold.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise SchemaError(f"no dialect {dialect!r}", hint=f"the dialects are {', '.join(DIALECTS)}")
    if len(ddl) > MAX_DDL:
        raise SchemaError(f"the DDL is longer than {MAX_DDL} characters")
    if "\0" in ddl:
        raise SchemaError("the DDL holds a NUL character")
    try:
        ddl.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SchemaError("the DDL holds half a character (a lone surrogate)") from error
    first_error: SchemaError | None = None
    for candidate in (dialect,) if dialect is not None else guess_dialects(ddl):
        try:
            return _Reader(ddl, candidate).read()
        except SchemaError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


class _Reader:
    """Reads the statements of one text in one dialect."""

    def __init__(self, ddl: str, dialect: str) -> None:
        self.ddl, self.dialect = ddl, dialect
        self.tables: dict[str, RawTable] = {}
        self.types: dict[str, Type] = {}
        self.notes: list[str] = []
        self.views: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.around = Surroundings(dialect, self.types, self.notes)

    def read(self) -> Schema:
        for tokens in split_statements(tokenize(self.ddl, self.dialect)):
            cursor = Cursor(tokens, self.ddl)
            try:
                self._statement(cursor)
            except SchemaError as error:
                raise SchemaError(f"{shorten(cursor.text(tokens))}: {error}") from error
        for words, number in self.ignored.items():
            self.notes.append(f"{words}: left out" + (f" ({number} times)" if number > 1 else ""))
        if not self.tables:
            reason = "; ".join(self.notes[:3]) or "it is empty"
            raise SchemaError(
                f"the DDL creates no table: {shorten(reason, 200)}", hint="CREATE TABLE is expected"
            )
        schema = finish(list(self.tables.values()), self.dialect, self.notes)
        return replace(schema, views=tuple(self.views))

    def _statement(self, cursor: Cursor) -> None:
        if cursor.take("CREATE"):
            self._create(cursor)
        elif cursor.take("ALTER", "TABLE"):
            self._alter(cursor)
        else:
            words = [token.text for token in cursor.tokens[:2] if token.kind == "word"]
            self.ignored[shorten(" ".join(words).upper() or cursor.text(cursor.tokens), 30)] += 1

    def _create(self, cursor: Cursor) -> None:
        words: list[str] = []
        while cursor.peek() not in _CREATED and not cursor.done and len(words) < 6:
            words.append(cursor.peek())
            cursor.next()
        what = cursor.peek()
        cursor.next()
        if what == "INDEX":
            self._index(cursor, unique="UNIQUE" in words)
            return
        cursor.take("IF", "NOT", "EXISTS")
        if {"VIRTUAL", "TRIGGER", "FUNCTION", "PROCEDURE"} & set(words):
            self.ignored[shorten(" ".join(["CREATE", *words[:2]]), 30)] += 1
        elif what == "TABLE":
            self._table(cursor)
        elif what == "VIEW":
            name = cursor.name() or ""
            self.views.append(name)
            self.notes.append(f"view {shorten(name)}: left out")
        elif what in ("TYPE", "DOMAIN"):
            self._type(cursor)
        else:
            self.ignored[shorten(" ".join(["CREATE", *words[:2]]), 30)] += 1

    def _table(self, cursor: Cursor) -> None:
        name = cursor.name()
        if not name:
            raise SchemaError("the name of a table is expected")
        body = cursor.group()
        if body is None or (body and body[0].upper in ("SELECT", "WITH")):
            self.views.append(name)
            self.notes.append(f"table {shorten(name)}: its columns are not written out, left out")
            return
        table = RawTable(name)
        for tokens in split_commas(body):
            read_definition(Cursor(tokens, self.ddl), table, self.around)
        if not table.columns:
            raise SchemaError(f"table {shorten(name)} has no columns")
        if len(self.tables) >= MAX_TABLES:
            raise SchemaError(f"there are more than {MAX_TABLES} tables")
        if name.lower() in self.tables:
            self.notes.append(f"table {shorten(name)}: created twice, the first one counts")
        else:
            self.tables[name.lower()] = table

    def _type(self, cursor: Cursor) -> None:
        """PostgreSQL's CREATE TYPE … AS ENUM (…) and CREATE DOMAIN … AS type."""
        name = cursor.name()
        cursor.take("AS")
        tokens = type_tokens(cursor)
        if name and tokens:
            found = read_type(tokens, cursor.text(tokens), self.dialect, self.types)
            self.types[name.lower()] = replace(found, declared=name)

    def _index(self, cursor: Cursor, unique: bool) -> None:
        while not cursor.done and not cursor.take("ON"):
            cursor.next()
        cursor.take("ONLY")
        table = self.tables.get((cursor.name() or "").lower())
        if cursor.take("USING"):
            cursor.next()
        columns = column_names(cursor.group())
        partial = any(token.upper == "WHERE" for token in cursor.tokens[cursor.at :])
        if unique and table is not None and columns and not partial:
            table.uniques.append(columns)
        else:
            self.ignored["CREATE UNIQUE INDEX" if unique else "CREATE INDEX"] += 1

    def _alter(self, cursor: Cursor) -> None:
        cursor.take("IF", "EXISTS")
        cursor.take("ONLY")
        name = cursor.name() or ""
        table = self.tables.get(name.lower())
        if table is None:
            self.notes.append(f"ALTER TABLE {shorten(name)}: no such table before it, left out")
            return
        for tokens in split_commas(cursor.tokens[cursor.at :]):
            self._alteration(Cursor(tokens, self.ddl), table)

    def _alteration(self, cursor: Cursor, table: RawTable) -> None:
        if cursor.take("ADD"):
            cursor.take("COLUMN")
            cursor.take("IF", "NOT", "EXISTS")
            inside = cursor.group()
            for tokens in split_commas(inside if inside is not None else cursor.tokens[cursor.at :]):
                read_definition(Cursor(tokens, self.ddl), table, self.around)
            return
        if cursor.peek() in ("MODIFY", "CHANGE"):
            renames = cursor.peek() == "CHANGE"
            cursor.next()
            cursor.take("COLUMN")
            self._redefine(cursor, table, renames)
            return
        if cursor.take("ALTER"):
            cursor.take("COLUMN")
            column = table.column(cursor.name() or "")
            words = {token.upper for token in cursor.tokens[cursor.at :]}
            if column is not None and words == {"SET", "NOT", "NULL"}:
                column.not_null = True
                return
            if column is not None and words & {"IDENTITY", "NEXTVAL"}:
                column.generated = column.not_null = True
                return
            if column is not None and "DEFAULT" in words:
                return
        words_ = " ".join(token.text for token in cursor.tokens[:2]).upper()
        self.ignored[f"ALTER TABLE … {shorten(words_, 30)}".rstrip()] += 1

    def _redefine(self, cursor: Cursor, table: RawTable, renames: bool) -> None:
        """MySQL's MODIFY column and CHANGE old new: the column is defined anew."""
        start = cursor.at
        old = table.column(cursor.name() or "")
        scratch = RawTable(table.name)
        rest = cursor.tokens[cursor.at if renames else start :]
        read_definition(Cursor(rest, self.ddl), scratch, self.around)
        if old is None or not scratch.columns:
            self.notes.append(f"ALTER TABLE {shorten(table.name)}: no such column, left out")
            return
        table.columns[table.columns.index(old)] = scratch.columns[0]
        table.primary_key = scratch.primary_key or table.primary_key
        table.uniques += scratch.uniques
        table.checks += scratch.checks
