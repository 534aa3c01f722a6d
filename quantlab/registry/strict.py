"""The base of everything that is read from a recipe: unknown keys are refused, nothing is coerced, nothing changes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Positive = Annotated[int, Field(ge=1)]
ALTERNATIVE = "|"  # begins the tag of an alternative of a key's type; messages leave such tags out
