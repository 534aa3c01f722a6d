"""Random schemas, rows and queries, the queries as tokens, so that they can be written in more than one way.

A query is a list of (kind, text): keywords ("key"), names of the schema ("name"), names of its own that may be
chosen freely ("free": aliases of tables and of columns), and all the rest ("text"). `write` puts them into words
by a `Style`: which names the free ones get, and what stands between the tokens.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Token = tuple[str, str]
Pick = Callable[[Sequence[Any]], Any]

NAMES = [
    "id",
    "name",
    "price",
    "선수",
    "팀 이름",
    "order",
    "Group",
    'a"b',
    "x-1",
    "created_at",
    "값",
    "select",
]
TABLES = ["players", "팀", "table", "주문 내역", "T", "a.b"]
TYPES = {
    "INTEGER": [None, 0, 1, 2, 3, 7, -1],
    "REAL": [None, 0.5, 1.0, 2.25, -3.0, 1e9],
    "TEXT": [None, "", "a", "A", "가람", "나래", "a%", "it's", "2024-05-01"],
}


@dataclass(frozen=True)
class Table:
    name: str
    columns: dict[str, str]  # name -> type
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Style:
    free: Callable[[str], str] = str
    seed: int | None = None  # None: one blank between tokens, keywords upper case


def write(query: Sequence[Token], style: Style) -> str:
    numbers = random.Random(style.seed)
    blanks = (
        [" ", "  ", "\n", "\t", " /* 주석; */ ", " -- it's\n", "\r\n  "] if style.seed is not None else [" "]
    )
    words = []
    for kind, text in query:
        if kind == "key" and style.seed is not None:
            text = "".join(numbers.choice((char.lower(), char)) for char in text)
        words.append(style.free(text) if kind == "free" else quoted(text) if kind == "name" else text)
        words.append(numbers.choice(blanks))
    return "".join(words).strip() + (numbers.choice(["", ";", " ;\n"]) if style.seed is not None else "")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def build(path: Path, tables: Sequence[Table]) -> None:
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    with connection:
        for table in tables:
            columns = ", ".join(f"{quoted(name)} {kind}" for name, kind in table.columns.items())
            connection.execute(f"CREATE TABLE {quoted(table.name)} ({columns})")
            marks = ", ".join("?" * len(table.columns))
            connection.executemany(f"INSERT INTO {quoted(table.name)} VALUES ({marks})", table.rows)
    connection.close()


@st.composite
def schemas(draw: st.DrawFn) -> list[Table]:
    tables = []
    for name in draw(st.lists(st.sampled_from(TABLES), min_size=2, max_size=4, unique=True)):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        columns = {column: draw(st.sampled_from(sorted(TYPES))) for column in names}
        row = st.tuples(*(st.sampled_from(TYPES[kind]) for kind in columns.values()))
        tables.append(Table(name, columns, draw(st.lists(row, min_size=3, max_size=9))))
    return tables


@st.composite
def queries(draw: st.DrawFn, tables: Sequence[Table]) -> list[Token]:
    def pick(options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(options))

    return Writer(pick, tables).query()


def words(text: str) -> list[Token]:
    """Keywords and signs of a fixed text."""
    return [("key" if word.isalpha() else "text", word) for word in text.split()]


class Writer:
    """Writes one query; `pick` makes the choices. Sources are (alias, table)."""

    def __init__(self, pick: Pick, tables: Sequence[Table]) -> None:
        self.pick, self.tables, self.count = pick, tables, 0

    def query(self) -> list[Token]:
        kind = self.pick(["plain", "plain", "grouped", "grouped", "union", "with", "derived"])
        if kind == "union":
            width = self.pick([1, 2])
            sign = words(self.pick(["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]))
            left, right = self.select(width)[0], self.select(width)[0]
            return left + sign + right + self.order([words(str(n + 1)) for n in range(width)])
        if kind in ("with", "derived"):
            return self.nested(kind)
        select, keys = self.grouped() if kind == "grouped" else self.select(None)
        return select + self.order(keys)

    def nested(self, kind: str) -> list[Token]:
        alias, column = self.fresh("c"), self.fresh("n")
        inner = [*words("SELECT"), *self.pair(source := self.source()), *words("AS"), column, *words("FROM")]
        inner += self.named(source) + self.where([source])
        outer = [*words("SELECT"), alias, ("text", "."), column, *words(", COUNT ( * ) FROM")]
        last = [*words("GROUP BY"), column, *self.order([[column]])]
        if kind == "derived":
            return [*outer, *words("("), *inner, *words(")"), *words("AS"), alias, *last]
        return [*words("WITH"), alias, *words("AS ("), *inner, *words(")"), *outer, alias, *last]

    def select(self, width: int | None) -> tuple[list[Token], list[list[Token]]]:
        sources, tokens = self.sources()
        columns = [self.value(sources) for _ in range(width or self.pick([1, 2, 3]))]
        head = words(self.pick(["SELECT", "SELECT", "SELECT DISTINCT"]))
        if width is None and self.pick([0, 0, 0, 1]):
            return head + words("* FROM") + tokens + self.where(sources), columns
        keys = [*columns, self.value(sources)] if head == words("SELECT") else list(columns)
        listed: list[Token] = []
        for number, column in enumerate(columns):
            listed += ([("text", ",")] if number else []) + column
            if self.pick([0, 1]):
                name = self.fresh("n")
                listed += [*words("AS"), name]
                keys.append([name])
        return head + listed + words("FROM") + tokens + self.where(sources), keys

    def grouped(self) -> tuple[list[Token], list[list[Token]]]:
        sources, tokens = self.sources()
        key = self.column(sources)
        name = self.fresh("n")
        total = words(self.pick(["COUNT ( *", "COUNT ( DISTINCT", "SUM (", "MIN (", "MAX (", "AVG ("]))
        total += ([] if total[-1] == ("text", "*") else self.column(sources)) + words(")")
        head = [*words("SELECT"), *key, ("text", ","), *total, *words("AS"), name, *words("FROM")]
        having = (
            words("HAVING COUNT ( * )") + words(self.pick(["> 1", "> 0", "= 2"])) if self.pick([0, 1]) else []
        )
        body = head + tokens + self.where(sources) + words("GROUP BY") + key + having
        return body, [key, total, [name], words("2")]

    def order(self, keys: Sequence[list[Token]]) -> list[Token]:
        tokens: list[Token] = []
        for number in range(self.pick([0, 1, 1, 2])):
            tokens += words(", ") if number else words("ORDER BY")
            tokens += self.pick(keys) + words(
                self.pick(["", "ASC", "DESC", "DESC NULLS LAST", "COLLATE NOCASE"])
            )
        if self.pick([0, 0, 1]):
            tokens += words(self.pick(["LIMIT 2", "LIMIT 1 OFFSET 1", "LIMIT 100", "LIMIT 1 , 3"]))
        return tokens

    def sources(self) -> tuple[list[tuple[Token, Table]], list[Token]]:
        first = self.source()
        sources, tokens = [first], self.named(first)
        for _ in range(self.pick([0, 0, 1, 1, 2])):
            other = self.source()
            join = self.pick(["JOIN", "INNER JOIN", "LEFT JOIN", "LEFT OUTER JOIN", "CROSS JOIN", ","])
            tokens += words(join) + self.named(other)
            if join not in ("CROSS JOIN", ","):
                tokens += [*words("ON"), *self.column(sources), *words("="), *self.pair(other)]
            sources.append(other)
        return sources, tokens

    def where(self, sources: Sequence[tuple[Token, Table]]) -> list[Token]:
        tokens: list[Token] = []
        for number in range(self.pick([0, 0, 0, 1, 1, 2])):
            tokens += words(self.pick(["AND", "OR", "OR NOT"])) if number else words("WHERE")
            tokens += self.condition(sources)
        return tokens

    def condition(self, sources: Sequence[tuple[Token, Table]]) -> list[Token]:
        column = self.column(sources)
        kind = self.pick(["sign", "sign", "null", "in", "between", "like", "subquery", "exists", "scalar"])
        if kind == "sign":
            return column + words(self.pick(["=", "<>", "!=", "<", ">=", ">", "=="])) + self.literal()
        if kind == "null":
            return column + words(self.pick(["IS NULL", "IS NOT NULL"]))
        if kind == "in":
            return column + words("IN (") + self.literal() + words(",") + self.literal() + words(")")
        if kind == "between":
            return column + words("BETWEEN") + self.literal() + words("AND") + self.literal()
        if kind == "like":
            return column + words("LIKE") + [("text", self.pick(["'%a%'", "'가_'", "'%'"]))]
        other = self.source()
        inner = self.pair(other) + words("FROM") + self.named(other)
        if kind == "subquery":
            return column + words("IN ( SELECT") + inner + words(")")
        if kind == "scalar":
            return (
                column
                + words("> ( SELECT MIN (")
                + self.pair(other)
                + words(") FROM")
                + self.named(other)
                + words(")")
            )
        return (
            words("EXISTS ( SELECT")
            + inner
            + words("WHERE")
            + column
            + words("=")
            + self.pair(other)
            + words(")")
        )

    def value(self, sources: Sequence[tuple[Token, Table]]) -> list[Token]:
        column = self.column(sources)
        kind = self.pick(["column", "column", "column", "add", "case", "function", "join", "literal"])
        if kind == "add":
            return column + words(self.pick(["+ 1", "* 2", "- 0.5", "/ 2"]))
        if kind == "case":
            return words("CASE WHEN") + self.condition(sources) + words("THEN 1 ELSE") + column + words("END")
        if kind == "function":
            return words(self.pick(["UPPER", "LENGTH", "ABS", "TYPEOF"])) + words("(") + column + words(")")
        if kind == "join":
            return column + words("||") + self.literal()
        return self.literal() if kind == "literal" else column

    def literal(self) -> list[Token]:
        return [("text", self.pick(["0", "1", "2.25", "'a'", "'가람'", "'it''s'", "NULL", "-1", "'--'"]))]

    def source(self) -> tuple[Token, Table]:
        return self.fresh("t"), self.pick(self.tables)

    def named(self, source: tuple[Token, Table]) -> list[Token]:
        return [("name", source[1].name), *words(self.pick(["AS", ""])), source[0]]

    def column(self, sources: Sequence[tuple[Token, Table]]) -> list[Token]:
        return self.pair(self.pick(sources))

    def pair(self, source: tuple[Token, Table]) -> list[Token]:
        return [source[0], ("text", "."), ("name", self.pick(list(source[1].columns)))]

    def fresh(self, letter: str) -> Token:
        self.count += 1
        return "free", f"{letter}{self.count}"
