"""The processes that `accelerate launch` or torchrun started together, as they say in the environment."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0
