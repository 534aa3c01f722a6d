"""The worker processes: killed, stopped, orphaned, out of memory; and how far one query can reach another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.messages import read_frame
from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.sandbox.worker import Worker

ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r"
HANG = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_worker_killed_between_queries_is_replaced(victim: Path, name: str, limits: Limits) -> None:
    with Sandbox(limits) as sandbox:
        assert sandbox.run(victim, "SELECT 1").rows == ((1,),)
        first = sandbox._all[0].process
        assert first is not None
        first.send_signal(getattr(signal, name))
        first.wait()
        assert sandbox.run(victim, "SELECT 2").rows == ((2,),)
        second = sandbox._all[0].process
        assert second is not None and second.pid != first.pid


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_worker_killed_during_a_query(victim: Path, name: str) -> None:
    with Sandbox(Limits(seconds=20.0, steps=10**12)) as sandbox:
        sandbox.run(victim, "SELECT 1")
        process = sandbox._all[0].process
        assert process is not None
        killer = threading.Timer(0.2, process.send_signal, [getattr(signal, name)])
        killer.start()
        found = sandbox.run(victim, ENDLESS)
        assert (found.status, found.kind) == ("error", "crash")
        assert f"exit code {-getattr(signal, name)}" in found.reason
        assert sandbox.run(victim, "SELECT 3").rows == ((3,),)


@posix
def test_a_stopped_worker_is_late(victim: Path, limits: Limits) -> None:
    with Sandbox(limits) as sandbox:
        sandbox.run(victim, "SELECT 1")
        process = sandbox._all[0].process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        assert sandbox.run(victim, "SELECT 2").kind == "seconds"
        assert sandbox.run(victim, "SELECT 3").rows == ((3,),)


@posix
def test_an_interrupt_of_the_terminal_is_the_parents_business(victim: Path, limits: Limits) -> None:
    with Sandbox(limits) as sandbox:
        sandbox.run(victim, "SELECT 1")
        process = sandbox._all[0].process
        assert process is not None
        process.send_signal(signal.SIGINT)
        assert sandbox.run(victim, "SELECT 2").rows == ((2,),)
        assert sandbox._all[0].process is process


@pytest.mark.skipif(sys.platform == "win32", reason="interval timers")
def test_an_orphan_ends_by_itself(victim: Path) -> None:
    """With the parent's deadline far away, the worker's own timer still ends a query that hangs in the engine."""
    with Sandbox(Limits(seconds=0.2, grace=0.1)) as sandbox:
        process = sandbox._all[0]
        request = {"database": str(victim), "sql": HANG, "role": "gold"}
        (found,) = process.ask([request], 30.0)
        assert found["kind"] == "seconds" and found["seconds"] < 20.0


@posix
def test_idle_workers_end_with_their_parent(victim: Path) -> None:
    program = (
        "import os, sys; from quantlab.text2sql.sandbox.pool import Sandbox\n"
        "sandbox = Sandbox(workers=2)\n"
        "list(sandbox.map(lambda sql: sandbox.run(sys.argv[1], sql), ['SELECT 1'] * 20))\n"
        "print(*[one.process.pid for one in sandbox._all if one.process], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", program, str(victim)], capture_output=True, text=True)
    workers = [int(pid) for pid in found.stdout.split()]
    assert workers and found.returncode == -signal.SIGKILL, found.stderr
    for _ in range(200):
        alive = [pid for pid in workers if _runs(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False


def test_memory_for_the_answer_runs_out(victim: Path) -> None:
    """The result is within its own limit, and more than the process can put into words."""
    limits = Limits(seconds=20.0, result_bytes=2**31, value_bytes=2**28, memory_bytes=64 * 2**20)
    with Sandbox(limits) as sandbox:
        sql = "SELECT " + ", ".join(["substr(hex(zeroblob(5000000)), 1)"] * 100)
        assert sandbox.run(victim, sql).kind == "memory"
        assert sandbox.run(victim, "SELECT 1").rows == ((1,),)


def test_a_hang_does_not_delay_the_other_worker(victim: Path, limits: Limits) -> None:
    with Sandbox(limits, workers=2) as sandbox:
        sandbox.run(victim, "SELECT 1")
        ended: list[int] = []

        def one(number: int) -> str:
            status = sandbox.run(victim, HANG if number == 0 else f"SELECT {number}").status
            ended.append(number)
            return status

        found = list(sandbox.map(one, range(51)))
    assert found == ["timeout"] + ["rows"] * 50  # in the order of the questions
    assert ended[-1] == 0  # all the others were answered before


def test_what_was_answered_before_a_hang_is_kept(victim: Path, limits: Limits) -> None:
    """And what stands behind it is answered by the next worker; each has its own time."""
    with Sandbox(limits) as sandbox:
        queries = [("SELECT 1", "gold"), (HANG, "prediction"), ("SELECT 2", "gold"), (ENDLESS, "prediction")]
        found = sandbox.run_all(victim, [*queries, ("SELECT 3", "gold"), (HANG, "gold")])
        assert [one.kind for one in found] == ["rows", "seconds", "rows", "steps", "rows", "seconds"]
        assert [one.rows for one in found[::2]] == [((1,),), ((2,),), ((3,),)]
        assert sandbox.run_all(victim, []) == []


def test_more_than_a_pipe_holds(victim: Path) -> None:
    """Long questions and long answers at once must not wait for each other."""
    with Sandbox() as sandbox:
        question = "SELECT '" + "x" * 90_000 + "', '{}'"
        found = sandbox.run_all(victim, [(question.format(n), "gold") for n in range(40)])
        assert [one.rows[0][1] for one in found] == [str(n) for n in range(40)]


def test_a_thousand_queries_in_order(victim: Path, limits: Limits) -> None:
    with Sandbox(limits, workers=2) as sandbox:
        found = list(
            sandbox.map(lambda i: sandbox.run(victim, f"SELECT {i}, COUNT(*) FROM players").rows, range(1000))
        )
    assert found == [((i, 50),) for i in range(1000)]


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "sandbox-watch"}


def test_a_closed_sandbox_starts_again(victim: Path, limits: Limits) -> None:
    before = watchers()  # of the other tests' sandboxes
    sandbox = Sandbox(limits)
    for number in (1, 2):
        assert sandbox.run(victim, f"SELECT {number}").rows == ((number,),)
        assert sandbox.run(victim, HANG).kind == "seconds"
        sandbox.close()
        assert sandbox._all[0].process is None
        assert watchers() <= before


def test_gold_and_prediction_do_not_share_a_connection(victim: Path, limits: Limits) -> None:
    """So nothing that one of them left on its connection can reach the other."""
    worker = Worker(asdict(limits))
    for role in ("gold", "prediction", "gold"):
        answer = worker.answer({"database": str(victim), "sql": "SELECT 1", "role": role})
        assert answer["rows"] == [(1,)]
    assert len(worker.connections) == 2


def test_connections_are_not_kept_for_ever(tmp_path: Path, victim: Path, limits: Limits) -> None:
    worker = Worker(asdict(limits))
    for number in range(40):
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(victim.read_bytes())
        worker.answer({"database": str(path), "sql": "SELECT 1", "role": "gold"})
    assert len(worker.connections) <= 16


def test_the_worker_is_alone(victim: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch, no third-party package, no secret of the environment, no open file of the parent."""
    monkeypatch.setenv("QUANTLAB_TEST_SECRET", "s3cret")
    with Sandbox(limits) as sandbox, victim.open("rb"):
        sandbox.run(victim, "SELECT 1")
        process = sandbox._all[0].process
        assert process is not None
        assert "-I" in process.args and "-S" in process.args  # type: ignore[operator]
        folder = Path(f"/proc/{process.pid}")
        if folder.exists():
            assert b"s3cret" not in (folder / "environ").read_bytes()
            maps = (folder / "maps").read_text()
            assert "torch" not in maps and "site-packages" not in maps
            opened = [str(link.readlink()) for link in (folder / "fd").iterdir()]
            assert opened.count(str(victim)) == 1


def test_half_a_frame_is_no_message(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    for content in (b"", b"\x00", b"\x00\x00\x00\x05{}", b"\xff\xff\xff\xff{}"):
        path.write_bytes(content)
        with path.open("rb") as stream:
            assert read_frame(stream) is None
