"""Running one guarded query to its answer: rows, or the kind of failure and the reason in words.

The answer is a dictionary that can be written as JSON. What may be returned is limited here (rows, bytes,
columns); what may be executed is limited by the guard and by SQLite (`guard.py`).
"""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from quantlab.text2sql.sandbox.guard import Guard, first_word

Answer = dict[str, Any]

REASON_CHARACTERS = 300  # SQLite repeats names and tokens of any length in its messages
# Errors of the file or of its surroundings, whatever the query was.
FILE_ERRORS = frozenset(
    {
        sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL,
    }
)  # fmt: skip


class QueryFailed(Exception):
    """The query ran, and what it returned or was is not acceptable."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def answer_query(
    connection: sqlite3.Connection,
    guard: Guard,
    sql: str,
    limits: dict[str, Any],
    deadline: float | None = None,
) -> tuple[Answer, bool]:
    """(the answer, whether the connection may go on being used). `deadline` is in `time.monotonic` seconds."""
    started = time.monotonic()
    guard.start(limits, first_word(sql), deadline)
    try:
        columns, rows, size = _fetch(connection, guard, sql, limits)
    except QueryFailed as failed:
        return failure(failed.kind, str(failed), started, guard.steps), True
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError, RecursionError) as error:
        kind, reason = explain(error, guard, limits)
        return failure(kind, reason, started, guard.steps), kind not in ("memory", "steps", "seconds")
    return {
        "kind": "rows", "columns": columns, "rows": rows, "bytes": size, "steps": guard.steps,
        "seconds": time.monotonic() - started,
    }, True  # fmt: skip


def failure(kind: str, reason: str, started: float, steps: int = 0) -> Answer:
    return {"kind": kind, "reason": reason, "steps": steps, "seconds": time.monotonic() - started}


def explain(error: BaseException, guard: Guard, limits: dict[str, Any]) -> tuple[str, str]:
    """Kind and reason of what SQLite raised; the guard's own reason comes before SQLite's "interrupted"."""
    if guard.stopped == "steps":
        return "steps", f"stopped after {limits['steps']} steps"
    if guard.stopped == "seconds":
        return "seconds", f"stopped after {limits['seconds']:g} s"
    if isinstance(error, MemoryError):
        return "memory", f"more than {limits['memory_bytes']} bytes of memory were needed"
    if guard.denied:
        return "denied", guard.denied
    text = _clipped(str(error) or type(error).__name__)
    if text == "not authorized":  # the guard was not even asked: a name that is no UTF-8
        return "denied", text
    # The lower byte is the primary code, the rest details it.
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in FILE_ERRORS:
        return "database", text
    if isinstance(error, sqlite3.DataError) or "too big" in text:
        return "size", text
    if "one statement at a time" in text:
        return "several", "more than one statement"
    return "sql", text


def _clipped(text: str) -> str:
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]}…"


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    return len(value) if isinstance(value, bytes) else 8


def _fetch(
    connection: sqlite3.Connection, guard: Guard, sql: str, limits: dict[str, Any]
) -> tuple[list[str], list[tuple[Any, ...]], int]:
    if _size(sql) > limits["sql_bytes"]:
        raise QueryFailed("size", f"the query is longer than {limits['sql_bytes']} bytes")
    if guard.word == "EXPLAIN":
        raise QueryFailed("denied", "EXPLAIN is not a query on the data")
    cursor = connection.execute(sql)
    try:
        if cursor.description is None:
            if guard.word:
                raise QueryFailed("denied", f"{guard.word} is not a query on the data")
            raise QueryFailed("empty", "there is no query in the text")
        columns = [column[0] for column in cursor.description]
        rows: list[tuple[Any, ...]] = []
        size = sum(map(_size, columns))
        for row in cursor:
            rows.append(row)
            size += sum(map(_size, row))
            if len(rows) > limits["rows"]:
                raise QueryFailed("too_many_rows", f"the result has more than {limits['rows']} rows")
            if size > limits["result_bytes"]:
                break
        if size > limits["result_bytes"]:
            raise QueryFailed("size", f"the result is larger than {limits['result_bytes']} bytes")
        return columns, rows, size
    finally:
        cursor.close()
