"""What memory this process holds, what it may still take, and giving back what the allocator keeps.

``trim`` matters on the CPU: glibc keeps freed memory in its arenas (one a thread), and raises the size above which it
maps and unmaps directly each time such a piece is freed, up to 32 MiB. A walk through blocks of varying tensors then
ends with the sum of several peaks instead of one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil


def resident() -> int:
    """Bytes of resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """The most bytes that were ever resident. Read from ``/proc``: ``ru_maxrss`` of a fresh process starts with what
    its parent held when it was started. 0 where there is no ``/proc``."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def available() -> int:
    """Bytes that can be taken without swapping: of the machine, and of the container where that has less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return max(free, 0)


def trim() -> None:
    """Give freed memory back to the system now (glibc; elsewhere nothing happens)."""
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if release is not None:
            release(0)


def map_large(threshold: int = 1 << 20) -> None:
    """From now on pieces of at least ``threshold`` bytes are mapped directly, hence given back the moment they are
    freed (glibc; elsewhere nothing happens). Costs a page fault for every page of every such piece: only under a
    limit. Call it before anything large has been allocated: holes that are in the heap already are filled first, and
    what lies in them is not given back."""
    if sys.platform == "linux":
        setting = getattr(ctypes.CDLL(None), "mallopt", None)
        if setting is not None:
            setting(-3, threshold)  # M_MMAP_THRESHOLD; setting it also ends its growing
            setting(-1, threshold)  # M_TRIM_THRESHOLD


def keep_few_kernels(count: int = 8) -> None:
    """Let oneDNN keep so many compiled kernels rather than 1024: experts get another number of tokens each time, every
    number asks for kernels of its own, and what they hold grows with every block. Read at its first product, hence
    to be called before any; a value that the user has set stays."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(count))
