"""How schemas and queries are laid out: DDL scripts in several hands, and SQL in several styles.

Half of all schemas keep the layout of `Domain.ddl`; the others vary case, indentation, comments
with the Korean names, constraints and quoting. Queries are mostly one line in upper case, as in the
data set, sometimes lower case or broken into lines.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantlab.data.schema import Column, Domain, Table

STRING = re.compile(r"('(?:[^']|'')*')")
KEYWORDS = re.compile(
    r"\b(SELECT|FROM|WHERE|GROUP BY|ORDER BY|HAVING|LIMIT|LEFT|INNER|JOIN|ON|AND|OR|AS|COUNT|AVG|SUM|MAX|MIN|DISTINCT"
    r"|DESC|ASC|NOT|IN|IS|NULL|LIKE|BETWEEN|EXISTS|CASE|WHEN|THEN|ELSE|END|UNION|CAST|ROUND|CREATE|TABLE|PRIMARY|FOREIGN|KEY"
    r"|REFERENCES|INSERT|INTO|VALUES|INTEGER|VARCHAR|DECIMAL|DATE|BOOLEAN|UNIQUE|IF|EXCEPT|INTERSECT|ALL|BY)\b"
)
BREAKS = re.compile(r" (FROM|WHERE|GROUP BY|ORDER BY|HAVING|LIMIT|(?:LEFT |INNER )?JOIN) ")
TYPES = {"INTEGER": ("INT", "BIGINT", "NUMBER"), "BOOLEAN": ("TINYINT", "BOOL"), "DATE": ("TEXT", "DATETIME")}


def outside_strings(sql: str, change: Callable[[str], str]) -> str:
    """The SQL with `change` applied to everything that is not a string literal."""
    return "".join(part if part.startswith("'") else change(part) for part in STRING.split(sql))


def lower_keywords(sql: str) -> str:
    return outside_strings(sql, lambda part: KEYWORDS.sub(lambda word: word[0].lower(), part))


def broken(sql: str, indent: str = "") -> str:
    """The query with one clause a line; what is inside parentheses stays together."""
    pieces, depth, clauses = STRING.split(sql), 0, 0
    out = []
    for piece in pieces:
        if piece.startswith("'"):
            out.append(piece)
            continue
        last = 0
        for hit in BREAKS.finditer(piece):
            before = piece[last : hit.start()]
            depth += before.count("(") - before.count(")")
            out.append(before)
            out.append(f"\n{indent}{hit[1]} " if depth == 0 else hit[0])
            last, clauses = hit.end(), clauses + 1
        rest = piece[last:]
        depth += rest.count("(") - rest.count(")")
        out.append(rest)
    return "".join(out)


SqlStyle = Callable[[str], str]


def sql_style(rng: random.Random) -> SqlStyle:
    """How the queries of one document are written."""
    roll = rng.random()
    if roll < 0.80:
        return str
    if roll < 0.88:
        return lower_keywords
    if roll < 0.95:
        return broken
    if roll < 0.98:
        return lambda sql: broken(sql, "  ")
    return lambda sql: sql.rstrip(";")


@dataclass(frozen=True)
class DdlStyle:
    """The hand that wrote a DDL script."""

    comments: str = ""  # "" | "columns" | "tables" | "both"
    lower: bool = False
    indent: str = "  "
    quote: str = ""
    not_null: bool = True
    foreign_keys: str = "last"  # "last" | "inline" | "none"
    other_types: bool = False
    exists: bool = False
    one_line: bool = False
    gap: str = "\n"


CANONICAL = DdlStyle()


def ddl_style(rng: random.Random, canonical: float = 0.5) -> DdlStyle:
    """A style for one document; with the probability `canonical` that of `Domain.ddl`."""
    if rng.random() < canonical:
        return CANONICAL
    one_line = rng.random() < 0.12
    return DdlStyle(
        comments="" if one_line else rng.choice(("", "columns", "columns", "both", "both", "tables")),
        lower=rng.random() < 0.2,
        indent=rng.choice(("  ", "    ", "    ", "\t")),
        quote=rng.choice(("", "", "", "", "", '"', "`")),
        not_null=rng.random() < 0.7,
        foreign_keys=rng.choice(("last", "last", "inline", "none")),
        other_types=rng.random() < 0.2,
        exists=rng.random() < 0.12,
        one_line=one_line,
        gap=rng.choice(("\n", "\n\n")),
    )


def _column(column: Column, style: DdlStyle) -> str:
    quote = style.quote
    kind = column.type
    if style.other_types:
        kind = TYPES.get(kind, (kind,))[len(column.name) % len(TYPES.get(kind, (kind,)))]
    parts = [f"{quote}{column.name}{quote}", kind]
    if column.role == "key":
        parts.append("PRIMARY KEY")
    elif style.not_null and not column.nullable:
        parts.append("NOT NULL")
    if column.role == "ref" and style.foreign_keys == "inline":
        parts.append(f"REFERENCES {quote}{column.ref_table}{quote}({quote}{column.ref_column}{quote})")
    return " ".join(parts)


def create_table(table: Table, style: DdlStyle) -> str:
    """One CREATE TABLE statement in the given style."""
    quote = style.quote
    lines = [(_column(column, style), column.ko) for column in table.columns]
    if style.foreign_keys == "last":
        for c in table.refs:
            target = f"{quote}{c.ref_table}{quote}({quote}{c.ref_column}{quote})"
            lines.append((f"FOREIGN KEY ({quote}{c.name}{quote}) REFERENCES {target}", ""))
    if style.lower:
        lines = [(lower_keywords(text), ko) for text, ko in lines]
    head = "CREATE TABLE IF NOT EXISTS" if style.exists else "CREATE TABLE"
    head = f"{head.lower() if style.lower else head} {quote}{table.name}{quote} ("
    if style.one_line:
        return head + ", ".join(text for text, _ in lines) + ");"
    out = [f"-- {table.ko}"] if style.comments in ("tables", "both") else []
    out.append(head)
    for at, (text, ko) in enumerate(lines):
        comma = "," if at < len(lines) - 1 else ""
        note = f"  -- {ko}" if ko and style.comments in ("columns", "both") else ""
        out.append(f"{style.indent}{text}{comma}{note}")
    return "\n".join([*out, ");"])


def schema_text(domain: Domain, tables: Sequence[str], style: DdlStyle) -> str:
    """The DDL of the given tables, in schema order."""
    if style == CANONICAL:
        return domain.ddl(tables)
    return style.gap.join(create_table(table, style) for table in domain.tables if table.name in tables)


def schema_summary(domain: Domain, tables: Sequence[str], rng: random.Random) -> str:
    """The tables as a list of names and columns instead of DDL, in one of several notations."""
    chosen = [table for table in domain.tables if table.name in tables]
    notation = rng.randrange(5)
    if notation == 0:
        return "\n".join(f"{t.name}({', '.join(c.name for c in t.columns)})" for t in chosen)
    if notation == 1:
        return "\n".join(
            f"{t.name} ({t.ko}): " + ", ".join(f"{c.name} {c.ko}" for c in t.columns) for t in chosen
        )
    if notation == 2:
        return "\n".join(
            f"표 {t.name} = {t.ko}\n" + "\n".join(f"- {c.name}: {c.ko}" for c in t.columns) for t in chosen
        )
    if notation == 3:
        return "\n".join(f"{c.ko} → {t.name}.{c.name}" for t in chosen for c in t.columns)
    lines = ["| 표 | 열 | 뜻 |", "|---|---|---|"]
    return "\n".join(lines + [f"| {t.name} | {c.name} | {c.ko} |" for t in chosen for c in t.columns])
