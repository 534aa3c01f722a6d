"""How many tokens a model was made to attend to, as its configuration says (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def positions_of(config: Any) -> int | None:
    """From the content of a config.json, or a configuration of transformers; None where it does not say. Of a model
    that also sees or hears, those of its text part."""
    if isinstance(config, Mapping):
        text = config.get("text_config")
        inner = text if isinstance(text, Mapping) else {}
        found = [inner.get(key, config.get(key)) for key in POSITIONS]
    else:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = [getattr(text, key, None) for key in POSITIONS]
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
