"""What a Text2SQL domain is: tables and columns with their Korean names, and the DDL they stand for.

A domain is one small relational database (a library, a game) described once, in YAML, for three uses: the DDL
that a model reads, the rows that fill a database, and the Korean words in which questions are asked. Every
table has one INTEGER key with the values 1..rows; a `ref` column points at the key of another table.

Not covered: composite keys, views, CHECK constraints, indexes. `domain_yaml` reads and validates the YAML,
`populate` makes the rows.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantlab.errors import DataError

ROLES = ("key", "label", "category", "number", "date", "ref", "flag", "text")

Bound = int | float | datetime.date
Value = str | int


@dataclass(frozen=True)
class Column:
    """One column. Which fields mean something depends on `role`; the rest keep their defaults."""

    name: str
    ko: str  # noun used in questions
    type: str  # SQL type as written in the DDL
    role: str  # one of ROLES
    nullable: float = 0.0  # share of NULLs; 0 means NOT NULL
    # label, category, text
    values: tuple[Value, ...] = ()
    combine: tuple[tuple[str, ...], ...] = ()  # one part from each list, joined by `joiner`
    joiner: str = " "
    person: bool = False  # Korean names of people
    pattern: str = ""  # phone | email | address | code
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()  # label: values by the group they belong to
    group_of: str = ""  # category: the label column whose groups are this column's values
    # number, date
    range: tuple[Bound, Bound] | None = None
    step: int | float = 1
    unit: str = ""  # 원, 점, 명: written after the number
    high: str = ""  # adnominal: 비싼, 높은
    low: str = ""
    verb: str = ""  # adnominal of a date: 출간된
    after: str = ""  # date: not before this one; "column" of the row or "ref_column.column" of its parent
    within: tuple[int, int] | None = None  # days after `after`
    # ref
    ref: str = ""  # "table.column"
    # flag
    true_ko: str = ""
    false_ko: str = ""
    share: float = 0.5  # share of 1

    @property
    def ref_table(self) -> str:
        """The table a `ref` column points at, "" for other roles."""
        return self.ref.partition(".")[0]

    @property
    def ref_column(self) -> str:
        return self.ref.partition(".")[2]

    @property
    def is_numeric(self) -> bool:
        """Whether values are written without quotes in SQL."""
        return self.type.split("(")[0] in {"INTEGER", "BIGINT", "REAL", "DECIMAL", "BOOLEAN"}


@dataclass(frozen=True)
class Table:
    name: str
    ko: str
    counter: str  # counting unit: 권, 명, 개
    rows: int
    columns: tuple[Column, ...]
    unique: tuple[str, ...] = ()  # ref columns whose combination is unique (link tables)

    def column(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise DataError(f"table {self.name} has no column {name}")

    def having(self, *roles: str) -> tuple[Column, ...]:
        """The columns of these roles, in DDL order."""
        return tuple(column for column in self.columns if column.role in roles)

    @property
    def key(self) -> Column:
        return self.having("key")[0]

    @property
    def label(self) -> Column | None:
        """The column that names a row, if the table has one."""
        found = self.having("label")
        return found[0] if found else None

    @property
    def refs(self) -> tuple[Column, ...]:
        return self.having("ref")

    def ddl(self) -> str:
        lines = []
        for column in self.columns:
            kind = "PRIMARY KEY" if column.role == "key" else "" if column.nullable else "NOT NULL"
            lines.append(f"  {column.name} {column.type} {kind}".rstrip())
        if self.unique:
            lines.append(f"  UNIQUE ({', '.join(self.unique)})")
        lines += [f"  FOREIGN KEY ({c.name}) REFERENCES {c.ref_table}({c.ref_column})" for c in self.refs]
        return f"CREATE TABLE {self.name} (\n" + ",\n".join(lines) + "\n);"


@dataclass(frozen=True)
class ForeignKey:
    table: str
    column: str
    parent: str
    parent_column: str


@dataclass(frozen=True)
class Domain:
    db_id: int
    name: str
    ko: str
    tables: tuple[Table, ...]
    _by_name: dict[str, Table] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {table.name: table for table in self.tables})

    def table(self, name: str) -> Table:
        try:
            return self._by_name[name]
        except KeyError:
            raise DataError(
                f"domain {self.name} has no table {name}", hint="tables: " + ", ".join(self._by_name)
            ) from None

    def ddl(self, tables: Sequence[str] | None = None) -> str:
        """CREATE TABLE statements of `tables` (all by default), in schema order, a line break between."""
        wanted = None if tables is None else {self.table(name).name for name in tables}
        return "\n".join(t.ddl() for t in self.tables if wanted is None or t.name in wanted)

    def foreign_keys(self) -> tuple[ForeignKey, ...]:
        """Every foreign key, in schema order."""
        return tuple(
            ForeignKey(table.name, column.name, column.ref_table, column.ref_column)
            for table in self.tables
            for column in table.refs
        )
