"""Processes of their own that are forked: what they are told, what they say, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quantlab.workers import Forked, stopping

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux")


def forked(main: Callable[[], None], folder: Path) -> Forked:
    with (folder / "stderr").open("wb") as errors:
        return Forked(main, errors)


def test_it_reads_what_it_is_told_and_prints_into_the_file(tmp_path: Path) -> None:
    def main() -> None:
        words = sys.stdin.read()
        print(f"printed {words}", flush=True)
        print(f"complained {words}", file=sys.stderr)
        (tmp_path / "done").write_text(str(os.getpid()))

    process = forked(main, tmp_path)
    assert process.poll() is None
    process.communicate("가나".encode(), timeout=30)
    assert process.returncode == 0 and int((tmp_path / "done").read_text()) != os.getpid()
    assert (tmp_path / "stderr").read_text().split("\n")[:2] == ["printed 가나", "complained 가나"]


def test_how_it_ended_is_told_as_by_popen(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("what went wrong")

    process = forked(fails, tmp_path)
    process.communicate(b"")
    assert process.returncode == 1 and "ValueError: what went wrong" in (tmp_path / "stderr").read_text()
    process = forked(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    process.wait()
    assert process.poll() == -9


def test_it_does_not_outlast_the_wait(tmp_path: Path) -> None:
    process = forked(lambda: time.sleep(60), tmp_path)
    with pytest.raises(subprocess.TimeoutExpired), stopping(process):
        process.communicate(b"", timeout=0.2)
    assert process.poll() == -9


def test_it_does_not_outlast_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from quantlab.workers import Forked, die_with_parent\n"
        "def main():\n"
        "    die_with_parent()\n"
        "    time.sleep(60)\n"
        "process = Forked(main, open(sys.argv[1], 'wb'))\n"
        "print(process._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "stderr")], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)  # it has asked by then
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _gone, alive = psutil.wait_procs([child], timeout=10)
    assert not alive or all(p.status() == psutil.STATUS_ZOMBIE for p in alive)
