"""What handlers of functions are, and makers of those that many functions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sqlglot import exp

from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    TEMPORAL,
    Context,
    Untranslatable,
    call,
    kind_of,
    mark,
    moment_of,
    string_of,
)

Handler: TypeAlias = Callable[[list[exp.Expression], Context], exp.Expression]
# name → (numbers of arguments it takes, what makes the SQLite call)
Table: TypeAlias = dict[str, tuple[range, Handler]]
SEVERAL = range(1, 100)


def same(name: str, kind: str = "") -> Handler:
    """A function of this name, and of this kind, in SQLite."""

    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        found = exp.Anonymous(this=name, expressions=arguments)
        return mark(found, kind) if kind else found

    return handler


def like_its_arguments(name: str) -> Handler:
    """A function whose value is one of its arguments, so of their kind: COALESCE, MAX, …"""

    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        return common_kind(exp.Anonymous(this=name, expressions=arguments), arguments, context)

    return handler


def common_kind(node: exp.Expression, values: list[exp.Expression], context: Context) -> exp.Expression:
    """`node`, whose value is one of `values`, with the kind that they share. A date beside datetimes is one of them."""
    kinds = {kind_of(value, context) for value in values if not isinstance(value, exp.Null)}
    if kinds & TEMPORAL:  # text beside a moment is one
        written = [found[1] for value in values if (found := moment_of(value)) is not None]
        kinds = {
            kind_of(value, context) for value in values if string_of(value) is None or kind_of(value, context)
        }
        if "datetime" in kinds and "date" in written:
            kinds.add("date")
    if len(kinds) == 1 and None not in kinds:
        return mark(node, str(kinds.pop()))
    if "datetime" in kinds and len(kinds) > 1 and kinds <= TEMPORAL:
        return mark(call("DATETIME", node), "datetime")
    if kinds & TEMPORAL:
        return mark(node, "moment")
    if kinds & {"numeric", "real", "double"}:
        return mark(node, "double" if "double" in kinds else "numeric")
    return mark(node, "number") if kinds & NUMBERS else node


def refused(why: str) -> Handler:
    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        raise Untranslatable(why)

    return handler
