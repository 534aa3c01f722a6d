"""Made-up rows of a table as INSERT statements, CSV, a pipe table or a list of records."""

import random
from collections.abc import Sequence
from datetime import date, timedelta

from quantlab.data.schema import Column, Domain, Table
from tools.ko_text2sql.corpus.schemas import person_names

STREETS = ("중앙로", "한강로", "대학로", "시청길", "벚꽃길", "강변로", "역전길", "솔밭길", "남산길", "해안로")
MAILS = ("hana", "sora", "minho", "jisu", "dana", "yuri", "taeho", "bora", "inho", "garam")


def _text(column: Column, rng: random.Random) -> str:
    if column.values:
        return str(rng.choice(column.values))
    if column.combine:
        return column.joiner.join(rng.choice(part) for part in column.combine)
    match column.pattern:
        case "phone":
            return f"010-{rng.randint(1000, 9999)}-{rng.randint(1000, 9999)}"
        case "email":
            return f"{rng.choice(MAILS)}{rng.randint(1, 99)}@example.com"
        case "address":
            return f"{rng.choice(STREETS)} {rng.randint(1, 200)}"
        case "code":
            return f"{rng.choice('ABCDEFGHKM')}{rng.randint(100, 9999)}"
    return person_names(rng, 1)[0]


def value(column: Column, row: int, rng: random.Random) -> str | None:
    """One value as it would be printed, None for NULL."""
    if column.nullable and rng.random() < 0.15:
        return None
    if column.role == "key":
        return str(row)
    if column.role == "ref":
        return str(rng.randint(1, 60))
    if column.role == "flag":
        return str(int(rng.random() < column.share))
    if column.role == "number" and column.range:
        low, high = (float(str(bound)) for bound in column.range)
        step = float(column.step)
        number = low + step * rng.randint(0, max(1, int((high - low) / step)))
        return f"{number:.1f}" if step < 1 else str(int(number))
    if column.role == "date" and column.range:
        first, last = column.range
        assert isinstance(first, date) and isinstance(last, date)
        return (first + timedelta(days=rng.randrange((last - first).days + 1))).isoformat()
    return _text(column, rng)


def literal(column: Column, text: str | None) -> str:
    """The value as SQL."""
    if text is None:
        return "NULL"
    return text if column.is_numeric else "'" + text.replace("'", "''") + "'"


def _rows(table: Table, rng: random.Random, count: int) -> list[list[str | None]]:
    first = rng.randint(1, 60)
    return [[value(column, first + at, rng) for column in table.columns] for at in range(count)]


def inserts(table: Table, rng: random.Random) -> str:
    rows = [
        "(" + ", ".join(literal(column, text) for column, text in zip(table.columns, row, strict=True)) + ")"
        for row in _rows(table, rng, rng.randint(3, 8))
    ]
    columns = f" ({', '.join(column.name for column in table.columns)})" if rng.random() < 0.6 else ""
    if rng.random() < 0.5:
        return f"INSERT INTO {table.name}{columns} VALUES\n" + ",\n".join(rows) + ";"
    return "\n".join(f"INSERT INTO {table.name}{columns} VALUES {row};" for row in rows)


def _grid(table: Table, rng: random.Random) -> list[list[str]]:
    korean = rng.random() < 0.4
    heading = [column.ko if korean else column.name for column in table.columns]
    rows = [[text or "" for text in row] for row in _rows(table, rng, rng.randint(4, 9))]
    kept = sorted(rng.sample(range(len(heading)), min(len(heading), rng.randint(3, 6))))
    return [[row[at] for at in kept] for row in (heading, *rows)]


def csv(table: Table, rng: random.Random) -> str:
    mark = rng.choice((",", ",", "\t", ";"))
    return "\n".join(mark.join(row) for row in _grid(table, rng))


def pipes(table: Table, rng: random.Random) -> str:
    heading, *rows = _grid(table, rng)
    lines = [f"| {' | '.join(row)} |" for row in (heading, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heading), *lines[1:]])


def records(table: Table, rng: random.Random) -> str:
    """Rows described in Korean, a field a line."""
    texts = []
    for row in _rows(table, rng, rng.randint(2, 4)):
        fields = [
            f"{column.ko}: {text}"
            for column, text in zip(table.columns, row, strict=True)
            if text is not None
        ]
        texts.append(rng.choice(("\n", ", ")).join(fields))
    return f"{table.ko} ({table.name})\n" + "\n\n".join(texts)


LAYOUTS = (inserts, inserts, csv, pipes, records)


def excerpt(domain: Domain, tables: Sequence[str], rng: random.Random) -> str:
    """Rows of one or two of the tables."""
    chosen = rng.sample([domain.table(name) for name in tables], min(len(tables), rng.choice((1, 1, 2))))
    layout = rng.choice(LAYOUTS)
    texts = [layout(table, rng) for table in chosen]
    return "\n\n".join(texts)
