"""What stands between the parentheses of CREATE TABLE: columns, keys, constraints.

Everything is kept as written; names are looked up later (`keys.py`). Clauses that say nothing of the data are
stepped over. A constraint may follow another one, or a column, without the comma that should part them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantlab.text2sql.schema.schema import SchemaError, shorten
from quantlab.text2sql.schema.tokens import Cursor, Token, split_commas
from quantlab.text2sql.schema.types import Type, read_type

# Words that end a type and start what else is said of a column.
_AFTER_TYPE = frozenset(
    {
        "CONSTRAINT", "PRIMARY", "FOREIGN", "UNIQUE", "NOT", "NULL", "DEFAULT", "REFERENCES", "CHECK", "COLLATE",
        "CHARSET", "COMMENT", "GENERATED", "AS", "IDENTITY", "AUTO_INCREMENT", "AUTOINCREMENT", "ON", "KEY", "INDEX",
        "INVISIBLE", "VISIBLE", "STORAGE", "COMPRESSION", "ENCODE", "SPARSE", "VIRTUAL", "STORED", "SRID", "FIRST",
        "AFTER", "DEFERRABLE", "CLUSTERED", "HIDDEN",
    }
)  # fmt: skip
MAX_COLUMNS = 2000  # SQLite's own limit
MAX_CONSTRAINTS = 500
_TABLE_CONSTRAINTS = frozenset({"PRIMARY", "FOREIGN", "UNIQUE", "CHECK", "EXCLUDE"})


@dataclass
class RawKey:
    """A foreign key as written; `references` is empty where the DDL names no columns."""

    columns: list[str]
    table: str
    references: list[str]


@dataclass
class RawColumn:
    """A column as written."""

    name: str
    type: Type
    not_null: bool = False
    generated: bool = False


@dataclass
class RawTable:
    """A table as written. `checks` are texts; the names in keys have not been looked up."""

    name: str
    columns: list[RawColumn] = field(default_factory=list)
    primary_key: list[str] = field(default_factory=list)
    uniques: list[list[str]] = field(default_factory=list)
    foreign_keys: list[RawKey] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def column(self, name: str) -> RawColumn | None:
        return next((column for column in self.columns if column.name.lower() == name.lower()), None)


@dataclass
class Surroundings:
    """What a definition needs to know of the rest: the dialect, the types that the DDL defines, and where notes go."""

    dialect: str
    types: Mapping[str, Type]
    notes: list[str]


def read_definition(cursor: Cursor, table: RawTable, around: Surroundings) -> None:
    """A column or a table constraint, and further constraints that no comma parts from it, into `table`."""
    if cursor.done:
        return
    if not _constraint(cursor, table, around):
        _column(cursor, table, around)
    if len(table.uniques) + len(table.foreign_keys) + len(table.checks) > MAX_CONSTRAINTS:
        raise SchemaError(f"table {shorten(table.name)} has more than {MAX_CONSTRAINTS} constraints")
    while not cursor.done:
        if not _constraint(cursor, table, around):
            cursor.next()  # USING BTREE, ON CONFLICT, COMMENT, …: nothing about the data


def _constraint(cursor: Cursor, table: RawTable, around: Surroundings) -> bool:
    """Step over a table constraint or an index if one starts here."""
    start = cursor.at
    if cursor.take("CONSTRAINT") and not (
        cursor.peek() in _TABLE_CONSTRAINTS and cursor.peek(1) in ("KEY", "(")
    ):
        cursor.name()
    kind = cursor.peek()
    cursor.next()
    found = False
    if kind == "PRIMARY" and cursor.take("KEY"):
        columns = _columns_after_name(cursor)
        table.primary_key = columns or table.primary_key
        found = bool(columns)
    elif kind == "FOREIGN" and cursor.take("KEY"):
        columns = _columns_after_name(cursor)
        found = bool(columns) and cursor.take("REFERENCES")
        if found:
            _references(cursor, columns, table)
    elif kind == "UNIQUE":
        cursor.take_any("KEY", "INDEX")
        columns = _columns_after_name(cursor)
        found = bool(columns)
        if found:
            table.uniques.append(columns)
    elif kind == "CHECK" and cursor.peek() == "(":
        _check(cursor, table)
        found = True
    elif kind in ("KEY", "INDEX", "FULLTEXT", "SPATIAL", "EXCLUDE"):
        cursor.take_any("KEY", "INDEX")
        inside = _group_after_name(cursor)
        # `key varchar(20)` is a column that is called key.
        found = bool(inside) and inside is not None and inside[0].kind != "number"
    elif kind == "LIKE" and start == 0 and len(cursor.tokens) > 1:
        around.notes.append(f"table {shorten(table.name)}: LIKE another table, left out")
        cursor.at = len(cursor.tokens)
        found = True
    if not found:
        cursor.at = start
    return found


def _column(cursor: Cursor, table: RawTable, around: Surroundings) -> None:
    token = cursor.next()
    if token is None or token.kind not in ("word", "name", "string"):
        raise SchemaError(f"a column's name is expected in table {shorten(table.name)}, not {_show(token)}")
    if not token.text:
        raise SchemaError(f"a column of table {shorten(table.name)} has no name")
    tokens = type_tokens(cursor)
    kind = read_type(tokens, cursor.text(tokens), around.dialect, around.types)
    if not kind.known:
        note = f"type {shorten(kind.declared, 30)} of {table.name}.{token.text} is not known, read as {kind.kind}"
        around.notes.append(shorten(note, 120))
    column = RawColumn(token.text, kind, generated=kind.serial, not_null=kind.serial)
    if table.column(column.name) is not None:
        raise SchemaError(f"table {shorten(table.name)} has two columns called {shorten(column.name)}")
    if len(table.columns) >= MAX_COLUMNS:
        raise SchemaError(f"table {shorten(table.name)} has more than {MAX_COLUMNS} columns")
    table.columns.append(column)
    while not cursor.done and _clause(cursor, column, table, around):
        pass


def _clause(cursor: Cursor, column: RawColumn, table: RawTable, around: Surroundings) -> bool:
    """One thing that is said of a column; False where a table constraint starts instead."""
    start = cursor.at
    if cursor.take("CONSTRAINT"):
        cursor.name()
    if cursor.take("NOT", "NULL"):
        column.not_null = True
    elif cursor.peek() == "DEFAULT":
        cursor.next()
        if _default(cursor):
            column.generated = column.not_null = True
    elif cursor.peek() in ("PRIMARY", "KEY", "UNIQUE"):
        unique = cursor.peek() == "UNIQUE"
        cursor.next()
        cursor.take_any("KEY", "INDEX")
        if cursor.peek() == "(" or (cursor.peek(1) == "(" and cursor.peek() not in _AFTER_TYPE):
            cursor.at = start  # UNIQUE (a, b): a constraint of the table
            return False
        if unique:
            table.uniques.append([column.name])
        else:
            table.primary_key.append(column.name)
    elif cursor.take("REFERENCES"):
        _references(cursor, [column.name], table)
    elif cursor.peek() == "CHECK" and cursor.peek(1) == "(":
        cursor.next()
        _check(cursor, table)
    elif cursor.take("FOREIGN", "KEY"):
        if cursor.take("REFERENCES"):
            _references(cursor, [column.name], table)
        else:
            cursor.at = start
            return False
    elif cursor.take_any("AUTO_INCREMENT", "AUTOINCREMENT", "IDENTITY"):
        column.generated = True
        cursor.group()
    elif cursor.take("GENERATED") or cursor.peek() == "AS":
        _generated(cursor, column, table, around)
    elif cursor.take("COMMENT"):
        cursor.next()
    else:
        cursor.next()  # COLLATE x, CHARACTER SET x, ON UPDATE …, NULL, INVISIBLE: nothing about the data
        cursor.group()
    return True


def _generated(cursor: Cursor, column: RawColumn, table: RawTable, around: Surroundings) -> None:
    while cursor.take_any("ALWAYS", "BY", "DEFAULT", "ON", "NULL", "AS"):
        pass
    if cursor.take("IDENTITY"):
        column.generated = column.not_null = True
    else:
        around.notes.append(shorten(f"{table.name}.{column.name} is computed: read as a plain column", 120))
    cursor.group()


def _default(cursor: Cursor) -> bool:
    """Step over a default value; whether it counts upwards (`nextval`)."""
    counts = cursor.peek() == "NEXTVAL"
    while cursor.peek() in ("+", "-", "NOT"):
        cursor.next()
    if cursor.group() is None:
        while not cursor.done:
            cursor.next()
            if cursor.peek() != ".":
                break
            cursor.next()
        cursor.group()
    while cursor.take("::") or cursor.take(":", ":"):
        type_tokens(cursor)
    return counts


def type_tokens(cursor: Cursor) -> list[Token]:
    """The tokens of the type that starts here, stepped over; none where a clause or the end follows at once."""
    start = cursor.at
    while not cursor.done:
        word = cursor.peek()
        if word in _AFTER_TYPE or (word == "CHARACTER" and cursor.peek(1) == "SET"):
            break
        if word == "(":
            if cursor.at == start:
                break
            cursor.group()
        else:
            cursor.next()
    return cursor.tokens[start : cursor.at]


def _references(cursor: Cursor, columns: list[str], table: RawTable) -> None:
    parent = cursor.name()
    if parent is None:
        raise SchemaError(f"the name of a table is expected after REFERENCES, not {_show(cursor.next())}")
    table.foreign_keys.append(RawKey(columns, parent, column_names(cursor.group())))
    while True:
        if cursor.take("ON", "DELETE") or cursor.take("ON", "UPDATE"):
            cursor.take_any("SET", "NO")
            cursor.next()
        elif cursor.take("MATCH") or cursor.take("INITIALLY"):
            cursor.next()
        elif not (cursor.take("NOT", "DEFERRABLE") or cursor.take("DEFERRABLE")):
            return


def _check(cursor: Cursor, table: RawTable) -> None:
    """The expression of a CHECK, whose opening parenthesis comes next."""
    text = cursor.text(cursor.group() or [])
    if cursor.take("NOT", "ENFORCED"):
        return
    if text:
        table.checks.append(text)


def _group_after_name(cursor: Cursor) -> list[Token] | None:
    """What is in the parentheses after, perhaps, the name of a constraint and its method; None where there are none."""
    for ahead in range(5):
        if cursor.peek(ahead) == "(":
            cursor.at += ahead
            return cursor.group()
        if cursor.peek(ahead) in (";", ")", "REFERENCES"):
            break
    return None


def _columns_after_name(cursor: Cursor) -> list[str]:
    return column_names(_group_after_name(cursor))


def column_names(tokens: list[Token] | None) -> list[str]:
    """The names of a column list; lengths, directions and collations beside them are left out, so are expressions."""
    names = []
    for part in split_commas(tokens or []):
        if not part:
            continue
        if part[0].kind not in ("word", "name", "string"):
            return []  # an expression: not a key that columns make
        if len(part) > 1 and part[1].text == "(" and not (len(part) > 2 and part[2].kind == "number"):
            return []
        names.append(part[0].text)
    return names


def _show(token: Token | None) -> str:
    return "the end" if token is None else repr(shorten(token.text, 30))
