"""What tokens cost: the table in `prices.yaml`, a file of the user's (environment QUANTLAB_PRICES), or the recipe."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.errors import DataError
from quantlab.recipe.distill import Price
from quantlab.textfile import read_text

TABLE = Path(__file__).with_name("prices.yaml")
ENVIRONMENT = "QUANTLAB_PRICES"
MILLION = 1_000_000
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{4})$")  # gpt-4o-2024-08-06, gpt-4-0613


@dataclass(frozen=True)
class Entry:
    """A line of the table; `batch` is the share that the Batch API takes."""

    input: float
    output: float
    batch: float
    date: datetime.date


def price_of(model: str, override: Price | None = None, batch: bool = False) -> Price | None:
    """US dollars for a million tokens; None when nobody says. An `override` is what is paid, batch or not.

    Raises:
        DataError: a table cannot be read; it names the file and the model.
    """
    if override is not None:
        return override
    found = entry_of(model)
    if found is None:
        return None
    share = found.batch if batch else 1.0
    return Price(input=found.input * share, output=found.output * share)


def entry_of(model: str) -> Entry | None:
    """The table's line for a model or for the model that it is a dated snapshot of."""
    table = load_table(TABLE)
    own = os.environ.get(ENVIRONMENT)
    if own:
        table |= load_table(Path(own).expanduser())
    return table.get(model) or table.get(_SNAPSHOT.sub("", model))


def cost(price: Price | None, input_tokens: int, output_tokens: int) -> float:
    """US dollars; 0 where no price is known."""
    if price is None:
        return 0.0
    return (input_tokens * price.input + output_tokens * price.output) / MILLION


def load_table(path: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(read_text(path, "the prices in "))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the prices in {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected models with their prices", hint=f"{TABLE.name} shows the form")
    return {str(model): _entry(path, str(model), row) for model, row in content.items()}


def _entry(path: Path, model: str, row: Any) -> Entry:
    hint = "form: {input: 2.5, output: 10, batch: 0.5, date: 2026-05-01}, dollars for a million tokens"
    if not isinstance(row, dict) or not {"input", "output", "date"} <= row.keys() <= set(
        Entry.__annotations__
    ):
        raise DataError(f"{path}: {model}: expected input, output and date", hint=hint)
    numbers = [row["input"], row["output"], row.get("batch", 1.0)]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n < 1e6 for n in numbers):
        raise DataError(f"{path}: {model}: a price is no number of dollars", hint=hint)
    if not isinstance(row["date"], datetime.date):
        raise DataError(f"{path}: {model}: date {row['date']!r} is no day such as 2026-05-01", hint=hint)
    return Entry(float(numbers[0]), float(numbers[1]), float(numbers[2]), row["date"])
