"""Where a checkpoint is while it is made, who is making it, and what may be in its place (no torch)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from quantlab.errors import DataError, MachineError, RecipeError


def partial_path(out: Path) -> Path:
    """Where a checkpoint lives until it is complete."""
    return out.with_name(out.name + ".partial")


def state_path(out: Path) -> Path:
    """Where what is needed to go on lives until then."""
    return out.with_name(out.name + ".state")


def tidy(out: Path) -> None:
    """Remove the state that a run left which was killed between naming its checkpoint and removing it."""
    if not out.is_dir():
        return
    if state_path(out).is_dir():
        refuse_second_writer(state_path(out))
    for folder in (partial_path(out), state_path(out)):  # the first only where the checkpoint was exported
        shutil.rmtree(folder, ignore_errors=True)


def claim(out: Path) -> None:
    """Refuse an output directory that holds something this run did not make.

    Raises:
        RecipeError: ``out`` exists and is not empty. DataError: it is a file.
    """
    if out.is_file():
        raise DataError(f"{out} is a file", hint="name a directory for the checkpoint")
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"{out} is not empty", hint="pass another --out, or remove it first")
    if out.is_dir():
        out.rmdir()


def this_process() -> dict[str, float]:
    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def refuse_second_writer(state: Path) -> None:
    """Two runs on one checkpoint would take each other's files for their own."""
    owner = read_object(state / "owner.json")
    if owner is None or owner.get("pid") == os.getpid():
        return
    try:
        alive = psutil.Process(int(owner["pid"]))
        if alive.create_time() == owner["started"] and alive.status() != psutil.STATUS_ZOMBIE:
            raise MachineError(
                f"{state} is in use by process {owner['pid']}", hint="wait for it, or name another --out"
            )
    except (psutil.Error, KeyError, TypeError, ValueError):
        return


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
