"""Renames that survive a power cut: what is renamed is on the disk before, and the rename itself is after.

A kill alone needs none of this, since the kernel keeps what a dead process wrote. Without it a machine that loses power
may come back with the new name and an empty file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Wait until the names in a directory are on the disk. File systems that cannot say so are taken at their word."""
    with contextlib.suppress(OSError):
        sync_file(path)


def replace(source: Path, target: Path) -> None:
    """``os.replace`` of a file or a directory, the content on the disk before and the new name after."""
    if source.is_dir():
        for inside in sorted(source.rglob("*")):
            if inside.is_file():
                sync_file(inside)
        sync_folder(source)
    else:
        sync_file(source)
    os.replace(source, target)
    sync_folder(target.parent)
