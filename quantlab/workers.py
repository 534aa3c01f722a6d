"""Fresh Python processes that do one thing and die with their parent: a checkpoint reloaded, a speed measured.

A worker is a module of quantlab run with ``python -m``. It reads what to do from stdin and answers on stdout or in
files. No shell, nothing inherited but the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def stopping(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Never leave the process behind, whatever ends the wait."""
    try:
        yield process
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
