"""Running SQL that a model wrote: a pool of killable worker processes, each able only to read.

    with Sandbox(workers=2) as sandbox:
        execution = sandbox.run(path, "SELECT 1", role="prediction")

`run` never raises for anything the SQL does: the outcome is rows, an error, or a timeout, with the reason.
A worker that does not answer in time is killed and replaced, and the next query does not wait for it. `map`
spreads calls over the workers and keeps their order. What the worker itself refuses is described in
`worker.py`.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from quantlab.errors import MachineError
from quantlab.sql.worker import decode_value, read_frame, write_frame

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Role = Literal["gold", "prediction"]

_SCRIPT = Path(__file__).with_name("worker.py")
_START_SECONDS = 30.0
# What a worker inherits: enough to find shared libraries, no secret.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL")


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


class Sandbox:
    """`workers` processes, started when first needed; a context manager. Safe to use from several threads."""

    def __init__(self, limits: Limits | None = None, workers: int = 1) -> None:
        self.limits = limits or Limits()
        self.workers = max(1, workers)
        self._all: list[_Process] = [_Process(self.limits) for _ in range(self.workers)]
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        for process in self._all:
            self._idle.put(process)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a later `run` would start them again."""
        for process in self._all:
            process.stop()

    def run(self, database: Path | str, sql: str, role: Role = "prediction") -> Execution:
        """Run one query on its own read-only connection. Gold and prediction never share one."""
        path = Path(database)
        if not path.is_file():
            return Execution("error", "database", f"there is no database file {path}")
        if "\x00" in sql:
            return Execution("error", "sql", "the query contains a NUL character")
        if len(sql) > self.limits.sql_bytes:
            return Execution("error", "size", f"the query is longer than {self.limits.sql_bytes} bytes")
        # Lone surrogates have no UTF-8 form; a replacement character keeps the query a query, and an honest error.
        clean = sql.encode("utf-8", "replace").decode("utf-8")
        process = self._idle.get()
        try:
            return process.ask({"database": str(path.absolute()), "sql": clean, "role": role})
        finally:
            self._idle.put(process)

    def map(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
        """`function` over `items`, as many at a time as there are workers; results in the order of the items."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as executor:
            yield from executor.map(function, items)


class _Process:
    """One worker process and the pipes to it; replaced by a fresh one whenever it dies."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> Execution:
        process = self._started()
        try:
            answer, late = self._exchange(process, request, self.limits.seconds + self.limits.grace)
        except BaseException:
            self._discard()  # interrupted half-way: whatever it still answers must not meet the next question
            raise
        if answer is not None:
            return _execution(answer)
        code = self._discard()
        if late or code == -14:  # -14: the worker's own timer (SIGALRM) was faster
            reason = f"hung inside the engine; killed after {self.limits.seconds + self.limits.grace:g} s"
            return Execution("timeout", "seconds", reason)
        return Execution("error", "crash", f"the process that ran the query died (exit code {code})")

    def stop(self) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()  # the end of input is the request to end
            self.process.wait(timeout=1.0)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
        self._discard()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        if self.process is not None:
            self._discard()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise MachineError(f"cannot start the SQL worker process: {error}") from error
        self.process = process
        ready, _ = self._exchange(process, asdict(self.limits), _START_SECONDS)
        if ready is None:
            process.kill()
            _, stderr = process.communicate()
            self.process = None
            words = stderr.decode("utf-8", "replace").strip().splitlines()
            raise MachineError("the SQL worker process does not start" + (f": {words[-1]}" if words else ""))
        return process

    def _exchange(
        self, process: subprocess.Popen[bytes], message: dict[str, Any], seconds: float
    ) -> tuple[dict[str, Any] | None, bool]:
        """(answer or None, whether the worker was killed for being late)."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        answer = None
        try:
            write_frame(process.stdin, message)
            answer = read_frame(process.stdout)
        except (OSError, ValueError):
            pass  # the pipe broke or carries half a frame: the worker is gone, and that is the answer
        finally:
            timer.cancel()
        if late.is_set() and answer is not None:
            self._discard()  # answered in the very moment it was killed
        return answer, late.is_set()

    def _discard(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # an unsent byte of a request to a dead worker
        return code


def _execution(answer: dict[str, Any]) -> Execution:
    kind, steps, seconds = answer["kind"], answer["steps"], answer["seconds"]
    if kind == "rows":
        rows = tuple(tuple(decode_value(value) for value in row) for row in answer["rows"])
        return Execution("rows", "rows", "", tuple(answer["columns"]), rows, steps, seconds)
    if kind in ("steps", "seconds"):
        return Execution("timeout", kind, answer["reason"], (), (), steps, seconds)
    return Execution("error", kind, answer["reason"], (), (), steps, seconds)
