"""The real command line, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One thread: the models are tiny, and threads that wait for each other are slow on a busy machine.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def quantlab(
    *words: str | Path,
    cwd: Path,
    code: int | None = 0,
    root: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 400,
) -> subprocess.CompletedProcess[str]:
    """Run `quantlab words...` of the package in `root`; `code` is the exit status that it must have."""
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", *map(str, words)],
        cwd=cwd, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(root)} | dict(environment or {}),
        capture_output=True, text=True, timeout=timeout, encoding="utf-8", check=False,
    )  # fmt: skip
    if code is not None:
        assert done.returncode == code, (
            f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    return done
