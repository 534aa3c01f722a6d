"""The base of everything that is read from a recipe: unknown keys are refused, nothing is coerced, nothing changes. A
size alone may be written with its unit.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def bytes_of(text: str) -> int | None:
    """Bytes of a size such as ``600M``, ``90 MB``, ``1.5GiB`` or ``123456``; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        return None
    return int(float(found[1]) * UNITS[found[2]])


def _size(value: Any) -> Any:
    found = bytes_of(value) if isinstance(value, str) else value
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
        raise ValueError(f"expected a size such as 90MB, 1.5GiB or a number of bytes, found {value!r}")
    return found


# Of bytes: a number, or a text with a unit.
Size = Annotated[
    int, BeforeValidator(_size), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})
]
Positive = Annotated[int, Field(ge=1)]
ALTERNATIVE = "|"  # begins the tag of an alternative of a key's type; messages leave such tags out
