"""Declared column types: what kind of value they hold, how long it may be, which values they list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.text2sql.schema.schema import Kind, affinity
from quantlab.text2sql.schema.tokens import Token

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("INT", "INTEGER", "BIGINT", "SMALLINT", "TINYINT", "MEDIUMINT", "INT2", "INT4", "INT8", "YEAR", "OID",
         "SERIAL", "BIGSERIAL", "SMALLSERIAL", "SERIAL2", "SERIAL4", "SERIAL8", "ROWVERSION"),
        "integer",
    ),
    **dict.fromkeys(
        ("REAL", "FLOAT", "FLOAT4", "FLOAT8", "DOUBLE", "DECIMAL", "NUMERIC", "DEC", "FIXED", "NUMBER", "MONEY",
         "SMALLMONEY", "BINARY_FLOAT", "BINARY_DOUBLE"),
        "real",
    ),
    **dict.fromkeys(
        ("CHAR", "CHARACTER", "VARCHAR", "VARCHAR2", "NCHAR", "NVARCHAR", "NVARCHAR2", "BPCHAR", "TEXT", "TINYTEXT",
         "MEDIUMTEXT", "LONGTEXT", "NTEXT", "CLOB", "NCLOB", "STRING", "ENUM", "SET", "UUID", "UNIQUEIDENTIFIER",
         "JSON", "JSONB", "XML", "CITEXT", "NAME", "INET", "CIDR", "MACADDR", "INTERVAL",
         "LONG", "NATIONAL", "TSVECTOR"),
        "text",
    ),
    **dict.fromkeys(
        ("BLOB", "TINYBLOB", "MEDIUMBLOB", "LONGBLOB", "BYTEA", "BINARY", "VARBINARY", "IMAGE", "RAW"), "blob"
    ),
    **dict.fromkeys(("DATETIME", "DATETIME2", "SMALLDATETIME", "TIMESTAMP", "TIMESTAMPTZ"), "datetime"),
    **dict.fromkeys(("TIME", "TIMETZ"), "time"),
    **dict.fromkeys(("BOOL", "BOOLEAN"), "boolean"),
    "DATE": "date",
}  # fmt: skip
_SERIAL = re.compile(r"(?:BIG|SMALL)?SERIAL[248]?$")
_FIXED_POINT = frozenset({"DECIMAL", "NUMERIC", "DEC", "FIXED", "NUMBER"})
_WITH_LENGTH = re.compile(r"N?(?:VAR)?CHAR(?:ACTER)?2?$")
MAX_LENGTH = 1_000_000


@dataclass(frozen=True)
class Type:
    """A declared type. `scale`: digits behind the point where they are stated."""

    kind: Kind
    declared: str = ""
    choices: tuple[str, ...] | None = None
    is_set: bool = False  # a value is any number of the choices, joined by commas
    length: int | None = None
    scale: int | None = None
    unsigned: bool = False
    serial: bool = False
    known: bool = True


def read_type(tokens: list[Token], declared: str, dialect: str, own: Mapping[str, Type]) -> Type:
    """The type that `tokens` name; `own` are the types that the DDL defines itself, by lower-case name."""
    if not tokens:
        return Type("text")
    while len(tokens) > 2 and tokens[1].text == ".":
        tokens = tokens[2:]  # the schema that a type belongs to
    if len(tokens) == 1 and tokens[0].text.lower() in own:
        return own[tokens[0].text.lower()]
    words = [token.text.upper() for token in tokens if token.kind in ("word", "name", "string")]
    first = words[0] if words else ""
    numbers = [int(token.text) for token in tokens if token.kind == "number" and token.text.isdecimal()]
    if any(token.text == "[" for token in tokens) or "ARRAY" in words[1:]:
        return Type("text", declared)
    if first in ("ENUM", "SET"):
        members = tuple(token.text for token in tokens if token.kind in ("string", "name"))
        return Type("text", declared, choices=members or None, is_set=first == "SET")
    kind = _KINDS.get(first)
    length = numbers[0] if kind == "text" and numbers and numbers[0] <= MAX_LENGTH else None
    if first in _FIXED_POINT:
        scale = numbers[1] if len(numbers) > 1 else (0 if numbers else None)
        # NUMERIC(6) of PostgreSQL holds whole numbers, but divides like a fraction.
        whole = scale == 0 and dialect != "postgres"
        kind = "integer" if whole else "real"
        return Type(kind, declared, scale=scale, unsigned="UNSIGNED" in words)
    if first == "BIT":
        kind = "boolean" if numbers in ([], [1]) else "integer"
    return Type(
        kind or _by_affinity(declared),
        declared,
        length=length if _WITH_LENGTH.match(first) or "VARYING" in words else None,
        unsigned="UNSIGNED" in words,
        serial=_SERIAL.match(first) is not None,
        known=kind is not None,
    )


def _by_affinity(declared: str) -> Kind:
    """The kind of a type with a name that no dialect has, as SQLite would guess it."""
    kinds: dict[str, Kind] = {"INTEGER": "integer", "TEXT": "text", "REAL": "real", "": "blob"}
    return kinds.get(affinity(declared), "text")
