"""Trials: many queries on a small database that exists in the worker's memory only.

A trial is `create` (DDL that quantlab wrote from a parsed schema), `rows`, and queries. The database is
built under an authorizer of its own (nothing but CREATE TABLE and CREATE INDEX, then nothing but INSERT), its
foreign keys are checked, and then each query runs under the guard of every other query. The first query is
the reference: an answer that is identical to the reference's in values, types and order of rows leaves its
rows out (`same`), since most do not differ and the pipe would carry them all.

The tables stay from one trial to the next with the same `create`; the rows are inserted in a transaction
that is rolled back. So a query that comes again (the same mutants on the next candidate database) is
still prepared. Statements of ours end in a random comment: a query that repeats one of them must not be
handed the prepared one, which was authorized as ours.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from quantlab.text2sql.sandbox.guard import SCHEMA_TABLES, STRIDE, Guard, harden
from quantlab.text2sql.sandbox.query import Answer, answer_query, explain, failure

KEPT = 4  # databases with different `create`
PREPARED = 256  # statements kept on each

_CREATING = frozenset({sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_REINDEX})
_BOOKKEEPING = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_READ})


class Trials:
    """Answers trials within `limits`."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits
        self.databases: OrderedDict[str, _Database] = OrderedDict()

    def answer(self, create: str, rows: Sequence[Any], queries: Sequence[str]) -> list[Answer]:
        """One answer a query. All of them together have `seconds`, each by itself the other limits."""
        started = time.monotonic()
        deadline = started + self.limits["seconds"]
        left = dict(self.limits)  # of which the bytes of all answers together are taken
        answers: list[Answer] = []
        reference: _Reference | None = None
        database: _Database | None = None
        try:
            for sql in queries:
                if time.monotonic() > deadline:
                    reason = f"the queries before it took the {self.limits['seconds']:g} s of all"
                    answers.append(failure("seconds", reason, started))
                    continue
                database = database or self._filled(create, rows, deadline)
                answer, usable = answer_query(database.connection, database.guard, sql, left, deadline)
                if not answers and answer["kind"] == "rows":
                    reference = _Reference(answer)
                elif reference is not None and reference.is_repeated_by(answer):
                    answer |= {"rows": [], "bytes": 0, "same": True}
                left["result_bytes"] -= answer.get("bytes", 0)
                answers.append(answer)
                if not usable:  # it may have lost its transaction, and with it the rows
                    database.connection.close()
                    database = None
            if database is not None:
                self._keep(create, database)
        except _BuildFailed as error:
            wanting = len(queries) - len(answers)
            answers += [failure("database", str(error), started) for _ in range(wanting)]
        return answers

    def _filled(self, create: str, rows: Sequence[Any], deadline: float) -> _Database:
        database = self.databases.pop(create, None) or _Database(create, self.limits, deadline)
        try:
            database.fill(rows, deadline)
        except BaseException:
            database.connection.close()
            raise
        return database

    def _keep(self, create: str, database: _Database) -> None:
        database.empty()
        self.databases[create] = database
        while len(self.databases) > KEPT:
            self.databases.popitem(last=False)[1].connection.close()


class _BuildFailed(Exception):
    """The database of a trial cannot be built; the words say why."""


class _Database:
    def __init__(self, create: str, limits: dict[str, Any], deadline: float) -> None:
        self.limits = limits
        self.mark = f" -- {os.urandom(8).hex()}"
        self.phase = "own"
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=PREPARED)
        try:
            harden(self.connection, limits)
            self.guard = Guard(frozenset())
            self.guard.start(limits, "", deadline)
            self.connection.set_authorizer(self._authorize)
            self.connection.set_progress_handler(self.guard.tick, STRIDE)
            self._build("create", "the tables cannot be created", [("", create, None)])
            names = self._own("SELECT lower(name) FROM sqlite_master WHERE type = 'table'")
            self.guard.tables = frozenset(str(name) for (name,) in names)
        except BaseException:
            self.connection.close()
            raise

    def fill(self, rows: Sequence[Any], deadline: float) -> None:
        """Insert `rows` and check the foreign keys; from here on nothing can be written.

        (By the authorizer. Setting `query_only` too would make SQLite compile every kept statement again.)
        """
        self.guard.start(self.limits, "", deadline)
        self._own("BEGIN")
        inserts = []
        for table, columns, values in rows:
            names = ", ".join(_quoted(column) for column in columns)
            marks = ", ".join("?" * len(columns))
            sql = f"INSERT INTO {_quoted(table)} ({names}) VALUES ({marks}){self.mark}"
            inserts.append((table, sql, values))
        self._build("fill", "the rows cannot be inserted", inserts)
        broken = self._own("PRAGMA foreign_key_check")
        if broken:
            table, _, parent, _ = broken[0]
            raise _BuildFailed(f"foreign key of {table}: {len(broken)} rows, no such row in {parent}")
        self.phase = "read"

    def empty(self) -> None:
        self._own("ROLLBACK")

    def _build(self, phase: str, what: str, statements: Sequence[Any]) -> None:
        self.phase = phase
        at = ""
        try:
            for table, sql, values in statements:
                at = f"{table}: " if table else ""
                if values is None:
                    self.connection.executescript(sql)
                else:
                    self.connection.executemany(sql, values)
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError, TypeError) as error:
            _, reason = explain(error, self.guard, self.limits)
            raise _BuildFailed(f"{what}: {at}{reason}") from error
        finally:
            self.phase = "own"

    def _own(self, sql: str) -> list[Any]:
        self.phase = "own"
        try:
            return self.connection.execute(sql + self.mark).fetchall()
        except (sqlite3.Error, MemoryError) as error:
            raise _BuildFailed(f"{sql}: {explain(error, self.guard, self.limits)[1]}") from error

    def _authorize(
        self, action: int, first: str | None, second: str | None, database: str | None, inner: str | None
    ) -> int:
        if self.phase == "read":
            return self.guard.authorize(action, first, second, database, inner)
        if self.phase == "own":
            return sqlite3.SQLITE_OK
        schema = (first or "").lower() in SCHEMA_TABLES
        refused = "only CREATE TABLE, CREATE INDEX and rows are allowed here"
        if action == sqlite3.SQLITE_FUNCTION:
            allowed, refused = self.guard.harmless(second), f"the function {second} is not allowed here"
        elif self.phase == "create":
            allowed = action in _CREATING or (
                action in _BOOKKEEPING and (schema or action == sqlite3.SQLITE_READ)
            )
        else:
            allowed = action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_READ) and not schema
        if not allowed:
            self.guard.denied = self.guard.denied or refused
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


class _Reference:
    """The first answer of a trial. 1 == 1.0 in Python, so what the rows print as is compared too."""

    def __init__(self, answer: Answer) -> None:
        self.rows, self.width = answer["rows"], len(answer["columns"])
        self.printed = repr(self.rows)

    def is_repeated_by(self, answer: Answer) -> bool:
        return (
            answer["kind"] == "rows"
            and len(answer["columns"]) == self.width
            and answer["rows"] == self.rows
            and repr(answer["rows"]) == self.printed
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
