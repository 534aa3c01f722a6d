"""`gather` against a server that misbehaves: every answer once, nothing paid twice, budgets held, an exact bill."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from asking import accept, check_answers, endpoint, some_requests
from hostile_server import HostileServer

from quantlab.errors import MachineError, QuantlabError, RecipeError
from quantlab.progress import Lines, Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
from quantlab.teacher.ledger import Ledger
from quantlab.teacher.live import Throttle
from quantlab.teacher.prices import cost, price_of
from quantlab.teacher.transport import read_completion, retry_after

FAULTS = {
    "429": 0.02,
    "429-after": 0.02,
    "500": 0.03,
    "refuse": 0.01,
    "hang": 0.006,
    "reset": 0.02,
    "truncated": 0.02,
    "schema": 0.02,
    "twice": 0.05,
}
PERIOD = 2.0
BUDGETS: dict[str, Any] = {"rpm": 220, "tpm": 40_000, "concurrency": 32, "timeout": 6.0, "attempts": 10}


def bill(server: HostileServer) -> float:
    _, inputs, outputs = server.billed()
    return cost(price_of("gpt-4o"), inputs, outputs)


def check_windows(server: HostileServer) -> None:
    requests, arriving, finishing = server.most_in_window(PERIOD)
    assert requests <= BUDGETS["rpm"]
    assert max(arriving, finishing) <= BUDGETS["tpm"]


def test_a_hostile_server(tmp_path: Path) -> None:
    requests = some_requests(500)
    with HostileServer(FAULTS) as server:
        asked = endpoint(server, **BUDGETS)
        gathered = gather(requests, asked, tmp_path / "l.db", Silent(), accept=accept, period=PERIOD)
        spent = gathered.spending
        check_answers(requests, gathered)
        assert (spent.requests, spent.input_tokens, spent.output_tokens) == server.billed()
        assert spent.usd == pytest.approx(bill(server), abs=1e-12)
        assert set(server.delivered_per_request().values()) == {1}
        assert len(server.delivered_per_request()) == 500
        check_windows(server)
        lost, inputs, outputs = server.undelivered()
        assert lost <= spent.uncertain
        assert cost(price_of("gpt-4o"), inputs, outputs) <= spent.uncertain_usd
        assert {"429", "500", "reset", "garbled", "timeout", "unusable"} <= gathered.faults.keys()
        assert gathered.total.sent == len(server.arrivals) and gathered.total.open == 0

        seen = len(server.arrivals)
        again = gather(requests[::-1], asked, tmp_path / "l.db", Silent(), accept=accept, period=PERIOD)
        assert len(server.arrivals) == seen
        assert (again.spending.requests, again.spending.cached, again.spending.usd) == (0, 500, 0.0)
        assert again.answers == gathered.answers[::-1]


_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from asking import accept, some_requests
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
asked = Endpoint.model_validate_json(sys.argv[2])
g = gather(some_requests(500)[:: int(sys.argv[4])], asked, Path(sys.argv[1]), Silent(), accept=accept, period=2.0)
print(len(g.failed), sum(a is not None for a in g.answers), g.stopped)
"""


def start(path: Path, asked: Endpoint, step: int = 1) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        _RUN,
        str(path),
        asked.model_dump_json(),
        str(Path(__file__).parent),
        str(step),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_kill_9_and_two_that_finish_the_rest(tmp_path: Path) -> None:
    """One process is killed in the middle; two that share its ledger, in opposite orders, do the rest."""
    path = tmp_path / "l.db"
    with HostileServer(FAULTS, seed=1) as server:
        asked = endpoint(server, **BUDGETS)
        first = start(path, asked)
        until = time.monotonic() + 240
        while server.billed()[0] < 150 and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with Ledger(path) as ledger:
            kept = ledger.totals()
        assert kept.requests >= 100
        others = [start(path, asked), start(path, asked, -1)]
        for process in others:
            out, _ = process.communicate(timeout=300)
            assert out.split() == ["0", "500", "None"]
        check_windows(server)
        with Ledger(path) as ledger:
            totals = ledger.totals()
            assert ledger.rows("SELECT count(*) FROM answers") == [(500,)]
        answered, inputs, outputs = server.billed()
        unknown = answered - totals.requests  # delivered to the process that was killed
        assert 0 <= unknown <= kept.open <= BUDGETS["concurrency"]
        assert sum(server.delivered_per_request().values()) <= 500 + unknown
        doubt = totals.uncertain_usd
        assert totals.usd <= bill(server) + 1e-9 <= totals.usd + doubt + 2e-9
        if unknown == 0:
            assert (totals.input_tokens, totals.output_tokens) == (inputs, outputs)


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    requests = some_requests(3) * 3
    with HostileServer() as server:
        gathered = gather(requests, endpoint(server), tmp_path / "l.db", Silent(), accept=accept)
        check_answers(requests, gathered)
        assert len(server.arrivals) == gathered.spending.requests == 3


def test_money_stops_before_the_limit_and_goes_on(tmp_path: Path) -> None:
    requests = some_requests(60)
    with HostileServer() as server:
        whole = gather(requests, endpoint(server), tmp_path / "whole.db", Silent()).spending.usd
    with HostileServer() as server:
        limit = whole / 2
        poor = endpoint(server, max_usd=limit, concurrency=8)
        half = gather(requests, poor, tmp_path / "l.db", Silent())
        done = sum(answer is not None for answer in half.answers)
        assert half.spending.usd == pytest.approx(bill(server)) and bill(server) <= limit
        # near the half: only the last request's worst case is left over
        assert 20 <= done <= 30 and half.failed == {}
        assert half.stopped is not None and "raise max_usd and run the same command" in half.stopped
        again = gather(requests, poor, tmp_path / "l.db", Silent())
        assert again.spending.requests == 0 and again.stopped is not None  # the limit is for all runs
        rest = gather(requests, endpoint(server), tmp_path / "l.db", Silent())
        assert rest.stopped is None and rest.spending.cached == done
        assert rest.total.usd == pytest.approx(bill(server))
        assert len(server.arrivals) == 60


def test_number_of_requests_stops(tmp_path: Path) -> None:
    with HostileServer({"500": 0.2}) as server:
        asked = endpoint(server, max_requests=20)
        gathered = gather(some_requests(60), asked, tmp_path / "l.db", Silent(), period=1.0)
        assert len(server.arrivals) == 20
        assert gathered.stopped is not None and "max_requests 20" in gathered.stopped
        assert sum(a is not None for a in gathered.answers) == server.billed()[0] > 0


def test_an_unusable_answer_is_paid_and_given_up_after_the_attempts(tmp_path: Path) -> None:
    with HostileServer({"schema": 1.0}) as server:
        asked = endpoint(server, attempts=3)
        gathered = gather(some_requests(2), asked, tmp_path / "l.db", Silent(), accept=accept, period=1.0)
        assert gathered.answers == [None, None] and gathered.stopped is None
        assert set(gathered.failed) == {0, 1} and "not JSON, 3 attempts" in gathered.failed[0]
        assert len(server.arrivals) == gathered.spending.requests == 6
        assert gathered.spending.usd == pytest.approx(bill(server))


def test_concurrency_adapts(tmp_path: Path) -> None:
    with HostileServer(latency=0.8) as server:
        gather(some_requests(24), endpoint(server, concurrency=12), tmp_path / "l.db", Silent())
        assert 4 < server.most_flying <= 12
    throttle = Throttle(16)
    for _ in range(40):
        throttle.success()
    assert throttle.limit == 16
    now = time.monotonic()
    throttle.trouble(now)
    throttle.trouble(now - 1)  # sent before the cut: the same trouble
    assert throttle.limit == 8
    for _ in range(8):
        throttle.success()
    assert 8.9 < throttle.limit < 9.1


def test_a_pause_that_the_server_asks_for(tmp_path: Path) -> None:
    with HostileServer(status=429, retry_after="1000") as server:
        gathered = gather(some_requests(3), endpoint(server), tmp_path / "l.db", Silent())
        assert gathered.stopped is not None and "asks to wait 1000 s" in gathered.stopped
        assert gathered.failed == {} and gathered.answers == [None] * 3
    with HostileServer(status=429, retry_after="0.4") as server:
        asked = endpoint(server, attempts=3, concurrency=1)
        gathered = gather(some_requests(1), asked, tmp_path / "l.db", Silent(), period=0.1)
        times = [arrival.at for arrival in server.arrivals]
        assert len(times) == 3 and all(b - a >= 0.4 for a, b in itertools.pairwise(times))
        assert gathered.failed[0].startswith("429")
        assert gathered.spending.refused == 3


def test_retry_after_in_every_form() -> None:
    import email.utils

    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": "2.5"}) == 2.5
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    found = retry_after({"retry-after": date})
    assert found is not None and 28 <= found <= 31
    assert retry_after({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0.0
    assert (
        retry_after({}) is retry_after({"retry-after": "soon"}) is retry_after({"retry-after": "inf"}) is None
    )


def test_what_is_not_an_answer() -> None:
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 0}}
    cases: list[tuple[Any, str, str]] = [
        ("", "uncertain", "garbled"),
        ('{"choices": [{"message"', "uncertain", "garbled"),
        ("[]", "uncertain", "no answer in it"),
        ("null", "uncertain", "no answer in it"),
        ({"choices": []} | usage, "paid", "no answer in it"),
        ({"choices": [{"message": {"content": None}}]} | usage, "paid", "no answer in it"),
        (
            {"choices": "x", "usage": {"prompt_tokens": True, "completion_tokens": -1}},
            "uncertain",
            "no answer in it",
        ),
        ("[" * 100_000, "uncertain", "garbled"),
    ]
    for body, fate, fault in cases:
        outcome = read_completion(body if isinstance(body, str) else json.dumps(body))
        assert (outcome.fate, outcome.fault, outcome.text) == (fate, fault, None)
    half = read_completion('{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}')
    assert half.text == "a?b" and half.input_tokens is None


def test_servers_that_stream_or_do_not_count(tmp_path: Path) -> None:
    requests = some_requests(3)
    for number, options in enumerate(({"stream": True}, {"stream": True, "usage": False}, {"usage": False})):
        with HostileServer(**options) as server:
            gathered = gather(requests, endpoint(server), tmp_path / f"{number}.db", Silent(), accept=accept)
            check_answers(requests, gathered)
            assert ("no usage reported" in gathered.faults) == ("usage" in options)
            assert gathered.spending.input_tokens > 0 and gathered.spending.output_tokens > 0


def test_parameters_that_a_server_refuses(tmp_path: Path) -> None:
    from dataclasses import replace

    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    requests = [replace(r, parameters={**r.parameters, "response_format": form}) for r in some_requests(4)]
    for refused in ("response_format", "max_tokens", "temperature"):
        with HostileServer(refuses=(refused,)) as server:
            path = tmp_path / f"{refused}.db"
            gathered = gather(requests, endpoint(server, concurrency=1), path, Silent(), accept=accept)
            check_answers(requests, gathered)
            assert server.bodies[0]["response_format"] == form
            assert len(server.arrivals) == 5 and refused not in server.bodies[-1]
            assert ("max_completion_tokens" in server.bodies[-1]) == (refused == "max_tokens")


def test_what_no_retry_can_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, said in ((401, "refused the API key"), (403, "refused the API key"), (404, "knows no model")):
        with HostileServer(status=status) as server:
            with pytest.raises(QuantlabError, match=said):
                gather(some_requests(9), endpoint(server, concurrency=1), tmp_path / "a.db", Silent())
            assert len(server.arrivals) == 1
    with HostileServer(status=400) as server:
        with pytest.raises(QuantlabError, match="refused the first 5 requests"):
            gather(some_requests(9), endpoint(server, concurrency=1), tmp_path / "b.db", Silent())
        assert len(server.arrivals) == 5
    with HostileServer(
        status=429, body='{"error": {"message": "pay", "code": "insufficient_quota"}}'
    ) as server:
        gathered = gather(some_requests(9), endpoint(server, concurrency=1), tmp_path / "c.db", Silent())
        assert gathered.stopped is not None and len(server.arrivals) == 1
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(MachineError, match="OPENAI_API_KEY"):
        gather(some_requests(1), Endpoint(model="gpt-4o"), tmp_path / "d.db", Silent())


def test_budgets_that_cannot_be_held_are_refused_first(tmp_path: Path) -> None:
    with HostileServer() as server:
        with pytest.raises(RecipeError, match="tpm 50 is less"):
            gather(some_requests(2), endpoint(server, tpm=50), tmp_path / "l.db", Silent())
        with pytest.raises(RecipeError, match="no price is known"):
            gather(some_requests(2), endpoint(server, model="mine", max_usd=1.0), tmp_path / "l.db", Silent())
        assert server.arrivals == []


def test_no_server_at_all(tmp_path: Path) -> None:
    asked = Endpoint(model="gpt-4o", endpoint="http://127.0.0.1:9/v1", attempts=2)
    gathered = gather(some_requests(2), asked, tmp_path / "l.db", Silent(), period=1.0)
    assert "no connection" in gathered.failed[0] and gathered.spending.refused == 4
    assert gathered.spending.uncertain == 0


KEY = "sk-Recognisable-0123456789abcdef"


def test_the_key_is_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    said: list[str] = []

    def note(error: BaseException) -> None:
        import traceback

        said.extend(
            [str(error), repr(error), getattr(error, "hint", ""), "".join(traceback.format_exception(error))]
        )

    with HostileServer({"hang": 0.3, "500": 0.2}) as server:
        asked = endpoint(server, timeout=0.5, attempts=2)
        gathered = gather(some_requests(10), asked, tmp_path / "a.db", Lines(), period=1.0)
        assert all(f"Bearer {KEY}" in head for head in server.headers)  # it does reach the server
        said.append(repr(gathered))
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}. Bearer {KEY}", "code": KEY}})
    for status in (401, 403, 404, 400, 429, 500, 302):
        with HostileServer(status=status, body=echo) as server:
            asked = endpoint(server, timeout=0.5, attempts=2)
            try:
                said.append(repr(gather(some_requests(2), asked, tmp_path / "b.db", Lines(), period=0.2)))
            except QuantlabError as error:
                note(error)
    for bad in (KEY + "\nX: y", KEY + "é", KEY + " b"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with HostileServer() as server:
            with pytest.raises(MachineError) as caught:
                gather(some_requests(1), endpoint(server), tmp_path / "c.db", Lines())
            note(caught.value)
    out, err = capfd.readouterr()
    texts = [
        *said,
        caplog.text,
        out,
        err,
        *(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()),
    ]
    assert len(caplog.text) > 1000 and len(texts) > 10
    assert not [text for text in texts if KEY in text]


_INTERRUPTED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from asking import some_requests
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
class Interrupted(BaseException): pass
def handler(number, frame): raise Interrupted
signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    gather(some_requests(9), Endpoint.model_validate_json(sys.argv[2]), Path(sys.argv[1]), Silent())
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("sign", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Interrupted")]
)
def test_an_interrupt_leaves_a_consistent_ledger(tmp_path: Path, sign: signal.Signals, raised: str) -> None:
    with HostileServer({"hang": 1.0}) as server:
        asked = endpoint(server, timeout=90.0)
        command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "l.db"), asked.model_dump_json()]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(
            [*command, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True, env=environment
        )
        until = time.monotonic() + 60
        while not server.arrivals and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(sign)
        out, _ = process.communicate(timeout=60)
        assert out.split() == [raised]
        with Ledger(tmp_path / "l.db") as ledger:
            totals = ledger.totals()
        assert totals.open == 0 and totals.uncertain + totals.refused == totals.sent
        assert totals.uncertain >= len(server.arrivals) > 0


def test_work_that_was_reserved_and_never_begun_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with HostileServer() as server:
        monkeypatch.setattr("quantlab.teacher.live.Live._settle_some", die)
        with pytest.raises(KeyboardInterrupt):
            gather(some_requests(9), endpoint(server), tmp_path / "l.db", Silent())
        with Ledger(tmp_path / "l.db") as ledger:
            totals = ledger.totals()
        assert totals.sent > 0 and totals.open == 0
        assert totals.requests + totals.refused + totals.uncertain == totals.sent
        assert server.billed()[0] <= totals.requests + totals.uncertain
