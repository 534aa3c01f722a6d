"""Budgets decide on the ledger alone, so they are tested on it, with windows of a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.teacher import budget
from quantlab.teacher.budget import Ask, Limits, Reply, mark_sent, reserve, settle, sweep
from quantlab.teacher.ledger import Answer, Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "l.db") as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the budgets see, in a list of one."""
    at = [1000.0]
    monkeypatch.setattr(budget, "now", lambda: at[0])
    return at


def ask(ledger: Ledger, key: str, limits: Limits, usd: float = 1.0, tokens: int = 10) -> Reply:
    return reserve(ledger, Ask(key, "me", tokens, tokens, usd, 30.0), limits)


def paid(ledger: Ledger, attempt: int, usd: float, tokens: int = 5) -> None:
    settle(ledger, attempt, "paid", outcome="", spent=Answer("", tokens, tokens, usd, "stop", 0.0))


def test_requests_per_minute(ledger: Ledger, clock: list[float]) -> None:
    limits = Limits("s", "b", rpm=2, period=60.0)
    assert ask(ledger, "1", limits).kind == "go"
    clock[0] += 10
    assert ask(ledger, "2", limits).kind == "go"
    clock[0] += 10
    reply = ask(ledger, "3", limits)
    assert (reply.kind, reply.seconds) == ("wait", 43.0)  # 60 + 3 of margin after the first
    clock[0] += 42.9
    assert ask(ledger, "3", limits).kind == "wait"
    clock[0] += 0.2
    assert ask(ledger, "3", limits).kind == "go"
    assert ask(ledger, "4", limits).kind == "wait"
    assert ask(ledger, "4", Limits("s", "other", rpm=2)).kind == "go"


def test_a_late_departure_counts_from_when_it_left(ledger: Ledger, clock: list[float]) -> None:
    limits = Limits("s", "b", rpm=1, period=60.0)
    first = ask(ledger, "1", limits)
    clock[0] += 20
    mark_sent(ledger, first.attempt)
    clock[0] += 50
    assert ask(ledger, "2", limits).kind == "wait"
    clock[0] += 14
    assert ask(ledger, "2", limits).kind == "go"


def test_tokens_per_minute(ledger: Ledger, clock: list[float]) -> None:
    limits = Limits("s", "b", tpm=50, period=60.0)
    first, second = ask(ledger, "1", limits), ask(ledger, "2", limits)
    assert (first.kind, second.kind) == ("go", "go")
    assert ask(ledger, "3", limits).kind == "wait"  # 20 + 20 reserved
    paid(ledger, first.attempt, 0.1, tokens=5)  # 10 used
    assert ask(ledger, "3", limits).kind == "go"
    clock[0] += 20
    settle(ledger, second.attempt, "refused", outcome="429")  # its input still counts, its output never came
    assert ask(ledger, "4", limits).kind == "wait"  # 10 + 10 + 20 are in the window
    clock[0] += 44  # the first ended 64 s ago
    assert ask(ledger, "4", limits).kind == "go"


def test_a_clock_set_back_does_not_stop_for_ever(ledger: Ledger, clock: list[float]) -> None:
    limits = Limits("s", "b", rpm=1, tpm=100, period=60.0)
    paid(ledger, ask(ledger, "1", limits).attempt, 0.1)
    clock[0] -= 10_000
    assert ask(ledger, "2", limits).kind == "wait"
    clock[0] += 64
    assert ask(ledger, "2", limits).kind == "go"


def test_money_stops_below_the_limit(ledger: Ledger) -> None:
    limits = Limits("s", None, max_usd=2.5)
    first, second = ask(ledger, "1", limits), ask(ledger, "2", limits)
    assert ask(ledger, "3", limits).kind == "wait"  # what is in flight may turn out cheaper
    paid(ledger, first.attempt, 0.25)
    third = ask(ledger, "3", limits)
    assert third.kind == "go"
    settle(ledger, second.attempt, "uncertain", outcome="timeout")  # may have been billed: stays counted
    settle(ledger, third.attempt, "refused", outcome="429")
    fourth = ask(ledger, "4", limits)
    assert fourth.kind == "go"  # 0.25 + 1 uncertain + 1
    paid(ledger, fourth.attempt, 1.0)
    reply = ask(ledger, "5", limits)
    assert reply.kind == "stop" and reply.why.startswith("max_usd 2.5") and "1.2500 is spent" in reply.why
    assert ask(ledger, "5", Limits("another account", None, max_usd=2.5)).kind == "go"


def test_number_of_requests(ledger: Ledger) -> None:
    limits = Limits("s", None, max_requests=2)
    settle(ledger, ask(ledger, "1", limits).attempt, "refused", outcome="500")
    assert ask(ledger, "1", limits).kind == "go"
    assert ask(ledger, "2", limits).kind == "stop"


def test_an_attempt_is_closed_once(ledger: Ledger) -> None:
    limits = Limits("s", None)
    attempt = ask(ledger, "1", limits).attempt
    assert settle(ledger, attempt, "uncertain", outcome="timeout")
    assert not settle(ledger, attempt, "uncertain", outcome="timeout")
    assert ledger.totals().uncertain_usd == 1.0
    spent = Answer("", 3, 4, 0.5, "stop", 0.0)
    assert settle(ledger, attempt, "paid", outcome="", spent=spent)  # it came after all
    assert not settle(ledger, attempt, "paid", outcome="", spent=spent)
    totals = ledger.totals()
    assert (totals.uncertain, totals.uncertain_usd, totals.usd, totals.requests) == (0, 0.0, 0.5, 1)


def test_sweep_gives_up_what_is_over(ledger: Ledger, clock: list[float]) -> None:
    ask(ledger, "1", Limits("s", None))
    assert sweep(ledger, "s", "me") == 0
    clock[0] += 31
    assert sweep(ledger, "s", "me") == 1
    assert ledger.totals("s").uncertain == 1


def test_a_reservation_is_quick_in_a_large_ledger(ledger: Ledger) -> None:
    row = "(key, scope, budget, owner, state, sent, done, input_tokens, output_tokens, usd)"
    with ledger.transaction() as connection:
        connection.executemany(
            f"INSERT INTO attempts {row} VALUES (?, 's', 'b', 'x', 'paid', ?, ?, 9, 9, 0.1)",
            [(f"k{n}", float(n), float(n)) for n in range(50_000)],
        )
    started = time.process_time()
    for number in range(50):
        assert ask(ledger, str(number), Limits("s", "b", rpm=100, tpm=10**6, max_usd=100.0)).kind == "go"
    assert time.process_time() - started < 1.0
