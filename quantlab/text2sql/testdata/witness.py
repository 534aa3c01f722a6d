"""Witness databases: small databases, made from DDL and a gold query alone, that tell the query from its mutants.

Where a question comes without a populated database, `build` makes a few: rows around the query's constants (`clues`,
`values`, `rows`), tried against the query's mutants (`mutate`) by a search (`witness_search`), until every mutant gives
another result than the gold on some database (by the rules of `compare`), or the candidates are used up. Mutants that
live on are either the same query in other words or a gap; their number is reported, never hidden (`Witness.score`).

The databases are written once and found again by the digest of schema, golds, seed and this module's version.
Everything that runs SQL is in the sandbox; the files are written from values of ours. Deterministic: the same input
gives the same rows.

The idea of distilled databases for Text2SQL is Zhong, Yu and Klein 2020 (arXiv:2010.02840), who needed the benchmark's
own databases to start from; data made against mutants is Chandra et al. 2015 (XData).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import MachineError
from quantlab.paths import file_digest
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.schema.schema import Schema, create_database, quote_name
from quantlab.text2sql.testdata.mutants import Mutant
from quantlab.text2sql.testdata.search import Search
from quantlab.text2sql.testdata.value_pool import TableRows

VERSION = 1  # of everything that decides the rows


@dataclass(frozen=True)
class Witness:
    """`databases` may be empty: then `reason` says why none could be made."""

    databases: tuple[Path, ...]
    mutants: int = 0
    killed: int = 0
    survivors: tuple[Mutant, ...] = ()
    reason: str = ""

    @property
    def score(self) -> float | None:
        """Share of mutants told apart from the gold; None without mutants."""
        return self.killed / self.mutants if self.mutants else None


def build(schema: Schema, golds: Sequence[str], sandbox: Sandbox, folder: Path, *, seed: int = 0) -> Witness:
    """The witness databases of one question, from `folder` where they have been made before.

    `golds` are in SQLite's dialect, the first one is mutated. MachineError where `folder` cannot be written.
    """
    name = digest(schema, golds, seed)
    place = folder / name
    found = _load(place)
    if found is not None:
        return found
    search = Search(schema, golds, sandbox, name)
    chosen = search.run()
    if not chosen:
        return Witness((), reason=search.reason or "no rows were found for which the gold query returns any")
    record = {
        "databases": len(chosen),
        "mutants": search.total,
        "killed": search.total - len(search.alive),
        "survivors": [[mutant.operator, mutant.sql] for mutant in search.alive],
        "golds": list(golds),
        "seed": seed,
        "version": VERSION,
    }
    _save(place, search.schema, chosen, record)
    loaded = _load(place)
    assert loaded is not None
    return loaded


def digest(schema: Schema, golds: Sequence[str], seed: int) -> str:
    """32 hexadecimal characters naming what the databases depend on."""
    text = json.dumps([VERSION, seed, schema.create_sql(), list(golds)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _save(place: Path, schema: Schema, chosen: Sequence[Sequence[TableRows]], record: dict[str, Any]) -> None:
    """Write the databases beside, and rename the folder into place: a reader sees all of it or nothing."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".witness-", dir=place.parent))
        try:
            record["sha256"] = []
            for number, rows in enumerate(chosen):
                content = _content(schema, rows)
                (beside / f"{number}.sqlite").write_bytes(content)
                record["sha256"].append(hashlib.sha256(content).hexdigest())
            (beside / "witness.json").write_text(
                json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
            if place.is_dir() and _load(place) is None:  # damaged
                shutil.rmtree(place, ignore_errors=True)
            try:
                os.replace(beside, place)
            except OSError:
                if not place.is_dir():  # another process was faster: the same content
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"cannot write witness databases under {place.parent}: {error}") from error


def _content(schema: Schema, rows: Sequence[TableRows]) -> bytes:
    """A SQLite file's bytes; made in memory, as waiting for the disk would take most of the time."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        create_database(schema, connection)
        for table, columns, values in rows:
            names = ", ".join(quote_name(column) for column in columns)
            marks = ", ".join("?" * len(columns))
            connection.executemany(f"INSERT INTO {quote_name(table)} ({names}) VALUES ({marks})", values)
        connection.commit()
        return connection.serialize()


def _load(place: Path) -> Witness | None:
    """What was made before, or None where it is missing or damaged."""
    try:
        record = json.loads((place / "witness.json").read_text(encoding="utf-8"))
        databases = tuple(place / f"{number}.sqlite" for number in range(record["databases"]))
        survivors = tuple(Mutant(operator, sql) for operator, sql in record["survivors"])
        if any(file_digest(path) != wanted for path, wanted in zip(databases, record["sha256"], strict=True)):
            return None
        return Witness(databases, record["mutants"], record["killed"], survivors)
    except (OSError, ValueError, KeyError, TypeError):
        return None
