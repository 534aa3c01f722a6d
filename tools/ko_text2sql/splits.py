"""The development and training pairs: drawn from the grammar, run against the databases, kept apart by
hash.

A pair is kept when its query returns at least one value that says something (rows, and not only
NULL or a lone zero) and neither its question nor its query was seen before. Development pairs come
from the part that `exclusions` sets aside, training pairs from the rest. Development pairs are also
balanced over domains, levels and kinds, and a top-n query whose last row is tied with the next is
left out, since then several answers are right.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantlab.data.domains import Domain
from quantlab.data.exclusions import Exclusions, query_aside, question_aside
from tools.ko_text2sql.grammar import KINDS, Pair, generate
from tools.ko_text2sql.handwritten import context_tables

LEVELS = ("easy", "medium", "hard")
DEV_A_DOMAIN = 36
TRAIN_A_DOMAIN = 1400
TRIES = 4000  # for one development pair of a given kind
_TOP = re.compile(r"SELECT (.+?) FROM (.+) ORDER BY (.+) (ASC|DESC) LIMIT (\d+)")
_INNER = re.compile(r"\((SELECT [^()]+ LIMIT \d+)\)")

Row = dict[str, Any]


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        yield connection


def says_something(connection: sqlite3.Connection, sql: str) -> bool:
    """Whether the query returns rows that are not all NULL, and not just a zero."""
    rows = connection.execute(sql).fetchmany(50)
    values = [value for row in rows for value in row]
    if len(values) == 1:
        return values[0] not in (None, 0)
    return any(value is not None for value in values)


def is_tied(connection: sqlite3.Connection, sql: str) -> bool:
    """Whether another row would have been as good as the last one that LIMIT let through, here or in a subquery."""
    return any(_tied(connection, query) for query in (sql.rstrip(";"), *_INNER.findall(sql)))


def _tied(connection: sqlite3.Connection, query: str) -> bool:
    match = _TOP.fullmatch(query)
    if not match:
        return False
    shown, source, key, direction, limit = match.groups()
    if ", " in key and "(" not in key:
        return True  # several keys: not worth telling apart
    values = connection.execute(
        f"SELECT {shown}, {key} FROM {source} ORDER BY {key} {direction} LIMIT {int(limit) + 1}"
    ).fetchall()
    return len(values) > int(limit) and values[-1][-1] == values[-2][-1]


def as_row(name: str, domain: Domain, pair: Pair, context: bool) -> Row:
    """A row of the data set; the tables shown are those of the query and one or two others."""
    tables = list(context_tables(domain, pair.tables, f"{domain.name}/{pair.question}"))
    row: Row = {"id": name, "db_id": domain.db_id, "db": domain.name, "tables": tables}
    if context:
        row["context"] = domain.ddl(tables)
    row |= {"question": pair.question, "answer": pair.sql, "level": pair.level, "kind": pair.kind}
    row["database"] = f"databases/{domain.name}.sqlite"
    return row


def _dev_pair(
    domain: Domain, kind: str, connection: sqlite3.Connection, taken: Exclusions, rng: random.Random
) -> Pair | None:
    for _ in range(TRIES):
        pair = generate(domain, rng, kind=kind)
        if pair.kind != kind:
            return None  # this domain has nothing to ask of that kind
        if not (question_aside(pair.question) and query_aside(domain.name, pair.sql)):
            continue
        if taken.meets(domain.name, pair.question, pair.sql):
            continue
        if says_something(connection, pair.sql) and not is_tied(connection, pair.sql):
            return pair
    return None


def dev_rows(domains: Sequence[Domain], databases: Path, test: Iterable[Row]) -> list[Row]:
    """The development set: as many pairs of every domain, levels in equal parts, kinds taking turns."""
    taken = Exclusions(test)
    rng = random.Random("development pairs")
    rows: list[Row] = []
    turns: Counter[str] = Counter()  # how often each kind has been used, over all domains
    for domain in domains:
        with open_database(databases / f"{domain.name}.sqlite") as connection:
            for level in LEVELS:
                kinds = [kind for kind in KINDS if KINDS[kind].level == level]
                wanted = DEV_A_DOMAIN // len(LEVELS)
                while wanted and kinds:
                    kind = min(kinds, key=lambda kind: (turns[kind], rng.random()))
                    pair = _dev_pair(domain, kind, connection, taken, rng)
                    if pair is None:
                        kinds.remove(kind)
                        continue
                    turns[kind] += 1
                    wanted -= 1
                    taken.add(domain.name, pair.question, pair.sql)
                    rows.append(as_row(f"dev-{len(rows) + 1:03}", domain, pair, context=True))
    return rows


def train_rows(domains: Sequence[Domain], databases: Path, evaluation: Iterable[Row]) -> list[Row]:
    """The training set: as many pairs of every domain, kinds as often as the grammar draws them, shuffled."""
    listed = Exclusions(evaluation)
    seen = Exclusions(())
    rng = random.Random("training pairs")
    pairs: list[tuple[Domain, Pair]] = []
    for domain in domains:
        kept = 0
        with open_database(databases / f"{domain.name}.sqlite") as connection:
            while kept < TRAIN_A_DOMAIN:
                pair = generate(domain, rng)
                if not listed.allows_training(domain.name, pair.question, pair.sql):
                    continue
                if seen.meets(domain.name, pair.question, pair.sql):
                    continue
                if says_something(connection, pair.sql):
                    seen.add(domain.name, pair.question, pair.sql)
                    pairs.append((domain, pair))
                    kept += 1
    rng.shuffle(pairs)
    return [
        as_row(f"train-{number:05}", domain, pair, context=False)
        for number, (domain, pair) in enumerate(pairs, start=1)
    ]
