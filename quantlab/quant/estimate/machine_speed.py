"""What this machine does a second, measured for a third of a second: the rates that ``forecast`` divides by."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quantlab.quant.estimate.forecast import MachineSpeed

SIDE = 1024  # of the matrices multiplied; smaller than those of most models, so rather too slow than too fast
BYTES = 16 * 2**20  # written and read back


def measure(
    device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seconds: float = 0.3, folder: Path | None = None
) -> MachineSpeed:
    """MachineSpeed of products in ``dtype`` and in float32, of elementwise work, and of the disk under ``folder``."""
    place = torch.device(device)
    share = seconds / 4
    a, b = (torch.randn(SIDE, SIDE, device=place) for _ in range(2))
    low, high = a.to(dtype), b.to(dtype)
    product = 2.0 * SIDE**3
    return MachineSpeed(
        matmul=product * _repeats(lambda: low @ high, share, place),
        exact=product * _repeats(lambda: a @ b, share, place),
        elements=SIDE**2 * _repeats(lambda: torch.addcmul(a, a, b), share, place),
        width=dtype.itemsize,
        disk=BYTES * _repeats(lambda: _write_and_read(folder), share, torch.device("cpu")),
    )


def _repeats(work: Callable[[], object], seconds: float, place: torch.device) -> float:
    """How often a second ``work`` is done; the first time does not count."""
    work()
    _wait(place)
    count, started = 0, time.perf_counter()
    while True:
        work()
        count += 1
        _wait(place)
        passed = time.perf_counter() - started
        if passed >= seconds:
            return count / passed


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _write_and_read(folder: Path | None) -> None:
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"\0" * BYTES)
        stream.flush()
        os.fsync(stream.fileno())
        stream.seek(0)
        stream.read()
