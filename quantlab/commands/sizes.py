"""Sizes on the command line: `600M`, `8G`, `1.5GiB`, or plain bytes."""

from __future__ import annotations

import re

from quantlab.errors import RecipeError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size_of(text: str | None, option: str) -> int | None:
    """Bytes; None for None.

    Raises:
        RecipeError: names the option and what was expected.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise RecipeError(f"{option} {text}: expected a size such as 600M, 8G or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2]])
