"""Checkpoint formats, one file each, writer and reader together. What is known of them is in
``quantlab.registry.formats``, which says what each module offers.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from quantlab.registry.formats import FORMATS


def format_module(name: str) -> ModuleType:
    """Where a format's ``pack``, ``unpack`` and ``config`` are."""
    module = FORMATS[name].module
    if module is None:
        raise ValueError(f"quantlab does not pack the {name} format itself")
    return import_module(module)
