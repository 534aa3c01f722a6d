"""Read a domain from YAML and refuse what could not be built, naming file, table, column and key.

The YAML has the fields of `schema.Domain`, `Table` and `Column`; unknown keys are errors. One shorthand: the
`values` of a label may be a mapping from group to values, and a category with `group_of: <that label>` then
has the group of its row (강철 검 → 무기) and needs no values of its own.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from quantlab.data.schema import ROLES, Column, Domain, Table
from quantlab.errors import DataError
from quantlab.textfile import read_text

PATTERNS = ("phone", "email", "address", "code")
_TYPE = re.compile(r"INTEGER|BIGINT|REAL|TEXT|DATE|BOOLEAN|(?:VAR)?CHAR\(\d+\)|DECIMAL\(\d+,\d+\)")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = frozenset(
    {
        "all", "and", "as", "asc", "between", "by", "case", "check", "column", "create", "cross",
        "default", "delete", "desc", "distinct", "drop", "else", "end", "except", "exists",
        "foreign", "from", "full", "group", "having", "in", "index", "inner", "insert", "intersect",
        "into", "is", "join", "key", "left", "like", "limit", "not", "null", "on", "or", "order",
        "outer", "primary", "references", "right", "select", "set", "table", "then", "to", "union",
        "unique", "update", "using", "values", "when", "where", "with",
    }
)  # fmt: skip
_DOMAIN_KEYS = frozenset({"db_id", "name", "ko", "tables"})
_TABLE_KEYS = frozenset({"name", "ko", "counter", "rows", "columns", "unique"})
_COLUMN_KEYS = frozenset(f.name for f in fields(Column)) - {"groups"}
_COMMON = frozenset({"name", "ko", "type", "role", "nullable"})
_TEXT = frozenset({"values", "combine", "joiner", "person"})
_ROLE_KEYS: dict[str, frozenset[str]] = {
    "key": frozenset(),
    "label": _TEXT,
    "category": frozenset({"values", "group_of"}),
    "number": frozenset({"range", "step", "unit", "high", "low"}),
    "date": frozenset({"range", "verb", "after", "within"}),
    "ref": frozenset({"ref"}),
    "flag": frozenset({"true_ko", "false_ko", "share"}),
    "text": _TEXT | {"pattern"},
}
_ROLE_TYPES = {
    "key": ("INTEGER",),
    "label": ("VARCHAR", "CHAR", "TEXT"),
    "category": ("VARCHAR", "CHAR", "TEXT", "INTEGER"),
    "number": ("INTEGER", "BIGINT", "REAL", "DECIMAL"),
    "date": ("DATE",),
    "ref": ("INTEGER",),
    "flag": ("BOOLEAN",),
    "text": ("VARCHAR", "CHAR", "TEXT"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_values(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and all(map(_is_texts, value.values())))


_TEXT_SHAPE = ("text", lambda value: isinstance(value, str))
_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("joiner", "pattern", "group_of", "unit", "high", "low", "verb"), _TEXT_SHAPE),
    **dict.fromkeys(("after", "ref", "true_ko", "false_ko"), _TEXT_SHAPE),
    **dict.fromkeys(("nullable", "share", "step"), ("a number", _is_number)),
    "person": ("true or false", lambda value: isinstance(value, bool)),
    "values": ("a list, or lists of text by group", _is_values),
    "combine": ("lists of text", lambda value: isinstance(value, list) and all(map(_is_texts, value))),
    "within": ("two whole numbers", lambda v: isinstance(v, list) and [type(n) for n in v] == [int, int]),
}


def read_domain(path: Path) -> Domain:
    """The domain described by a YAML file; DataError says what is wrong and where."""
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path.name} is not valid YAML: {error}") from error
    return parse_domain(data, path.name)


def parse_domain(data: Any, source: str = "domain") -> Domain:
    """A validated Domain from plain YAML data; `source` heads the messages."""
    _keys(data, _DOMAIN_KEYS, _DOMAIN_KEYS, source)
    if type(data["db_id"]) is not int or data["db_id"] < 1:
        _fail(source, f"db_id must be a whole number from 1, not {data['db_id']!r}")
    if not isinstance(data["tables"], list) or not data["tables"]:
        _fail(source, "tables must be a list")
    tables = tuple(_table(item, source) for item in data["tables"])
    _unique_names([t.name for t in tables], source, "table")
    domain = Domain(data["db_id"], _name(data["name"], source), _string(data, "ko", source), tables)
    for table in tables:
        for column in table.columns:
            _check_links(domain, table, column, f"{source}: {table.name}.{column.name}")
    _check_connected(domain, source)
    return domain


def _table(data: Any, source: str) -> Table:
    where = f"{source}: table {data.get('name', '?') if isinstance(data, Mapping) else '?'}"
    _keys(data, _TABLE_KEYS, _TABLE_KEYS - {"unique"}, where)
    if type(data["rows"]) is not int or data["rows"] < 1:
        _fail(where, f"rows must be a whole number from 1, not {data['rows']!r}")
    if not isinstance(data["columns"], list) or not data["columns"]:
        _fail(where, "columns must be a list")
    name = _name(data["name"], where)
    columns = tuple(_column(item, data["rows"], f"{source}: {name}") for item in data["columns"])
    _unique_names([c.name for c in columns], where, "column")
    for role, limits in (("key", (1, 1)), ("label", (0, 1))):
        count = sum(c.role == role for c in columns)
        if not limits[0] <= count <= limits[1]:
            allowed = "one" if limits[0] else "at most one"
            _fail(where, f"a table has {allowed} {role} column, this one has {count}")
    refs = {c.name for c in columns if c.role == "ref" and not c.nullable}
    unique = data.get("unique")
    if "unique" in data and (not _is_texts(unique) or len(set(unique)) < 2 or not set(unique) <= refs):
        _fail(where, "unique takes two or more ref columns that are not nullable")
    ko, counter = _string(data, "ko", where), _string(data, "counter", where)
    return Table(name, ko, counter, data["rows"], columns, tuple(unique or ()))


def _column(data: Any, rows: int, source: str) -> Column:
    where = f"{source}.{data.get('name', '?') if isinstance(data, Mapping) else '?'}"
    _keys(data, _COLUMN_KEYS, _COMMON - {"nullable"}, where)
    role = data["role"]
    if role not in ROLES:
        _fail(where, f"unknown role {role!r}", _suggest(str(role), ROLES))
    extra = set(data) - _COMMON - _ROLE_KEYS[role]
    if extra:
        _fail(where, f"{sorted(extra)[0]} does not belong to role {role}")
    if not isinstance(data["type"], str) or not _TYPE.fullmatch(data["type"]):
        _fail(where, f"unknown type {data['type']!r}", "as in DDL: INTEGER, VARCHAR(20), DECIMAL(3,1), DATE")
    if data["type"].split("(")[0] not in _ROLE_TYPES[role]:
        _fail(where, f"role {role} does not go with type {data['type']}")
    for key, value in data.items():
        if key in _SHAPES and not _SHAPES[key][1](value):
            _fail(where, f"{key} must be {_SHAPES[key][0]}, not {value!r}")
    given = {k: _frozen(v) for k, v in data.items() if k != "values"}
    _name(data["name"], where)
    _string(data, "ko", where)
    values = data.get("values") or ()
    if isinstance(values, Mapping):
        given["groups"] = tuple((str(group), _frozen(members)) for group, members in values.items())
        values = [value for _, members in given["groups"] for value in members]
    column = Column(**given, values=tuple(values))
    if not 0 <= column.nullable < 1 or (column.nullable and role in {"key", "label"}):
        _fail(where, "nullable is the share of NULLs, from 0 to below 1, and not for keys and labels")
    if not 0 <= column.share <= 1:
        _fail(where, "share must be between 0 and 1")
    if role in {"label", "category", "text"}:
        _check_values(column, rows, where)
    elif role in {"number", "date"}:
        _check_range(column, where)
    elif role == "flag" and not (column.true_ko and column.false_ko):
        _fail(where, "a flag needs true_ko and false_ko")
    elif role == "ref" and not column.ref:
        _fail(where, "a ref needs ref: table.column")
    return column


def _check_values(column: Column, rows: int, where: str) -> None:
    sources = (column.values, column.combine, column.person, column.pattern, column.group_of)
    if sum(map(bool, sources)) != 1:
        _fail(where, "needs exactly one of values, combine, person, pattern, group_of that its role allows")
    if column.pattern and column.pattern not in PATTERNS:
        _fail(where, f"unknown pattern {column.pattern!r}", _suggest(column.pattern, PATTERNS))
    expected = int if column.type == "INTEGER" else str
    for value in column.values:
        if type(value) is not expected:
            wanted = "a whole number" if expected is int else "text (quote it)"
            _fail(where, f"value {value!r} is not {wanted}")
    if len(set(column.values)) != len(column.values):
        _fail(where, "values are repeated")
    if column.role == "label" and not column.person:
        available = len(column.values) or len({column.joiner.join(c) for c in _product(column.combine)})
        if available < rows:
            _fail(where, f"{rows} rows need as many different labels, there are {available}")
    longest = max((len(str(v)) for v in column.values), default=0)
    size = re.search(r"CHAR\((\d+)\)", column.type)
    if size and longest > int(size.group(1)):
        _fail(where, f"a value of {longest} characters does not fit {column.type}")


def _check_range(column: Column, where: str) -> None:
    of_dates = column.role == "date"
    fits = (lambda bound: type(bound) is datetime.date) if of_dates else _is_number
    what = "dates (YYYY-MM-DD)" if of_dates else "numbers"
    bounds = column.range
    if not isinstance(bounds, tuple) or len(bounds) != 2 or not all(map(fits, bounds)):
        _fail(where, f"range needs two {what}")
    low, high = bounds
    if not low < high:  # type: ignore[operator]
        _fail(where, f"range must go from the smaller to the larger, not {low} to {high}")
    if column.step <= 0:
        _fail(where, f"step must be a number above 0, not {column.step!r}")
    if column.type in {"INTEGER", "BIGINT"} and not all(isinstance(v, int) for v in (low, high, column.step)):
        _fail(where, f"{column.type} needs whole numbers in range and step")
    if column.within and (not column.after or not 0 <= column.within[0] <= column.within[1]):
        _fail(where, "within is [fewest, most] days and needs after")


def _check_links(domain: Domain, table: Table, column: Column, where: str) -> None:
    names = {t.name: t for t in domain.tables}
    if column.role == "ref":
        parent = names.get(column.ref_table)
        if parent is None or parent.key.name != column.ref_column:
            _fail(where, f"ref {column.ref} is not the key of a table")
    if column.group_of:
        label = {c.name: c for c in table.columns}.get(column.group_of)
        if label is None or not label.groups:
            _fail(where, f"group_of {column.group_of}: no such label with grouped values")
    if column.after:
        first, _, second = column.after.partition(".")
        before = {c.name: c for c in table.columns[: table.columns.index(column)]}
        base = before.get(first)
        if second and base is not None:
            earlier = domain.tables[: domain.tables.index(table)]  # no circle can come up
            base = {c.name: c for t in earlier if t.name == base.ref_table for c in t.columns}.get(second)
        if base is None or base.role != "date":
            _fail(where, f"after {column.after}: no date column of that name stands before this one")


def _check_connected(domain: Domain, source: str) -> None:
    linked: dict[str, set[str]] = {table.name: set() for table in domain.tables}
    for key in domain.foreign_keys():
        linked[key.table].add(key.parent)
        linked[key.parent].add(key.table)
    seen, todo = set(), [domain.tables[0].name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(linked[name])
    apart = sorted(set(linked) - seen)
    if apart:
        _fail(source, f"no foreign key connects {', '.join(apart)} to {domain.tables[0].name}")


def _keys(data: Any, allowed: frozenset[str], required: frozenset[str], where: str) -> None:
    if not isinstance(data, Mapping):
        _fail(where, f"expected keys and values, found {type(data).__name__}")
    for key in data:
        if key not in allowed:
            _fail(where, f"unknown key {key!r}", _suggest(str(key), allowed))
    missing = sorted(required - set(data))
    if missing:
        _fail(where, f"{missing[0]} is missing")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in _RESERVED:
        _fail(where, f"name {value!r} must be lower snake_case and no SQL keyword")
    return value


def _string(data: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(data[key], str) or not data[key].strip():
        _fail(where, f"{key} must be text, not {data[key]!r}")
    return str(data[key])


def _unique_names(names: list[str], where: str, what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            _fail(where, f"{what} {name} appears twice")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _product(parts: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    combined: list[tuple[str, ...]] = [()]
    for part in parts:
        combined = [(*head, item) for head in combined for item in part]
    return combined


def _suggest(given: str, valid: frozenset[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(given, sorted(valid), n=1)
    return f"did you mean {near[0]}?" if near else "one of: " + ", ".join(sorted(valid))


def _fail(where: str, message: str, hint: str = "") -> NoReturn:
    raise DataError(f"{where}: {message}", hint=hint)
