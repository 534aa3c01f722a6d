"""One worker process as its parent sees it: started when first asked, killed when late, replaced when dead.

Deadlines are kept by a single thread that looks at all processes again and again (`kill_if_late`); a timer for
each question would cost more than most questions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import MachineError
from quantlab.text2sql.sandbox.messages import read_frame, write_frame

# Isolated (-I) and without site-packages (-S): the package's own folder is all that is added to the path.
PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from quantlab.text2sql.sandbox.worker import main; sys.exit(main())"
)
ROOT = Path(__file__).parents[3]
START_SECONDS = 30.0
# What a worker inherits: enough to find shared libraries, no secret.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL")


class WorkerProcess:
    """One worker process and the pipes to it; replaced by a fresh one whenever it dies."""

    def __init__(self, limits: Mapping[str, Any]) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()  # of the two below
        self.deadline: float | None = None
        self.late = False

    def ask(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """The worker's answers, each within `seconds`; a failure for a request that the worker did not survive.

        All requests go out in one message, so that the worker need not wait for us between them; the answers come back
        one by one, so that what is answered is not lost with a worker that dies.
        """
        answers: list[dict[str, Any]] = []
        while len(answers) < len(requests):
            try:
                answers += self._exchange(self._started(), requests[len(answers) :], seconds)
            except BaseException:
                self._discard()  # interrupted half-way: what it still answers must not meet the next question
                raise
        return answers

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
                [sys.executable, "-I", "-S", "-c", PROGRAM, str(ROOT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"TZ": "UTC"},
            )
        except OSError as error:
            raise MachineError(f"cannot start the SQL worker process: {error}") from error
        self.process = process
        try:
            self._start_waiting(START_SECONDS)
            ready = self._send(process, dict(self.limits)) and self._receive(process)
        finally:
            self._stop_waiting()
        if not ready:
            process.kill()
            _, stderr = process.communicate()
            self.process = None
            words = stderr.decode("utf-8", "replace").strip().splitlines()
            raise MachineError("the SQL worker process does not start" + (f": {words[-1]}" if words else ""))
        return process

    def _exchange(
        self, process: subprocess.Popen[bytes], requests: Sequence[dict[str, Any]], seconds: float
    ) -> list[dict[str, Any]]:
        """Answers to the first requests: to all of them, or up to the one that ended the worker."""
        answers: list[dict[str, Any]] = []
        started = time.monotonic()
        self._start_waiting(seconds)
        try:
            sent = self._send(process, {"requests": list(requests)})
            while len(answers) < len(requests):
                answer = self._receive(process) if sent else None
                late = self._stop_waiting()
                if answer is None:
                    answers.append(_obituary(late, self._discard(), seconds, time.monotonic() - started))
                    break
                answers.append(answer)
                if late:  # answered in the very moment it was killed
                    self._discard()
                    break
                started = time.monotonic()
                self._start_waiting(seconds)
        finally:
            self._stop_waiting()
        return answers

    @staticmethod
    def _send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> bool:
        assert process.stdin is not None
        try:
            write_frame(process.stdin, message)
        except OSError:
            return False  # the pipe broke: the worker is gone
        return True

    @staticmethod
    def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        assert process.stdout is not None
        try:
            return read_frame(process.stdout)
        except (OSError, ValueError):
            return None  # half a frame

    def _start_waiting(self, seconds: float) -> None:
        with self.lock:
            self.late, self.deadline = False, time.monotonic() + seconds

    def _stop_waiting(self) -> bool:
        """Whether the worker has been killed for being late."""
        with self.lock:
            self.deadline = None
            return self.late

    def kill_if_late(self) -> None:
        """Called by the watch, from its own thread."""
        with self.lock:
            if self.deadline is not None and time.monotonic() > self.deadline and self.process is not None:
                self.late, self.deadline = True, None
                self.process.kill()

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


def _obituary(late: bool, code: int | None, seconds: float, spent: float) -> dict[str, Any]:
    if late or code == -14:  # -14: the worker's own timer (SIGALRM) was faster
        kind, reason = "seconds", f"hung inside the engine; killed after {seconds:g} s"
    else:
        kind, reason = "crash", f"the process that ran the query died (exit code {code})"
    return {"kind": kind, "reason": reason, "steps": 0, "seconds": spent}
