"""How much processor time others took while something was timed.

The processors that this process may run on are busy for so many seconds; what it did not use itself, others did: other
processes, and on a virtual machine the host ("steal"). Counted by the system in ticks of a hundredth of a second, so
times below half a second say little.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

DISTURBED = 0.15  # processors: beyond that a measurement is said to be disturbed


@dataclass(frozen=True)
class Mark:
    """A moment: seconds on the clock, seconds that the processors were busy, seconds that this process used."""

    clock: float
    busy: float
    own: float


def mark() -> Mark:
    """The present moment."""
    return Mark(time.perf_counter(), _busy(), time.process_time())


def taken_between(before: Mark, after: Mark) -> float:
    """Processor seconds that others used between two moments. Over a short time the ticks make it inexact, even a
    little negative, but not on average: add such times up before you judge."""
    return (after.busy - before.busy) - (after.own - before.own)


def others_since(before: Mark) -> float:
    """Processors that others kept busy since ``before``, on average: 1.0 is one whole processor."""
    now = mark()
    passed = now.clock - before.clock
    return max(0.0, taken_between(before, now)) / passed if passed > 0 else 0.0


def _busy() -> float:
    """Seconds that the processors this process may use have been busy."""
    process = psutil.Process()
    allowed = set(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None
    total = 0.0
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        if allowed is None or number in allowed:
            idle = times.idle + getattr(times, "iowait", 0.0)
            # guest time is part of user time already
            total += sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total
