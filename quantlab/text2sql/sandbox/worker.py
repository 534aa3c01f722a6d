"""The process that runs SQL nobody trusts: it can read one database file and nothing else.

Started by `quantlab.text2sql.sandbox.pool` with `python -I -S`, so it has the standard library, and of the package only
what this file imports. It speaks frames (`messages.py`) on its standard input and output; the first one
carries the limits, every later one requests (each a query, or trials: `trial.py`), and the end of input ends
it. Each request is answered by a frame of its own as soon as it can be.

What holds a query back, in the order it meets them:
- the file is opened read-only (`mode=ro`, `immutable=1`), a second time for gold and for prediction;
- an authorizer lets SELECT, column reads of the file's own tables, harmless functions and recursion
  through, and refuses everything else (writes, ATTACH, PRAGMA, transactions, virtual tables, extensions);
- SQLite's own limits on value size, SQL length, heap, attached files and compound queries;
- a progress handler counts virtual-machine steps and looks at the clock;
- the fetch loop counts rows and bytes;
- the operating system limits address space and forbids this process to write any file (POSIX);
- an interval timer kills this process where SQLite never comes back to the handler (POSIX), and the parent
  does the same from outside on every system.

Not covered: a bug inside SQLite itself that runs code. The process has the user's rights to read files.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from quantlab.text2sql.sandbox.guard import STRIDE, Guard, open_database
from quantlab.text2sql.sandbox.messages import read_frame, write_frame
from quantlab.text2sql.sandbox.query import Answer, answer_query, explain, failure
from quantlab.text2sql.sandbox.trial import Trials

OPEN_CONNECTIONS = 16


class Worker:
    """Answers queries within `limits`; keeps a few connections open, never one for both gold and prediction."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits
        self.connections: OrderedDict[tuple[Any, ...], tuple[sqlite3.Connection, Guard]] = OrderedDict()
        self.trials = Trials(limits)

    def answer(self, request: dict[str, Any]) -> Answer:
        if "trials" in request:
            return {"trials": [self.trials.answer(**trial) for trial in request["trials"]]}
        started = time.monotonic()
        path = request["database"]
        key = (path, request["role"], *(version(path + suffix) for suffix in ("", "-wal", "-journal")))
        guard = Guard(frozenset())
        guard.start(self.limits, "")
        try:
            connection, guard = self.connections.get(key) or self._connect(key, path, guard)
        except (sqlite3.Error, sqlite3.Warning, OSError, MemoryError, ValueError) as error:
            kind, reason = explain(error, guard, self.limits)
            if kind in ("memory", "steps", "seconds"):
                return failure(kind, f"{reason} while the schema was read", started, guard.steps)
            return failure("database", f"cannot open the database: {reason}", started)
        self.connections.move_to_end(key)
        answer, usable = answer_query(connection, guard, request["sql"], self.limits)
        if not usable:
            self._forget(key)
        return answer

    def _connect(self, key: tuple[Any, ...], path: str, guard: Guard) -> tuple[sqlite3.Connection, Guard]:
        connection = open_database(path, self.limits)
        try:
            connection.set_progress_handler(guard.tick, STRIDE)
            names = connection.execute(
                "SELECT lower(name) FROM sqlite_master WHERE type IN ('table', 'view')"
            )
            guard.tables = frozenset(str(name) for (name,) in names)
            connection.set_authorizer(guard.authorize)
        except BaseException:
            connection.close()
            raise
        self.connections[key] = connection, guard
        while len(self.connections) > OPEN_CONNECTIONS:
            self._forget(next(iter(self.connections)))
        return connection, guard

    def _forget(self, key: tuple[Any, ...]) -> None:
        connection, _ = self.connections.pop(key)
        connection.close()


def version(path: str) -> tuple[int, ...]:
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def confine(limits: dict[str, Any]) -> None:
    """Process-wide limits: SQLite's heap, and on POSIX the address space, file writes and core dumps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; the end of input ends us
    memory = sqlite3.connect(":memory:")
    memory.execute(f"PRAGMA hard_heap_limit = {int(limits['memory_bytes'])}")
    memory.close()
    try:
        import resource
    except ImportError:
        return
    space = 2 * int(limits["memory_bytes"]) + 2**29
    for name, value in (("RLIMIT_AS", space), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # not every system has every limit; the others still hold


def _set_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> int:
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing but frames may reach the parent
    limits = read_frame(requests)
    if limits is None:
        return 0
    confine(limits)
    worker = Worker(limits)
    write_frame(answers, {"ready": True, "sqlite": sqlite3.sqlite_version})
    while (message := read_frame(requests)) is not None:
        for request in message["requests"]:
            # The default action of the timer's signal ends the process, even inside a call that never returns.
            _set_timer(2 * (limits["seconds"] * len(request.get("trials", "1")) + limits["grace"]))
            try:
                write_frame(answers, worker.answer(request))
            except MemoryError:  # while the answer was put into words: nothing of it has been sent
                reason = f"the answer needs more than {limits['memory_bytes']} bytes of memory"
                write_frame(answers, failure("memory", reason, time.monotonic()))
            _set_timer(0)
    return 0
