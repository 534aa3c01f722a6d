"""The tables of methods, formats and tasks: what the rest of quantlab needs to know of each is said here, once.

The tables are literal and need no torch. They name code as ``"module:function"``, imported when it is first used, so an
upper layer can be named here without being imported. Adding a method, a format or a task is described in CONTRIBUTING.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(target: str) -> Any:
    """What ``"module:name"`` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
