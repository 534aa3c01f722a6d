"""Budgets that hold: requests and tokens per minute, money, number of requests, over every process of a ledger.

`reserve` decides, in one transaction of the ledger, whether a request may be sent now, and writes the attempt if so;
`settle` closes it. What they guarantee:

- *Rates.* In every window of `period` seconds (60) at most `rpm` requests reach the server and at most `tpm` tokens are
  used. A request counts from when it was sent; its tokens count at their worst (input estimate + max_tokens) while
  it is in flight, as reported from then on, and until a period after it *ended*, so the sum holds whether the server
  counts tokens when a request comes or when an answer goes. A request may reach the server later than it was sent: the
  window kept here is longer by `margin` (5 % of the period, at least half a second) to cover the way there, and a
  request whose connection took long is counted from when its body went out (`mark_sent`).
- *Limits.* `max_usd` and `max_requests` bound what the ledger has recorded for one account (model, endpoint and
  purpose) in all its runs, not only this one: running a command again never spends more than the recipe says. An
  attempt counts at its worst until settled, an uncertain one stays counted like that. What is in flight may turn out
  cheaper, so the limit is only called reached when nothing is.
- *Once.* A request that is in flight somewhere is not sent again, and an answered one never. A claim ends with
  its process, or after its time when that process cannot be seen.
"""

from __future__ import annotations

import math
import sqlite3
import time
from dataclasses import dataclass
from typing import Literal

from quantlab.teacher.ledger import Answer, Ledger, Request, insert_answer
from quantlab.teacher.owners import is_gone

Fate = Literal["paid", "refused", "uncertain"]
_STARTED_WALL, _STARTED = time.time(), time.monotonic()
_TINY = 1e-9  # dollars


@dataclass(frozen=True)
class Limits:
    """`scope` names the account that money and requests are counted for, `budget` what shares the rates (None: no
    rates apply). Seconds and US dollars."""

    scope: str
    budget: str | None
    rpm: int | None = None
    tpm: int | None = None
    max_usd: float | None = None
    max_requests: int | None = None
    period: float = 60.0

    @property
    def margin(self) -> float:
        return max(0.05 * self.period, 0.5)

    @property
    def window(self) -> float:
        return self.period + self.margin


@dataclass(frozen=True)
class Ask:
    """What a request may take at worst; `seconds` after which it is certainly over."""

    key: str
    owner: str
    input_tokens: int
    output_tokens: int
    usd: float
    seconds: float


@dataclass(frozen=True)
class Reply:
    """`go` with an attempt's number; `known`: answered meanwhile; `busy`: another process is asking; `wait` so many
    seconds, or until something in flight ends; `stop` and why."""

    kind: Literal["go", "known", "busy", "wait", "stop"]
    attempt: int = 0
    answer: Answer | None = None
    seconds: float = 0.0
    why: str = ""


def now() -> float:
    """Seconds since 1970 that a clock set back or forth while this process runs does not change."""
    return _STARTED_WALL + (time.monotonic() - _STARTED)


def reserve(ledger: Ledger, ask: Ask, limits: Limits) -> Reply:
    """May this request be sent now? On `go` the attempt is on disk."""
    known = ledger.get(ask.key)
    if known is not None:
        return Reply("known", answer=known)
    at = now()
    with ledger.transaction() as connection:
        if connection.execute("SELECT 1 FROM answers WHERE key = ?", (ask.key,)).fetchone():
            return Reply("busy")  # the next look finds it
        held = connection.execute(
            "SELECT id, owner, done FROM attempts WHERE key = ? AND state = 'sent'", (ask.key,)
        ).fetchall()
        for attempt, owner, until in held:
            if until > at and not (owner != ask.owner and is_gone(owner)):
                return Reply("busy", seconds=min(until - at, 1.0))
            _close(connection, attempt, "uncertain", outcome="lost")
        blocked = _limit(connection, ask, limits) or _rate(connection, ask, limits, at)
        if blocked is not None:
            return blocked
        cursor = connection.execute(
            "INSERT INTO attempts (key, scope, budget, owner, state, sent, done, input_tokens, output_tokens, usd)"
            " VALUES (?, ?, ?, ?, 'sent', ?, ?, ?, ?, ?)",
            (
                ask.key,
                limits.scope,
                limits.budget,
                ask.owner,
                at,
                at + ask.seconds,
                ask.input_tokens,
                ask.output_tokens,
                ask.usd,
            ),
        )
        connection.execute("INSERT OR IGNORE INTO accounts (scope) VALUES (?)", (limits.scope,))
        connection.execute("UPDATE accounts SET sent = sent + 1 WHERE scope = ?", (limits.scope,))
    return Reply("go", attempt=int(cursor.lastrowid or 0))


def mark_sent(ledger: Ledger, attempt: int) -> None:
    """The request's body went out only now (a slow connection): its place in the window moves here."""
    with ledger.transaction() as connection:
        connection.execute("UPDATE attempts SET sent = ? WHERE id = ? AND sent < ?", (now(), attempt, now()))


def settle(
    ledger: Ledger,
    attempt: int,
    fate: Fate,
    *,
    outcome: str,
    seconds: float = 0.0,
    spent: Answer | None = None,
    keep: tuple[str, str, Request] | None = None,
    counted: bool = True,
) -> bool:
    """Close an attempt: with what it `spent` when `paid`; and `keep` (key, model, request) the answer with it.

    False when it was closed before (the same line of a batch read twice): nothing changes then.
    """
    with ledger.transaction() as connection:
        closed = _close(connection, attempt, fate, outcome=outcome, seconds=seconds, spent=spent)
        if closed and keep is not None and spent is not None:
            insert_answer(connection, *keep, spent, counted)
    return closed


def sweep(ledger: Ledger, scope: str, owner: str) -> int:
    """Close attempts of processes that are gone; returns how many. Their fate is uncertain."""
    at = now()
    lost = 0
    with ledger.transaction() as connection:
        rows = connection.execute(
            "SELECT id, owner, done FROM attempts WHERE state = 'sent' AND scope = ?", (scope,)
        ).fetchall()
        gone = {name: is_gone(name) for name in {row[1] for row in rows} - {owner}}
        for attempt, name, until in rows:
            if until <= at or gone.get(name, False):
                lost += _close(connection, attempt, "uncertain", outcome="lost")
    return lost


def _close(
    connection: sqlite3.Connection,
    attempt: int,
    fate: Fate,
    *,
    outcome: str,
    seconds: float = 0.0,
    spent: Answer | None = None,
) -> bool:
    row = connection.execute(
        "SELECT state, scope, input_tokens, output_tokens, usd FROM attempts WHERE id = ?", (attempt,)
    ).fetchone()
    if row is None or row[0] not in ("sent", "uncertain") or row[0] == fate:
        return False
    state, scope, asked, reserved, usd = row
    if state == "uncertain":  # given up too early; now it is known
        connection.execute(
            "UPDATE accounts SET uncertain = uncertain - 1, uncertain_usd = uncertain_usd - ? WHERE scope = ?",
            (usd, scope),
        )
    tokens = (asked, reserved)
    if fate == "paid" and spent is not None:
        tokens, usd = (spent.input_tokens, spent.output_tokens), spent.usd
        connection.execute(
            "UPDATE accounts SET paid = paid + 1, input_tokens = input_tokens + ?,"
            " output_tokens = output_tokens + ?, usd = usd + ? WHERE scope = ?",
            (*tokens, usd, scope),
        )
    elif fate == "refused":
        tokens, usd = (asked, 0), 0.0
        connection.execute("UPDATE accounts SET refused = refused + 1 WHERE scope = ?", (scope,))
    else:
        connection.execute(
            "UPDATE accounts SET uncertain = uncertain + 1, uncertain_usd = uncertain_usd + ? WHERE scope = ?",
            (usd, scope),
        )
    connection.execute(
        "UPDATE attempts SET state = ?, done = min(done, ?), input_tokens = ?, output_tokens = ?, usd = ?,"
        " outcome = ?, seconds = ? WHERE id = ?",
        (fate, now(), *tokens, usd, outcome, seconds, attempt),
    )
    return True


def _limit(connection: sqlite3.Connection, ask: Ask, limits: Limits) -> Reply | None:
    """`stop` or `wait` when money or number of requests would be crossed."""
    if limits.max_usd is None and limits.max_requests is None:
        return None
    row = connection.execute(
        "SELECT sent, usd, uncertain_usd FROM accounts WHERE scope = ?", (limits.scope,)
    ).fetchone()
    sent, spent, uncertain = row or (0, 0.0, 0.0)
    if limits.max_requests is not None and sent + 1 > limits.max_requests:
        return Reply("stop", why=f"max_requests {limits.max_requests} is reached")
    if limits.max_usd is None:
        return None
    flying, reserved = connection.execute(
        "SELECT count(*), coalesce(sum(usd), 0) FROM attempts WHERE state = 'sent' AND scope = ?",
        (limits.scope,),
    ).fetchone()
    if spent + uncertain + reserved + ask.usd <= limits.max_usd + _TINY:
        return None
    if flying:
        return Reply("wait", seconds=0.25)
    doubt = f", and up to {uncertain:.4f} for requests whose fate is unknown" if uncertain else ""
    return Reply(
        "stop",
        why=f"max_usd {limits.max_usd:g} could be crossed by the next request, which may cost {ask.usd:.4f} "
        f"({spent:.4f} is spent{doubt})",
    )


def _rate(connection: sqlite3.Connection, ask: Ask, limits: Limits, at: float) -> Reply | None:
    """`wait` when the window is full, with the seconds after which enough of it has passed."""
    if limits.budget is None or (limits.rpm is None and limits.tpm is None):
        return None
    _mend_clock(connection, limits.budget, at)
    since = at - limits.window
    wait = 0.0
    if limits.rpm is not None:
        times = "FROM attempts WHERE budget = ? AND sent > ?"
        count = connection.execute(f"SELECT count(*) {times}", (limits.budget, since)).fetchone()[0]
        if count >= limits.rpm:
            first = connection.execute(
                f"SELECT sent {times} ORDER BY sent LIMIT 1 OFFSET ?",
                (limits.budget, since, count - limits.rpm),
            ).fetchone()[0]
            wait = first - since
    if limits.tpm is not None:
        wait = max(wait, _token_wait(connection, ask, limits, since))
    return Reply("wait", seconds=max(wait, 0.001)) if wait > 0 else None


def _token_wait(connection: sqlite3.Connection, ask: Ask, limits: Limits, since: float) -> float:
    used = "FROM attempts WHERE budget = ? AND done > ?"
    values = (limits.budget, since)
    total = connection.execute(
        f"SELECT coalesce(sum(input_tokens + output_tokens), 0) {used}", values
    ).fetchone()[0]
    over = total + ask.input_tokens + ask.output_tokens - (limits.tpm or math.inf)
    if over <= 0:
        return 0.0
    for done, tokens in connection.execute(
        f"SELECT done, input_tokens + output_tokens {used} ORDER BY done", values
    ):
        over -= tokens
        if over <= 0:
            return float(done - since)
    return limits.window  # more than the whole budget: refused before anything is sent


def _mend_clock(connection: sqlite3.Connection, budget: str, at: float) -> None:
    """Attempts from the future were written before the clock was set back: let them count from now."""
    latest = connection.execute("SELECT max(sent) FROM attempts WHERE budget = ?", (budget,)).fetchone()[0]
    if latest is not None and latest > at + 1.0:
        connection.execute("UPDATE attempts SET sent = ? WHERE budget = ? AND sent > ?", (at, budget, at))
        connection.execute(
            "UPDATE attempts SET done = ? WHERE budget = ? AND state != 'sent' AND done > ?", (at, budget, at)
        )
