"""Which rows of a sorted result may change places: ties under the gold query's outermost ORDER BY, also at
LIMIT.

`SELECT name FROM players ORDER BY score DESC LIMIT 3` leaves open in which order players of equal score
come, and which of them is third. The result alone does not show it, since the score is not in it. So the
gold is run a second time as a probe, without LIMIT and with its sort keys as further columns; rows with
equal keys form a group, and each group says how many of its rows the answer holds:

    [(take 2, 2 candidates), (take 1, 4 candidates)]

Where no probe can be made (ORDER BY of something that is not selected under DISTINCT, a LIMIT that is an
expression, a query sqlglot does not read) the order is taken as it came.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlglot import exp
from sqlglot.errors import SqlglotError

from quantlab.text2sql.scoring.exact_match import parse

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Group:
    """`take` rows of the answer, in any order, are among `rows`."""

    take: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Key:
    """One sort key in the probe's rows: column `index` of the answer, or of the columns added behind it."""

    index: int
    added: bool
    collation: str = ""


@dataclass(frozen=True)
class OrderPlan:
    """`probe` is None where ties cannot be found out; `words` is the ORDER BY for messages."""

    words: str
    probe: str | None = None
    keys: tuple[Key, ...] = ()
    offset: int = 0


def order_plan(sql: str) -> OrderPlan | None:
    """What to run to find the ties of `sql`, or None when its outermost query does not sort."""
    tree = parse(sql)
    if tree is None:
        return OrderPlan("its ORDER BY") if _sorts_textually(sql) else None
    order = tree.args.get("order")
    if not isinstance(tree, exp.Query) or order is None:
        return None
    words = ", ".join(term.sql(dialect="sqlite") for term in order.expressions)
    try:
        return _probe(tree, order, words)
    except (SqlglotError, RecursionError, ValueError, LookupError):
        return OrderPlan(words)


def tie_groups(plan: OrderPlan, answer: Sequence[Row], probed: Sequence[Row] | None) -> list[Group]:
    """The answer as groups of interchangeable rows; one group a row where the probe does not bear the answer out."""
    as_it_came = [Group(1, (row,)) for row in answer]
    if not probed or not answer:
        return as_it_came
    added = sum(key.added for key in plan.keys)
    width = len(probed[0]) - added
    if width != len(answer[0]):
        return as_it_came
    groups: list[Group] = []
    first, last = plan.offset, plan.offset + len(answer)
    start = 0
    for end in range(1, len(probed) + 1):
        if end < len(probed) and _key(plan, probed[end], width) == _key(plan, probed[start], width):
            continue
        take = min(end, last) - max(start, first)
        if take > 0:
            groups.append(Group(take, tuple(row[:width] for row in probed[start:end])))
        start = end
    return groups if _bears_out(groups, answer) else as_it_came


def _bears_out(groups: Sequence[Group], answer: Sequence[Row]) -> bool:
    at = 0
    for group in groups:
        if Counter(answer[at : at + group.take]) - Counter(group.rows):
            return False
        at += group.take
    return at == len(answer)


def _key(plan: OrderPlan, row: Row, width: int) -> Row:
    return tuple(_fold(row[key.index + (width if key.added else 0)], key.collation) for key in plan.keys)


def _fold(value: Any, collation: str) -> Any:
    if not isinstance(value, str):
        return value
    if collation == "NOCASE":  # SQLite folds ASCII letters only
        return "".join(char.lower() if char.isascii() else char for char in value)
    return value.rstrip(" ") if collation == "RTRIM" else value


def _probe(tree: exp.Query, order: exp.Order, words: str) -> OrderPlan:
    offset = _literal(tree.args.get("offset"))
    if offset is None or _literal(tree.args.get("limit")) is None:
        return OrderPlan(words)
    probe = tree.copy()
    probe.set("limit", None)
    probe.set("offset", None)
    keys: list[Key] = []
    added: list[exp.Expression] = []
    for term in order.expressions:
        expression = term.this if isinstance(term, exp.Ordered) else term
        collation = ""
        if isinstance(expression, exp.Collate):
            collation, expression = expression.expression.name.upper(), expression.this
        index = _output_index(tree, expression)
        if index is not None:
            keys.append(Key(index, False, collation))
        elif isinstance(tree, exp.Select) and not tree.args.get("distinct"):
            keys.append(Key(len(added), True, collation))
            added.append(_resolved(tree, expression))
        else:
            return OrderPlan(words)  # a set operation or DISTINCT cannot take a further column
    if isinstance(probe, exp.Select):
        for column in added:
            probe = probe.select(column, append=True, copy=False)
    return OrderPlan(words, probe.sql(dialect="sqlite"), tuple(keys), offset)


def _literal(node: exp.Expression | None) -> int | None:
    """The number of a LIMIT or OFFSET clause, 0 where there is none, None where it is not a plain number."""
    if node is None:
        return 0
    number = node.expression
    return int(number.name) if isinstance(number, exp.Literal) and number.name.isdigit() else None


def _output_index(tree: exp.Query, expression: exp.Expression) -> int | None:
    """Which output column a sort term is, when it is an ordinal, an alias, or the same expression."""
    if isinstance(expression, exp.Literal) and not expression.is_string and expression.name.isdigit():
        return int(expression.name) - 1
    selects = tree.selects
    if any(column.is_star for column in selects):
        return None
    for index, column in enumerate(selects):
        if expression in (column, column.this if isinstance(column, exp.Alias) else None):
            return index
    if not isinstance(expression, exp.Column):
        return None
    named = [i for i, column in enumerate(selects) if column.alias_or_name.lower() == expression.name.lower()]
    if not expression.table:
        return named[0] if named else None
    # `SELECT year … ORDER BY t.year`: the same column, if the one that is selected has no other table.
    plain = [i for i in named if isinstance(selects[i], exp.Column) and not selects[i].table]
    return plain[0] if len(named) == 1 and plain else None


def _resolved(tree: exp.Select, expression: exp.Expression) -> exp.Expression:
    """A copy of a sort term with the select list's aliases, which no select column may use, written out."""
    aliases = {column.alias.lower(): column.this for column in tree.selects if isinstance(column, exp.Alias)}

    def write_out(node: exp.Expression) -> exp.Expression:
        if isinstance(node, exp.Column) and not node.table and node.name.lower() in aliases:
            return exp.paren(aliases[node.name.lower()].copy())
        return node

    return expression.copy().transform(write_out)


def _sorts_textually(sql: str) -> bool:
    """Whether ORDER BY stands outside every parenthesis and quote."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", " ", sql, flags=re.DOTALL)
    depth = 0
    for match in re.finditer(r"\(|\)|\bORDER\s+BY\b", bare, re.IGNORECASE):
        if match.group() in "()":
            depth += 1 if match.group() == "(" else -1
        elif depth == 0:
            return True
    return False
