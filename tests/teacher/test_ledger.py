"""The ledger survives what happens to files and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from asking import some_requests

from quantlab.errors import DataError, MachineError, QuantlabError
from quantlab.teacher.budget import Ask, Limits, reserve, settle
from quantlab.teacher.ledger import Answer, Ledger, Request, content_key, request_key
from quantlab.teacher.owners import is_gone, this_process

ANSWER = Answer("SELECT 1;", 10, 5, 0.25, "stop", 0.5)
LIMITS = Limits("gpt-4o", None)


def test_round_trip(tmp_path: Path) -> None:
    request = some_requests(1)[0]
    key = request_key("m", request)
    with Ledger(tmp_path / "new" / "ledger.db") as ledger:
        assert ledger.get(key) is None
        assert ledger.put(key, "m", request, ANSWER, scope="a")
        assert not ledger.put(key, "m", request, Answer("other", 1, 1, 1.0, "stop", 0.0), scope="a")
    with Ledger(tmp_path / "new" / "ledger.db") as ledger:
        assert ledger.get_many([key, "none"]) == {key: ANSWER}
        assert ledger.totals() == ledger.totals("a")
        assert (ledger.totals().requests, ledger.totals().usd) == (1, 0.25)
        assert ledger.totals("b").requests == 0
        assert ledger.rows("PRAGMA journal_mode") == [("wal",)]
        assert ledger.rows("PRAGMA synchronous") == [(2,)]


def test_the_key_is_the_content() -> None:
    one = Request(({"role": "user", "content": "질문"},), {"max_tokens": 5, "temperature": 0.0}, "a")
    same = Request(({"content": "질문", "role": "user"},), {"temperature": 0.0, "max_tokens": 5}, "b", "질문")
    assert request_key("m", one) == request_key("m", same)
    assert request_key("m", one) != request_key("n", one)
    longer = Request(one.messages, {**one.parameters, "max_tokens": 6}, "a")
    assert request_key("m", one) != request_key("m", longer)
    assert content_key(one) == content_key(longer)
    assert len(request_key("m", Request(({"role": "user", "content": "\ud800"},), {}, ""))) == 64


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no ledger\n" * 200)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (a)")
    newer = tmp_path / "newer.db"
    Ledger(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    torn = tmp_path / "torn.db"
    with Ledger(torn) as ledger:
        for request in some_requests(50):
            ledger.put(request_key("m", request), "m", request, ANSWER)
    with torn.open("r+b") as stream:
        stream.seek(4096 * 3)
        stream.write(b"\xff" * 4096 * 4)
    for path, said in ((text, "notes.txt"), (other, "no ledger"), (newer, "newer"), (torn, "torn.db")):
        with pytest.raises(DataError, match=said) as caught:
            Ledger(path)
        assert caught.value.hint and path.name in str(caught.value)
    with pytest.raises(DataError):
        Ledger(tmp_path)
    assert text.read_text() == "no ledger\n" * 200
    assert (tmp_path / "other.db").is_file()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((MachineError, DataError)):
        Ledger(tmp_path / "file" / "ledger.db")


def test_export_is_by_content(tmp_path: Path) -> None:
    request = some_requests(1)[0]
    with Ledger(tmp_path / "l.db") as ledger:
        ledger.put(request_key("m", request), "m", request, ANSWER)
        assert ledger.export(tmp_path / "out.jsonl") == 1
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row == {"key": content_key(request), "label": "question 0", "text": "SELECT 1;"}


def _work(path: Path, paid: Path, number: int) -> None:
    """Ask for all requests in an order of its own; a line in `paid` for each that this process pays."""
    requests = some_requests(40)
    with Ledger(path) as ledger, paid.open("a") as stream:
        owner, left = this_process(), requests[number * 10 :] + requests[: number * 10]
        while left:
            request = left.pop(0)
            key = request_key("m", request)
            reply = reserve(ledger, Ask(key, owner, 1, 1, 0.5, 30.0), LIMITS)
            if reply.kind == "go":
                stream.write(key + "\n")
                settle(ledger, reply.attempt, "paid", outcome="", spent=ANSWER, keep=(key, "m", request))
            elif reply.kind == "busy":
                left.append(request)


def test_four_processes_pay_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    files = [tmp_path / f"paid{number}" for number in range(4)]
    workers = [
        context.Process(target=_work, args=(tmp_path / "l.db", file, n)) for n, file in enumerate(files)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = [line for file in files for line in file.read_text().split()]
    assert len(lines) == len(set(lines)) == 40
    with Ledger(tmp_path / "l.db") as ledger:
        totals = ledger.totals()
        assert (totals.requests, totals.usd, totals.open) == (40, 10.0, 0)
        assert ledger.rows("SELECT count(*) FROM answers") == [(40,)]


_ENDLESS = """
import itertools, sys
from pathlib import Path
from quantlab.teacher.budget import Ask, Limits, reserve, settle
from quantlab.teacher.ledger import Answer, Ledger, Request, request_key
from quantlab.teacher.owners import this_process
with Ledger(Path(sys.argv[1])) as ledger:
    for number in itertools.count():
        request = Request(({"role": "user", "content": str(number)},), {}, "")
        key = request_key("m", request)
        reply = reserve(ledger, Ask(key, this_process(), 1, 1, 0.5, 600.0), Limits("gpt-4o", None))
        spent = Answer(str(number), 1, 1, 0.5, "stop", 0.0)
        settle(ledger, reply.attempt, "paid", outcome="", spent=spent, keep=(key, "m", request))
        print(number, flush=True)
"""


def test_kill_9_keeps_what_was_said_to_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    last = [process.stdout.readline() for _ in range(30)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Ledger(path) as ledger:
        for number in range(int(last) + 1):
            request = Request(({"role": "user", "content": str(number)},), {}, "")
            found = ledger.get(request_key("m", request))
            assert found is not None and found.text == str(number)
        totals = ledger.totals()
        assert totals.requests == ledger.rows("SELECT count(*) FROM answers")[0][0]
        assert totals.usd == pytest.approx(0.5 * totals.requests)
        assert totals.open <= 1


def test_the_claim_of_a_killed_process_is_void(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from quantlab.teacher.budget import *;"
        "from quantlab.teacher.owners import this_process;"
        "ledger = Ledger(Path(sys.argv[1]));"
        "reserve(ledger, Ask('k', this_process(), 1, 1, 0.5, 600.0), Limits('gpt-4o', None));"
        "print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "l.db")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    with Ledger(tmp_path / "l.db") as ledger:
        ask = Ask("k", this_process(), 1, 1, 0.5, 600.0)
        assert reserve(ledger, ask, LIMITS).kind == "busy"
        process.kill()
        process.wait()
        assert reserve(ledger, ask, LIMITS).kind == "go"
        assert ledger.totals().uncertain == 1
        assert ledger.totals().uncertain_usd == 0.5


def test_owners() -> None:
    me = this_process()
    assert not is_gone(me)
    place, number, _ = me.rsplit("|", 2)
    assert is_gone(f"{place}|{number}|1.0")  # the number was given to another process since
    assert not is_gone("elsewhere|x|1|1.0")
    assert not is_gone("batch:abc")


def test_a_lost_transaction_leaves_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        with pytest.raises(QuantlabError), ledger.transaction() as connection:
            connection.execute("INSERT INTO accounts (scope) VALUES ('a')")
            connection.execute("INSERT INTO nowhere VALUES (1)")
        assert ledger.rows("SELECT count(*) FROM accounts") == [(0,)]
        started = time.monotonic()
        with ledger.transaction():
            pass
        assert time.monotonic() - started < 5
