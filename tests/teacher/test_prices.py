"""The table of prices and what may stand in its place."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from quantlab.errors import DataError
from quantlab.recipe.distill import Price
from quantlab.teacher.prices import TABLE, cost, load_table, price_of


def test_every_entry_is_sound_and_dated() -> None:
    table = load_table(TABLE)
    assert {"gpt-4", "gpt-4o", "gpt-4o-mini"} <= table.keys()
    for entry in table.values():
        assert 0 < entry.input <= entry.output and entry.batch == 0.5
        assert datetime.date(2024, 1, 1) <= entry.date


def test_who_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert price_of("gpt-4o") == price_of("gpt-4o-2024-08-06") == Price(input=2.5, output=10)
    assert price_of("gpt-4-0613") == price_of("gpt-4")
    assert price_of("gpt-4o", batch=True) == Price(input=1.25, output=5)
    assert price_of("somebody/model") is None
    own = tmp_path / "prices.yaml"
    own.write_text(
        "gpt-4o: {input: 1, output: 2, date: 2026-11-01}\nours: {input: 0, output: 0, date: 2026-11-01}"
    )
    monkeypatch.setenv("QUANTLAB_PRICES", str(own))
    assert price_of("gpt-4o", batch=True) == Price(input=1, output=2)
    assert price_of("ours") == Price(input=0, output=0)
    assert price_of("gpt-4") == Price(input=30, output=60)
    override = Price(input=7, output=8)
    assert price_of("gpt-4o", override, batch=True) == override


def test_cost() -> None:
    assert cost(Price(input=2.5, output=10), 1_000_000, 500_000) == 7.5
    assert cost(None, 5, 5) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "m: 3",
        "m: {input: 1, output: 2}",
        "m: {input: -1, output: 2, date: 2026-01-01}",
        "m: {input: one, output: 2, date: 2026-01-01}",
        "m: {input: .nan, output: 2, date: 2026-01-01}",
        "m: {input: 1, output: 2, date: soon}",
        "m: {input: 1, output: 2, date: 2026-01-01, cheap: 1}",
        "m: [",
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match="mine.yaml"):
        load_table(path)
