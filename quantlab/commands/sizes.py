"""Sizes on the command line: `600M`, `8G`, `1.5GiB`, or plain bytes."""

from __future__ import annotations

from quantlab.errors import RecipeError
from quantlab.registry.strict import bytes_of


def size_of(text: str | None, option: str) -> int | None:
    """Bytes; None for None.

    Raises:
        RecipeError: names the option and what was expected.
    """
    if text is None:
        return None
    found = bytes_of(text)
    if found is None:
        raise RecipeError(f"{option} {text}: expected a size such as 600M, 8G or 1.5GiB")
    return found
