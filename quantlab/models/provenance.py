"""Where a model comes from: the ``quantlab.json`` beside its weights, and the chain of parents behind it (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.models.safetensors.files import ModelFiles
from quantlab.textfile import read_json

LONGEST_CHAIN = 8


def provenance(path: Path) -> dict[str, Any]:
    """The ``quantlab.json`` of a checkpoint, empty for any other model."""
    try:
        content = read_json(path / "quantlab.json")
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def is_embedded(files: ModelFiles) -> bool:
    """Whether a model is one that ships with quantlab, or was made from one, as far as its parents are still there."""
    name, path = files.name, files.path
    for _ in range(LONGEST_CHAIN):
        if name.startswith("embedded:"):
            return True
        parent = provenance(path).get("parent")
        if not isinstance(parent, str) or parent == name:
            return False
        name, path = parent, Path(parent)
    return False
