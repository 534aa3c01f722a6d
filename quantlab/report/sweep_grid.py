"""The grid of a sweep for reports: which cells there are, which have a row, and swept values in words.

An axis is a dotted key, or several parted by commas that change together; `axes` is a recipe's `sweep`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantlab.errors import DataError
from quantlab.report.cells import Row

Axes = Mapping[str, Sequence[Any]]


def arrange(axes: Axes, rows: Sequence[Row]) -> list[tuple[dict[str, Any], Row | None]]:
    """Every cell of the grid in order, as (axis → value, its row or None where there is none yet)."""
    places: dict[str, Row | None] = {}
    points: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        points[key_of(point)] = point
        places[key_of(point)] = None
    for row in rows:
        point = {axis: value_of(row, axis) for axis in axes}
        key = key_of(point)
        if key not in places:
            raise DataError(f"run {row.get('run_id')}: {describe(point)} is no cell of this sweep")
        if places[key] is not None:
            other = (places[key] or {}).get("run_id")
            raise DataError(f"runs {other} and {row.get('run_id')} are the same cell: {describe(point)}")
        places[key] = row
    return [(points[key], row) for key, row in places.items()]


def split_axis(axis: str) -> list[str]:
    return [key.strip() for key in axis.split(",")]


def keys_of(axes: Iterable[str]) -> list[str]:
    return [key for axis in axes for key in split_axis(axis)]


def short(key: str) -> str:
    """`student.lora.r` → `r`; of a group, each."""
    return ", ".join(part.rsplit(".", 1)[-1] for part in split_axis(key))


def names_of(keys: Iterable[str]) -> list[str]:
    """The last part of each dotted key, the whole key where two end alike."""
    keys = list(keys)
    ends = [short(key) for key in keys]
    return [key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)]


def value_of(row: Row, axis: str) -> Any:
    """A row's value on an axis, kept under the axis' name or under its keys."""
    if axis in row:
        return row[axis]
    keys = split_axis(axis)
    lacking = [key for key in keys if key not in row]
    if lacking:
        raise DataError(
            f"run {row.get('run_id')}: no value for {', '.join(lacking)}, which the sweep changes"
        )
    return row[keys[0]] if len(keys) == 1 else [row[key] for key in keys]


def spread(point: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of a point, the values of grouped axes handed out to their keys."""
    handed: dict[str, Any] = {}
    for axis, value in point.items():
        keys = split_axis(axis)
        handed |= zip(keys, value, strict=True) if len(keys) > 1 else {keys[0]: value}
    return handed


def key_of(value: Any) -> str:
    """Equal for equal values, however they are written: 1 and 1.0, a list and a tuple."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{key_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(key_of, value)) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return json.dumps(value, default=str)


def say(value: Any) -> str:
    """A swept value in words."""
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(say, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {say(part)}" for key, part in value.items())
    return str(value)


def describe(point: Mapping[str, Any]) -> str:
    """`r 16, fraction 0.2`; whole keys where two end alike."""
    values = spread(point)
    return ", ".join(
        f"{name} {say(value)}" for name, value in zip(names_of(values), values.values(), strict=True)
    )
