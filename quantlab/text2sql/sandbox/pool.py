"""Running SQL that a model wrote: a pool of killable worker processes, each able only to read.

    with Sandbox(workers=2) as sandbox:
        execution = sandbox.run(path, "SELECT 1", role="prediction")

`run` never raises for anything the SQL does: the outcome is rows, an error, or a timeout, with the reason.
A worker that does not answer in time is killed and replaced, and the next query does not wait for it. `map`
spreads calls over the workers and keeps their order. `trial` runs many queries on a database that exists
in the worker's memory only. What the worker itself refuses is described in `worker.py`.
"""

from __future__ import annotations

import queue
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from quantlab.text2sql.sandbox.process import WorkerProcess

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Role = Literal["gold", "prediction"]

_PAGE_BYTES = 512  # the smallest page, and so the smallest database
_WATCH_SECONDS = 0.05


@dataclass(frozen=True)
class Limits:
    """What one query may use. Steps are SQLite virtual-machine steps, the same on every machine."""

    seconds: float = 5.0
    grace: float = 0.5  # seconds more until a worker that does not answer is killed
    steps: int = 50_000_000
    rows: int = 100_000
    result_bytes: int = 16_000_000
    value_bytes: int = 1_000_000
    sql_bytes: int = 100_000
    memory_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Execution:
    """What became of one query: `kind` for programs, `reason` in words.

    rows: kind rows; timeout: steps or seconds; error: sql (SQLite's own message), denied, several (statements), empty
    (no statement), size (of a value, the result or the query), too_many_rows, memory, database, crash.
    """

    status: Literal["rows", "error", "timeout"]
    kind: str
    reason: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    steps: int = 0
    seconds: float = 0.0
    same: bool = False  # in a trial: the rows are those of the trial's first query


@dataclass(frozen=True)
class Trial:
    """Queries on a database that exists only for them.

    `create` is DDL (CREATE TABLE and CREATE INDEX alone), `rows` holds (table, column names, rows of values: None, int,
    float, str or bytes).
    """

    create: str
    rows: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]
    queries: Sequence[str]


class Sandbox:
    """`workers` processes, started when first needed; a context manager. Safe to use from several threads.

    MachineError where the processes cannot be started.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 1) -> None:
        self.limits = limits or Limits()
        self.workers = max(1, workers)
        self._all: list[WorkerProcess] = [WorkerProcess(asdict(self.limits)) for _ in range(self.workers)]
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        for process in self._all:
            self._idle.put(process)
        self._watch: threading.Thread | None = None
        self._closed = threading.Event()
        self._starting = threading.Lock()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a later `run` would start them again."""
        with self._starting:
            self._closed.set()
            if self._watch is not None:
                self._watch.join()
                self._watch = None
        for process in self._all:
            process.stop()

    def run(self, database: Path | str, sql: str, role: Role = "prediction") -> Execution:
        """Run one query on its own read-only connection. Gold and prediction never share one."""
        return self.run_all(database, [(sql, role)])[0]

    def run_all(self, database: Path | str, queries: Sequence[tuple[str, Role]]) -> list[Execution]:
        """Run several queries, one after the other, each as by `run` and within its own limits; one round trip.

        A query that does not come back is killed with its worker, and the ones behind it go to the next worker.
        """
        path = Path(database).absolute()
        problem = _problem(path)
        if problem:
            return [Execution("error", "database", problem) for _ in queries]
        requests = [
            {"database": str(path), "sql": self._sendable(sql), "role": role} for sql, role in queries
        ]
        return [_execution(answer) for answer in self._ask(requests, self.limits.seconds)]

    def trial(
        self,
        create: str,
        rows: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]],
        queries: Sequence[str],
    ) -> list[Execution]:
        """Build a database in the worker's memory and run `queries` on it; one round trip, one answer a query.

        All of them together have `limits.seconds`, each by itself the other limits. Where the database cannot be built
        (DDL, rows, a foreign key without its row) every answer is an error of kind `database`. What equals the first
        query's rows in values, types and order is marked `same`.
        """
        return self.trials([Trial(create, rows, queries)])[0]

    def trials(self, trials: Sequence[Trial]) -> list[list[Execution]]:
        """Several trials in one round trip. They share a fate where one of them hangs inside the engine."""
        if not trials:
            return []
        requests = [
            {
                "create": trial.create,
                "rows": list(trial.rows),
                "queries": [self._sendable(sql) for sql in trial.queries],
            }
            for trial in trials
        ]
        answer = self._ask([{"trials": requests}], self.limits.seconds * len(trials))[0]
        if "trials" not in answer:
            return [[_execution(answer)] * len(trial.queries) for trial in trials]
        return [_filled_in([_execution(one) for one in answers]) for answers in answer["trials"]]

    def _sendable(self, sql: str) -> str:
        """What is too long is refused by the worker, which need not see all of it.

        Lone surrogates have no UTF-8 form; a replacement character keeps the query a query, and an honest error.
        """
        return sql[: self.limits.sql_bytes + 1].encode("utf-8", "replace").decode("utf-8")

    def _ask(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
        if self._watch is None:
            self._start_watch()
        process = self._idle.get()
        try:
            return process.ask(requests, seconds + self.limits.grace)
        finally:
            self._idle.put(process)

    def _start_watch(self) -> None:
        """One thread that looks after all deadlines: a timer for each question would cost more than most questions."""

        def watch() -> None:
            while not self._closed.wait(_WATCH_SECONDS):
                for process in self._all:
                    process.kill_if_late()

        with self._starting:
            if self._watch is None:
                self._closed.clear()
                self._watch = threading.Thread(target=watch, name="sandbox-watch", daemon=True)
                self._watch.start()

    def map(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
        """`function` over `items`, as many at a time as there are workers; results in the order of the items."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as executor:
            yield from executor.map(function, items)


def _problem(path: Path) -> str:
    """Why `path` cannot be a database, if it can be seen from outside."""
    try:
        status = path.stat()
    except OSError as error:
        return f"there is no database file {path}: {error.strerror}"
    except ValueError as error:
        return f"there is no database file {path}: {error}"
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device may never end
        return f"{path} is not a regular file"
    if status.st_size < _PAGE_BYTES:  # SQLite takes an empty file for an empty database
        return f"{path} is no SQLite database: {status.st_size} bytes"
    return ""


def _filled_in(executions: list[Execution]) -> list[Execution]:
    return [replace(one, rows=executions[0].rows) if one.same else one for one in executions]


def _execution(answer: dict[str, Any]) -> Execution:
    kind, steps, seconds = answer["kind"], answer["steps"], answer["seconds"]
    if kind == "rows":
        rows = tuple(map(tuple, answer["rows"]))
        same = bool(answer.get("same"))
        return Execution("rows", "rows", "", tuple(answer["columns"]), rows, steps, seconds, same)
    if kind in ("steps", "seconds"):
        return Execution("timeout", kind, answer["reason"], (), (), steps, seconds)
    return Execution("error", kind, answer["reason"], (), (), steps, seconds)
