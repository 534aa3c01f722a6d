"""Predictions and judge's verdicts as files: JSON lines that belong to the rows of a dataset.

A prediction is `{"id": …, "prediction": …}`; `output` or `sql` may stand for `prediction`, so the samples of a run can
be scored again. Without ids the lines are taken in the order of the data, one each. A verdict is `{"id": …, "answer":
"yes" | "no"}` (or true and false), with `why` if the judge said it. Where several rows of the data share an id, the
lines that have it belong to them in their order, one each. Every complaint names the file and the line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item
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
    """Item id → its value."""
    owners = _owners(items, {str(row.get("id")) for _, row in rows})
    lines: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for (number, row), value in zip(rows, values, strict=True):
        if row.get("id") is None:
            raise DataError(f"{path}:{number}: no 'id', which other lines have")
        name = str(row["id"])
        if name not in owners:
            raise DataError(
                f"{path}:{number}: the data have no question {name!r}", hint=f"it has {_some(list(owners))}"
            )
        lines[name].append((number, value))
        if len(lines[name]) > len(owners[name]):
            most = len(owners[name])
            words = "a second line" if most == 1 else f"more lines than the {most} questions of that id"
            raise DataError(f"{path}:{number}: {words} for {name!r}")
    found: dict[str, Any] = {}
    for name, given in lines.items():
        if len(given) < len(owners[name]):
            raise DataError(
                f"{path}:{given[0][0]}: {name!r} is the id of {len(owners[name])} questions, and the file has "
                f"{len(given)} of it: which they belong to cannot be told",
                hint=f"give a line for each in the order of the data, or name them {', '.join(owners[name])}",
            )
        found |= {item: value for item, (_, value) in zip(owners[name], given, strict=True)}
    return found


def _owners(items: Sequence[Item], used: set[str]) -> dict[str, list[str]]:
    """What a file may call the items → the ids of those it then means: `x#2` is one, `x` all that share `x` and are not
    called by a name of their own in the file."""
    owners: dict[str, list[str]] = {}
    for item in items:
        if item.shared_id and item.id not in used - {item.shared_id}:
            owners.setdefault(item.shared_id, []).append(item.id)
        if item.id != item.shared_id:
            owners.setdefault(item.id, []).append(item.id)
    return owners


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
