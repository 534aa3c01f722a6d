"""Who holds an open attempt: names for processes, and whether one has ended.

A claim of a killed process must not keep others from its requests, and one of a living process must.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil


def this_process() -> str:
    """Names this process for as long as it lives: machine, process namespace, id and start time."""
    return f"{_place()}|{os.getpid()}|{psutil.Process().create_time():.2f}"


def is_gone(owner: str) -> bool:
    """Whether `owner` (from `this_process`, or that and "#…") has certainly ended. False for processes elsewhere, which
    cannot be seen, and for batches."""
    parts = owner.partition("#")[0].rsplit("|", 2)
    if len(parts) < 3 or parts[0] != _place():
        return False
    try:
        return abs(psutil.Process(int(parts[1])).create_time() - float(parts[2])) > 1.0
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError):
        return False


def _place() -> str:
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()}|{space}"
