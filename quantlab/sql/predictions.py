"""Predictions and judge's verdicts as files: JSON lines that belong to the rows of a dataset.

A prediction is `{"id": …, "prediction": …}`; `output` or `sql` may stand for `prediction`, so the samples of a run can
be scored again. Without ids the lines are taken in the order of the data, one each. A verdict is `{"id": …, "answer":
"yes" | "no"}` (or true and false), with `why` if the judge said it. Every complaint names the file and the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.sql.dataset import Item
from quantlab.textfile import json_objects

FIELDS = ("prediction", "output", "sql")
ANSWERS: Mapping[Any, bool] = {"yes": True, "no": False, True: True, False: False}


def read_predictions(path: Path, items: Sequence[Item]) -> list[str]:
    """What was predicted for each item, in the order of the items. An empty text is an answer that was not given."""
    rows = _rows(path)
    texts = [_text(row, f"{path}:{number}") for number, row in rows]
    with_id = [row.get("id") is not None for _, row in rows]
    if not any(with_id):
        if len(texts) != len(items):
            raise DataError(
                f"{path}: {len(texts)} predictions without an id for {len(items)} questions",
                hint='one line for each question in the order of the data, or an "id" in every line',
            )
        return texts
    found = _by_id(path, rows, texts, items)
    missing = [item.id for item in items if item.id not in found]
    if missing:
        raise DataError(
            f"{path}: no prediction for {_some(missing)}",
            hint='a question without an answer gets "prediction": ""; a part of the data: --set tasks.text2sql.limit',
        )
    return [found[item.id] for item in items]


def read_judge(path: Path, items: Sequence[Item]) -> dict[str, tuple[bool, str]]:
    """Item id → (yes, why) of a judge's file; not every item needs a verdict."""
    rows = _rows(path)
    verdicts = [_answer(row, f"{path}:{number}") for number, row in rows]
    return _by_id(path, rows, verdicts, items)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"no such file: {path}", hint="JSON lines, one object for each question")
    rows = json_objects(path)
    if not rows:
        raise DataError(f"{path}: no lines")
    return rows


def _by_id(
    path: Path, rows: Sequence[tuple[int, dict[str, Any]]], values: Sequence[Any], items: Sequence[Item]
) -> dict[str, Any]:
    known = {item.id for item in items}
    found: dict[str, Any] = {}
    for (number, row), value in zip(rows, values, strict=True):
        if row.get("id") is None:
            raise DataError(f"{path}:{number}: no 'id', which other lines have")
        name = str(row["id"])
        if name not in known:
            raise DataError(
                f"{path}:{number}: the data have no question {name!r}", hint=f"it has {_some(list(known))}"
            )
        if name in found:
            raise DataError(f"{path}:{number}: a second line for {name!r}")
        found[name] = value
    return found


def _text(row: dict[str, Any], where: str) -> str:
    for name in FIELDS:
        if name in row:
            if not isinstance(row[name], str):
                raise DataError(f"{where}: {name!r} must be text")
            return str(row[name])
    raise DataError(
        f"{where}: no {' or '.join(map(repr, FIELDS))}", hint=f"the line has {', '.join(row) or 'nothing'}"
    )


def _answer(row: dict[str, Any], where: str) -> tuple[bool, str]:
    for name in ("answer", "verdict", "yes"):
        value = row.get(name)
        if isinstance(value, str):
            value = value.strip().lower()
        if isinstance(value, str | bool) and value in ANSWERS:
            return ANSWERS[value], str(row.get("why", ""))
    raise DataError(f"{where}: no verdict", hint='expected "answer": "yes" or "no"')


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
