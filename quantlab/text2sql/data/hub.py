"""Rows of Hugging Face datasets: `hf:owner/name[/config]:split`."""

from __future__ import annotations

from typing import Any

from quantlab.errors import DataError, MachineError


def hub_rows(source: str) -> list[tuple[str, Any]]:
    """Rows of a Hugging Face dataset, from the hub or its local cache."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MachineError(f"{source} needs the datasets library", hint="pip install datasets") from error
    name, config, split = parse_hub(source)
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises from half a dozen libraries
        raise DataError(
            f"cannot load {source}: {error}", hint="form: hf:owner/name[/config]:split"
        ) from error
    return [(f"{source}:{number}", row) for number, row in enumerate(dataset, start=1)]


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """`hf:owner/name/config:split` → (owner/name, config or None, split, "train" when left out)."""
    path, _, split = source.removeprefix("hf:").partition(":")
    parts = path.split("/")
    if not path or len(parts) > 3 or not all(parts):
        raise DataError(f"not a dataset name: {source}", hint="form: hf:owner/name[/config]:split")
    return "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None), split or "train"
