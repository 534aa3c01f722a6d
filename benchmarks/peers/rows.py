"""Token rows as a file of ids (for the peers) and as text that quantlab reads back as the same ids."""

from __future__ import annotations

from pathlib import Path

from random_llama import random_rows, text_of_rows
from safetensors.torch import save_file


def write(ids: str, text: str, vocab: str, rows: str, seq_len: str, seed: str) -> None:
    """Seeded random rows; called in a process of its own, hence the strings."""
    drawn = random_rows(int(vocab), int(rows), int(seq_len), int(seed))
    Path(text).write_text(text_of_rows(drawn), encoding="utf-8")
    save_file({"ids": drawn}, ids)
