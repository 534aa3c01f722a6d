"""The ledger: one SQLite file that remembers every answer that was paid for, and every attempt to get one.

    with Ledger(path) as ledger:
        ledger.get(request_key("gpt-4o", request))

Three kinds of rows. An *answer* is kept under the hash of (model, messages, parameters). An *attempt* is written before
a request is sent, with what it may cost at worst, and closed when its fate is known: `paid` (a complete answer came,
usable or not), `refused` (429, 5xx, no connection: nothing was generated), or `uncertain` (a hang, a reset, a killed
process: it may have been generated and billed, nobody here can know). An open attempt is also the claim that keeps a
second process from paying for the same request, and the attempts' times are the sliding window of the rate budgets
(`quantlab.teacher.budget`). An *account* sums the attempts of one purpose at one endpoint. A *batch* is one of the
Batch API that may still be open.

The file is in WAL mode with `synchronous=FULL`: a commit survives `kill -9` and a power cut. WAL needs a local disk; on
a network file system SQLite cannot promise anything. Several processes of one machine may share the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quantlab.errors import DataError, MachineError
from quantlab.paths import atomic_writer

APPLICATION = 0x514C4C47  # "QLLG", in the file's header
VERSION = 1
BUSY_SECONDS = 30.0
CHECKED_BYTES = 256_000_000  # larger files are opened without SQLite's quick check

_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, content TEXT NOT NULL, model TEXT NOT NULL, kind TEXT NOT NULL, label TEXT NOT NULL,
    messages TEXT NOT NULL, parameters TEXT NOT NULL, text TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL,
    finish TEXT NOT NULL, seconds REAL NOT NULL, counted INTEGER NOT NULL, at REAL NOT NULL
);
CREATE INDEX answers_kind ON answers (model, kind);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, scope TEXT NOT NULL, budget TEXT, owner TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('sent', 'paid', 'refused', 'uncertain')),
    sent REAL NOT NULL, done REAL NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL,
    outcome TEXT NOT NULL DEFAULT '', seconds REAL NOT NULL DEFAULT 0
);
CREATE INDEX attempts_open ON attempts (key) WHERE state = 'sent';
CREATE INDEX attempts_scope ON attempts (scope) WHERE state = 'sent';
CREATE INDEX attempts_sent ON attempts (budget, sent) WHERE budget IS NOT NULL;
CREATE INDEX attempts_done ON attempts (budget, done, input_tokens, output_tokens) WHERE budget IS NOT NULL;
CREATE TABLE accounts (
    scope TEXT PRIMARY KEY, sent INTEGER NOT NULL DEFAULT 0, paid INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0, uncertain INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0,
    usd REAL NOT NULL DEFAULT 0, uncertain_usd REAL NOT NULL DEFAULT 0
);
CREATE TABLE batches (
    name TEXT PRIMARY KEY, scope TEXT NOT NULL, owner TEXT NOT NULL, id TEXT,
    state TEXT NOT NULL CHECK (state IN ('creating', 'open', 'closed')), created REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Request:
    """One question to a model. `parameters` go into the request's body as they are (max_tokens, temperature,
    response_format, …). `label` is for people, `question` and `evidence` find recorded answers; none of them is part of
    the key, which has them as the messages show them."""

    messages: tuple[Mapping[str, str], ...]
    parameters: Mapping[str, Any]
    label: str
    question: str | None = None
    evidence: str = ""

    @property
    def max_tokens(self) -> int | None:
        found = self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))
        return None if found is None else int(found)

    @property
    def kind(self) -> str:
        """Requests whose answers have about the same length: same limit, same schema."""
        form = self.parameters.get("response_format")
        named = form.get("json_schema", {}).get("name", "json") if isinstance(form, Mapping) else "text"
        return f"{self.max_tokens}/{named}"


@dataclass(frozen=True)
class Answer:
    """A complete answer. `usd` is what this answer cost, `finish` why it ended (`stop`, `length`, …)."""

    text: str
    input_tokens: int
    output_tokens: int
    usd: float
    finish: str
    seconds: float


@dataclass(frozen=True)
class Totals:
    """What was spent. `requests` were answered completely, usable or not, and are what `usd` and the tokens count.
    `refused` cost nothing. `uncertain` may have been billed for up to `uncertain_usd`; `open` are in flight."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    sent: int = 0
    refused: int = 0
    uncertain: int = 0
    uncertain_usd: float = 0.0
    open: int = 0


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    raise TypeError(f"a request holds a {type(value).__name__}, which JSON cannot say")


def request_key(model: str, request: Request) -> str:
    """SHA-256, hexadecimal, of model, messages and parameters. Where it was asked is no part of it."""
    return _hash([model, list(request.messages), request.parameters])


def content_key(request: Request) -> str:
    """SHA-256, hexadecimal, of the messages alone: finds a recorded answer for whatever model is asked."""
    return _hash(list(request.messages))


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class Ledger:
    """The open file. One object may be used from several threads; processes open their own.

    Raises:
        DataError: the file is no ledger, is damaged, or was written by a newer version. MachineError: the disk is full
        or the place cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._explained():
            if path.is_dir():
                raise DataError(f"{path} is a directory", hint="give the path of the ledger file")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, on disk when the block ends, alone among all processes that write."""
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._explained():
            return self._connection.execute(sql, parameters).fetchall()

    def get(self, key: str) -> Answer | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Those of `keys` that are answered."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Answer] = {}
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            sql = "SELECT key, text, input_tokens, output_tokens, usd, finish, seconds FROM answers WHERE key IN "
            found.update((row[0], Answer(*row[1:])) for row in self.rows(f"{sql}({marks})", part))
        return found

    def put(self, key: str, model: str, request: Request, answer: Answer, *, scope: str = "") -> bool:
        """Keep an answer that was not asked for through an attempt (a model on this machine, a recorded answer),
        and count it. Committed on return; False when there was one already, which stays."""
        with self.transaction() as connection:
            if not insert_answer(connection, key, model, request, answer):
                return False
            connection.execute("INSERT OR IGNORE INTO accounts (scope) VALUES (?)", (scope,))
            connection.execute(
                "UPDATE accounts SET sent = sent + 1, paid = paid + 1, input_tokens = input_tokens + ?,"
                " output_tokens = output_tokens + ?, usd = usd + ? WHERE scope = ?",
                (answer.input_tokens, answer.output_tokens, answer.usd, scope),
            )
        return True

    def totals(self, scope: str | None = None) -> Totals:
        """What the ledger has recorded, in all or for one account."""
        where, values = ("", ()) if scope is None else (" WHERE scope = ?", (scope,))
        names = (
            "requests",
            "input_tokens",
            "output_tokens",
            "usd",
            "sent",
            "refused",
            "uncertain",
            "uncertain_usd",
        )
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in ("paid", *names[1:]))
        row = self.rows(f"SELECT {sums} FROM accounts{where}", values)[0]
        still = " WHERE state = 'sent'" + (" AND scope = ?" if values else "")
        flying = self.rows(f"SELECT count(*) FROM attempts{still}", values)[0][0]
        return Totals(**dict(zip(names, row, strict=True)), open=flying)

    def export(self, path: Path) -> int:
        """Write every answer as a line of JSON that `file:<path>` teachers read; returns how many."""
        count = 0
        with atomic_writer(path) as stream, self._lock, self._explained():
            for content, label, text in self._connection.execute(
                "SELECT content, label, text FROM answers ORDER BY content, key"
            ):
                line = {"key": content, "label": label, "text": text}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        return count

    def _prepare(self) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        application, version = self._header()
        if (application, version) == (0, 0):
            if self.rows("SELECT count(*) FROM sqlite_master")[0][0]:
                raise DataError(
                    f"{self.path} is a database, but no ledger", hint="give the ledger another path"
                )
            self._switch_to_wal()
            self._create()
        elif application != APPLICATION:
            raise DataError(f"{self.path} is a database, but no ledger", hint="give the ledger another path")
        elif version > VERSION:
            raise DataError(
                f"{self.path} was written by a newer quantlab (its version is {version}, this one reads {VERSION})",
                hint="update quantlab, or give the ledger another path",
            )
        else:
            self._switch_to_wal()
        self._connection.execute("PRAGMA synchronous = FULL")
        if self.path.stat().st_size <= CHECKED_BYTES:
            damage = self.rows("PRAGMA quick_check(1)")[0][0]
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)

    def _header(self) -> tuple[int, int]:
        names = ("application_id", "user_version")
        application, version = (self.rows(f"PRAGMA {name}")[0][0] for name in names)
        return application, version

    def _switch_to_wal(self) -> None:
        """The busy timeout does not cover this switch when two processes make a new file at once."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _create(self) -> None:
        with self.transaction() as connection:
            if self._header() != (0, 0):  # another process was first
                return
            for statement in _SCHEMA.split(";"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's and the system's complaints as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise MachineError(
                f"the ledger {self.path} cannot be used: {error}",
                hint="is the disk full, the file read-only, or held by another program?",
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is not a sound ledger: {error}",
                hint="restore it from a copy, try `sqlite3 FILE .recover`, or give the ledger another path",
            ) from error
        except OSError as error:
            raise MachineError(
                f"the ledger {self.path} cannot be opened: {error.strerror or error}",
                hint="give a place that can be written",
            ) from error


def insert_answer(
    connection: sqlite3.Connection,
    key: str,
    model: str,
    request: Request,
    answer: Answer,
    counted: bool = True,
) -> bool:
    """Inside a transaction. False when the key has an answer already: the first one stays.
    `counted`: its tokens were reported by the server rather than estimated here."""
    cursor = connection.execute(
        "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            key,
            content_key(request),
            model,
            request.kind,
            request.label,
            canonical(list(request.messages)),
            canonical(request.parameters),
            answer.text,
            answer.input_tokens,
            answer.output_tokens,
            answer.usd,
            answer.finish,
            answer.seconds,
            int(counted),
            time.time(),
        ),
    )
    return cursor.rowcount == 1
