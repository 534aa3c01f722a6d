"""Fresh Python processes that do one thing and die with their parent: a checkpoint reloaded, a speed measured.

A worker is a module of quantlab run with ``python -m``. It reads what to do from stdin and answers on stdout or in
files. No shell, nothing inherited but the environment. Where a run has imported the libraries and done nothing else
yet, a worker may be forked from it instead, which spares it the seconds that importing them again would take.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def start(
    module: str, stderr: IO[bytes], *words: str, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start ``python -m module words...`` with this very package; its stdin is a pipe."""
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


class Forked:
    """A copy of this process that runs a worker's ``main``: what is needed here of ``subprocess.Popen``, for where
    ``can_fork`` allows it. Threads are not copied, so nothing may have been computed yet: torch's would be missed.

    Args:
        main: called in the copy, with :meth:`communicate`'s words on its stdin.
        stderr: open for writing: what the copy prints.
    """

    returncode: int | None = None

    def __init__(self, main: Callable[[], None], stderr: IO[bytes]) -> None:
        import multiprocessing

        reading, writing = os.pipe()

        def run() -> None:
            os.close(writing)
            os.dup2(reading, 0)
            os.dup2(stderr.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdin = os.fdopen(0, encoding="utf-8")
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
            main()

        self._process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
        self._process.start()
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")

    def communicate(self, words: bytes, timeout: float | None = None) -> None:
        """Write ``words``, close the pipe, and wait. Raises subprocess.TimeoutExpired."""
        with self.stdin:
            self.stdin.write(words)
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)

    def poll(self) -> int | None:
        """The exit code, None while it runs; the signal's number with a minus where one ended it."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self) -> None:
        self._process.join()
        self.poll()
        self.stdin.close()

    def kill(self) -> None:
        self._process.kill()


def can_fork() -> bool:
    """Whether libraries survive a fork behind their import: on Linux, where no CUDA or ROCm could be at work."""
    import torch

    return sys.platform == "linux" and torch.version.cuda is None and torch.version.hip is None


@contextlib.contextmanager
def stopping(process: subprocess.Popen[bytes] | Forked) -> Iterator[None]:
    """Never leave the process behind, whatever ends the wait."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def die_with_parent() -> None:
    """For the worker, first of all: a killed run leaves no process behind (Linux; elsewhere a closed stdin must do)."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)


def last_line(text: str) -> str:
    """The last thing that a process said, for messages."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
