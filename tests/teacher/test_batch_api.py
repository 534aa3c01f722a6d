"""The Batch API against the hostile server: once, whatever dies in between."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from asking import accept, check_answers, endpoint, some_requests
from hostile_server import HostileServer
from test_client import bill

from quantlab.errors import QuantlabError
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.batch_api import _Batches
from quantlab.teacher.client import gather
from quantlab.teacher.job import Gathered
from quantlab.teacher.ledger import Ledger, Request

FAULTS = {"500": 0.1, "refuse": 0.1, "schema": 0.1}


def ask(requests: list[Request], asked: Endpoint, path: Path) -> Gathered:
    return gather(requests, asked, path, Silent(), accept=accept, poll=0.05)


def test_lines_in_any_order_and_failed_ones_again(tmp_path: Path) -> None:
    requests = some_requests(40)
    with HostileServer(FAULTS) as server:
        gathered = ask(requests, endpoint(server, batch=True), tmp_path / "l.db")
        check_answers(requests, gathered)
        spent = gathered.spending
        assert (spent.requests, spent.input_tokens, spent.output_tokens) == server.billed()
        assert spent.usd == pytest.approx(bill(server) / 2)  # half the price
        assert set(server.delivered_per_request().values()) == {1}
        assert len(server.batches) > 1 and gathered.total.open == 0
        assert {"500", "batch_expired", "unusable"} <= gathered.faults.keys()
        again = ask(requests, endpoint(server, batch=True), tmp_path / "l.db")
        assert again.spending.cached == 40 and again.answers == gathered.answers
        live = gather(requests, endpoint(server), tmp_path / "l.db", Silent())
        assert live.spending.cached == 40  # one ledger for both transports


_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from asking import accept, some_requests
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
asked = Endpoint.model_validate_json(sys.argv[2])
gather(some_requests(20), asked, Path(sys.argv[1]), Silent(), accept=accept, poll=0.1)
"""


def test_a_killed_run_picks_its_batch_up(tmp_path: Path) -> None:
    path, requests = tmp_path / "l.db", some_requests(20)
    with HostileServer() as server:
        server.patience = 10**9  # not before the first run is gone
        asked = endpoint(server, batch=True)
        command = [sys.executable, "-c", _RUN, str(path), asked.model_dump_json(), str(Path(__file__).parent)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
        until = time.monotonic() + 60
        while not any(b.looks > 1 for b in list(server.batches.values())) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
        process.wait()
        server.patience = 2
        others = some_requests(25)[5:]  # the recipe was edited meanwhile: five are gone, five are new
        gathered = ask(others, asked, path)
        check_answers(others, gathered)
        assert len(server.batches) == 2
        assert [batch.counts["total"] for batch in server.batches.values()] == [20, 5]
        everything = ask(requests, asked, path)  # the five that nobody wanted were paid and are kept
        assert everything.spending.cached == 20 and len(server.batches) == 2
        assert everything.total.usd == pytest.approx(bill(server) / 2)


def test_an_unanswered_creation_is_found_again(tmp_path: Path) -> None:
    requests = some_requests(5)
    with HostileServer() as server:
        server.lose_batch_reply = 1
        gathered = ask(requests, endpoint(server, batch=True), tmp_path / "l.db")
        check_answers(requests, gathered)
        assert len(server.batches) == 1


def test_a_run_killed_around_the_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead right after the batch was created, before its id was written; and dead right before."""
    requests = some_requests(5)
    with HostileServer() as server:
        asked = endpoint(server, batch=True)
        for number, created in enumerate((True, False)):
            path = tmp_path / f"{number}.db"
            with monkeypatch.context() as patch:
                whole = _Batches._state if created else _Batches._create

                def die(self: _Batches, *rest: object, whole: object = whole) -> None:
                    raise KeyboardInterrupt

                patch.setattr(_Batches, "_state" if created else "_create", die)
                with pytest.raises(KeyboardInterrupt):
                    ask(requests, asked, path)
            with Ledger(path) as ledger, ledger.transaction() as connection:  # as if that process were gone
                connection.execute(
                    "UPDATE batches SET owner = replace(owner, rtrim(owner, '0123456789.'), '')"
                )
                connection.execute("UPDATE batches SET owner = ?", (_another_time(_this_owner()),))
            check_answers(requests, ask(requests, asked, path))
            assert len(server.batches) == number + 1


def _this_owner() -> str:
    from quantlab.teacher.owners import this_process

    return this_process()


def _another_time(owner: str) -> str:
    return owner.rpartition("|")[0] + "|1.0"


def test_money_and_refusals(tmp_path: Path) -> None:
    requests = some_requests(40)
    with HostileServer() as server:
        asked = endpoint(server, batch=True, max_usd=0.004)
        gathered = ask(requests, asked, tmp_path / "l.db")
        assert gathered.stopped is not None and "max_usd" in gathered.stopped
        assert 0 < gathered.spending.usd == pytest.approx(bill(server) / 2) and gathered.spending.usd <= 0.004
        rest = ask(requests, endpoint(server, batch=True), tmp_path / "l.db")
        check_answers(requests, rest)
        assert len(server.arrivals) == 40
    with HostileServer() as server:
        asked = endpoint(server, batch=True, endpoint=server.url.replace("/v1", "/elsewhere"))
        with pytest.raises(QuantlabError, match="404"):
            ask(requests, asked, tmp_path / "none.db")
        with Ledger(tmp_path / "none.db") as ledger:
            assert ledger.totals().open == 0
