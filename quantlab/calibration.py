"""Calibration: texts to rows of tokens, the same rows for the same seed everywhere.

The texts are joined with a blank line and tokenised once; ``rows`` of its non-overlapping windows of ``seq_len``
tokens are drawn at random. The digest names exactly these tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import DataError
from quantlab.paths import find_source
from quantlab.textfile import json_lines, read_text

if TYPE_CHECKING:
    import torch

SEPARATOR = "\n\n"


def read_texts(source: str) -> list[str]:
    """The texts of a source: ``.jsonl`` with a ``text`` field, any other file as one text, or
    ``hf:<owner>/<dataset>[/<config>]:<split>``.

    Raises:
        DataError: missing, unreadable, empty, or a row without text, naming the row.
    """
    if source.startswith("hf:"):
        return _from_hub(source)
    path = find_source(source)
    texts = _jsonl(path) if path.suffix == ".jsonl" else [read_text(path)]
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise DataError(
            f"{path} holds no text", hint='expected UTF-8 text, or JSON lines with a "text" field'
        )
    return texts


def token_rows(texts: Sequence[str], tokenizer: Any, *, rows: int, seq_len: int, seed: int) -> torch.Tensor:
    """Token ids int64 [rows, seq_len].

    Raises:
        DataError: the texts are too short for that many windows; says how many there are.
    """
    import torch

    ids = tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // seq_len
    if available < rows:
        raise DataError(
            f"the calibration text has {len(ids)} tokens, enough for {available} rows of {seq_len}, not {rows}",
            hint=f"set calibration.rows={available}, a smaller calibration.seq_len, or give more text"
            if available
            else "give more text or a smaller calibration.seq_len",
        )
    chosen = sorted(random.Random(seed).sample(range(available), rows))
    return torch.tensor([ids[i * seq_len : (i + 1) * seq_len] for i in chosen], dtype=torch.int64)


def digest(rows: torch.Tensor) -> str:
    """SHA-256 of token rows, 16 hex digits."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def _jsonl(path: Path) -> list[str]:
    texts = []
    for number, row in json_lines(path, "{name}, line {number}"):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}, line {number}: expected an object with a "text" string')
        texts.append(row["text"])
    return texts


def _from_hub(source: str) -> list[str]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hf:").partition(":")
    parts = name.split("/")
    # Two parts are an owner and a dataset, or a dataset without an owner and its configuration.
    readings = [("/".join(parts[:2]), "/".join(parts[2:]) or None)]
    if len(parts) == 2:
        readings.append((parts[0], parts[1]))
    found, failure = None, None
    for dataset, config in readings:
        try:
            found = load_dataset(dataset, config, split=split or "train")
            break
        except Exception as error:  # the library raises a dozen kinds, all meaning: not to be had
            failure = failure or error
    if found is None:
        raise DataError(
            f"cannot load {source}: {failure}", hint="form: hf:<owner>/<dataset>[/<config>]:<split>"
        )
    if "text" not in found.column_names:
        raise DataError(f"{source} has no text column, only {', '.join(found.column_names)}")
    return [t for t in found["text"] if t and t.strip()]
