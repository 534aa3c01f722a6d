"""sqlglot without its log: it warns of each statement that it keeps as text and each clause that it drops."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_sqlglot() -> Iterator[None]:
    """Inside, sqlglot logs errors only; what it cannot do, the callers say themselves."""
    logger = logging.getLogger("sqlglot")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
