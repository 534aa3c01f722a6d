"""What a query says about the data that it tells apart: constants, conditions, links between columns, sizes of groups.

`gather` reads the gold queries of a question. Every comparison is traced to the base column it is about, through
aliases, functions and derived tables:

    WHERE strftime('%Y', T1.joined_on) = '2023' AND T2.age > 30 GROUP BY T2.city HAVING COUNT(*) >= 3

gives the constants '2023' for joined_on and 30 for age, the two conditions with the column written `c` (so that a
value can be tried in them alone), city as a grouping column, and 3 as a size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sqlglot import exp

from quantlab.text2sql.schema.resolve import Resolver, settle_strings
from quantlab.text2sql.schema.schema import Schema, Table
from quantlab.text2sql.scoring.exact_match import parse

Key = tuple[str, str]  # (table, column), lower case

PLACE = "c"  # stands for the column in a condition
_COMPARISONS = (
    exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Between, exp.In, exp.Like, exp.Glob, exp.Is, exp.NullSafeEQ,
)  # fmt: skip
_NUMERIC = (exp.Sum, exp.Avg, exp.Cast, exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Neg)
_FORMAT = re.compile(r"(?:%[YmdHMSfjJswW][-/: .]?)+")
MAX_SIZE = 60  # a group larger than this is not built


@dataclass
class Clues:
    """Lists are in the order of the query, each entry once. `expressions`: constants that must be computed first."""

    tables: list[Table] = field(default_factory=list)
    constants: dict[Key, list[Any]] = field(default_factory=dict)
    expressions: dict[Key, list[str]] = field(default_factory=dict)
    conditions: dict[Key, list[str]] = field(default_factory=dict)
    links: list[tuple[Key, Key]] = field(default_factory=list)
    grouped: list[Key] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    dated: set[Key] = field(default_factory=set)
    numeric: set[Key] = field(default_factory=set)
    extremes: set[Key] = field(default_factory=set)  # of MIN, MAX and ORDER BY
    averaged: set[Key] = field(default_factory=set)
    # one column minus another, set against it
    distances: list[tuple[Key, Key, int]] = field(default_factory=list)


def gather(golds: Iterable[str], schema: Schema) -> Clues:
    """The clues of all queries together; those that cannot be read say nothing."""
    clues = Clues()
    for sql in golds:
        tree = parse(sql)
        if isinstance(tree, exp.Query):
            settle_strings(tree, schema)
            _Reader(tree, Resolver(tree, schema), clues).read()
    _add_parents(clues, schema)
    return clues


def _add_parents(clues: Clues, schema: Schema) -> None:
    """Tables that the foreign keys of the read ones lead to: their rows must exist too."""
    known = {table.name.lower() for table in clues.tables}
    for table in clues.tables:  # grows while it is walked
        for key in table.foreign_keys:
            parent = schema.table(key.table)
            if parent is not None and parent.name.lower() not in known:
                known.add(parent.name.lower())
                clues.tables.append(parent)


class _Reader:
    def __init__(self, tree: exp.Query, resolver: Resolver, clues: Clues) -> None:
        self.tree, self.resolver, self.clues = tree, resolver, clues

    def read(self) -> None:
        for table in self.resolver.tables(self.tree):
            if table not in self.clues.tables:
                self.clues.tables.append(table)
        for node in self.tree.walk():
            if isinstance(node, _COMPARISONS):
                self._comparison(node)
            elif isinstance(node, exp.Column):
                self._column(node)
            elif isinstance(node, exp.Limit | exp.Offset):
                self._size(node.expression)
            elif isinstance(node, exp.Join):
                self._using(node)

    def _key(self, node: exp.Expression | None) -> Key | None:
        if not isinstance(node, exp.Column) or isinstance(node.this, exp.Star):
            return None
        origin = self.resolver.column(node)
        return origin.key if origin is not None else None

    def _comparison(self, node: exp.Expression) -> None:
        if isinstance(node, exp.In) and node.args.get("query") is not None:
            query = node.args["query"].unnest()
            if isinstance(query, exp.Select) and len(query.selects) == 1:
                self._link(node.this, query.selects[0].unalias())
            return
        sides = [part for part in node.iter_expressions() if part is not node.this]
        if isinstance(node, exp.EQ | exp.GT | exp.GTE | exp.LT | exp.LTE | exp.NEQ) and len(sides) == 1:
            self._link(node.this, sides[0])
            inner = sides[0].unnest() if isinstance(sides[0], exp.Subquery) else None
            if isinstance(inner, exp.Select) and len(inner.selects) == 1:
                self._link(node.this, inner.selects[0].unalias())
        if node.find(exp.Query) is not None:
            return
        aggregate = node.find(exp.AggFunc)
        columns = [column for column in node.find_all(exp.Column) if not isinstance(column.this, exp.Star)]
        keys = list(dict.fromkeys(key for column in columns if (key := self._key(column)) is not None))
        literals = list(node.find_all(exp.Literal))
        if isinstance(aggregate, exp.Count) or (aggregate is None and not keys):
            for literal in literals:  # COUNT(*) >= 3, or an alias of a count
                self._size(literal)
            return
        if len(keys) == 2 and aggregate is None and node.find(exp.Sub) is not None:
            self._distances(keys, literals)
        if len(keys) != 1:
            return
        key = keys[0]
        for literal in literals:
            value = constant(literal)
            if not _is_format(literal):
                _append(self.clues.constants, key, value)
        if aggregate is not None:
            return
        if len({column.table.lower() for column in columns}) == 1:
            self._condition(node, key)
        for side in sides:
            if side.find(exp.Column) is None and not isinstance(side, exp.Literal | exp.Null | exp.Boolean):
                _append(self.clues.expressions, key, side.sql(dialect="sqlite"))

    def _distances(self, keys: list[Key], literals: list[exp.Literal]) -> None:
        numbers = [constant(literal) for literal in literals if not literal.is_string]
        for number in numbers:
            if abs(number) < 10_000:
                self.clues.distances += [(keys[0], keys[1], int(number)), (keys[1], keys[0], -int(number))]

    def _condition(self, node: exp.Expression, key: Key) -> None:
        whole = node.parent if isinstance(node.parent, exp.Not) else node
        copy = whole.copy()
        for column in list(copy.find_all(exp.Column)):
            column.replace(exp.column(PLACE))
        _append(self.clues.conditions, key, copy.sql(dialect="sqlite", comments=False))

    def _column(self, node: exp.Column) -> None:
        key = self._key(node)
        if key is None:
            return
        parent = node.parent
        if isinstance(parent, exp.Where | exp.And | exp.Or):
            _append(self.clues.conditions, key, PLACE)
        elif isinstance(parent, exp.Not):
            _append(self.clues.conditions, key, f"NOT {PLACE}")
        if isinstance(node.find_ancestor(exp.Group, exp.Select), exp.Group) and key not in self.clues.grouped:
            self.clues.grouped.append(key)
        if isinstance(parent, exp.Avg):
            self.clues.averaged.add(key)
        if isinstance(parent, exp.Nullif | exp.Coalesce):
            for literal in parent.find_all(exp.Literal):
                _append(self.clues.constants, key, constant(literal))
        if isinstance(parent, exp.Min | exp.Max | exp.Ordered):
            self.clues.extremes.add(key)
        if isinstance(parent, _NUMERIC):
            self.clues.numeric.add(key)
        if isinstance(parent, exp.Func) and _date_function(parent):
            self.clues.dated.add(key)

    def _link(self, left: exp.Expression, right: exp.Expression) -> None:
        one, other = self._key(left), self._key(right)
        if one is not None and other is not None and one != other:
            pair = (one, other)
            if pair not in self.clues.links:
                self.clues.links.append(pair)

    def _using(self, join: exp.Join) -> None:
        for name in join.args.get("using") or []:
            holders = [t for t in self.clues.tables if t.column(name.name) is not None]
            for left, right in pairwise(holders):
                pair = ((left.name.lower(), name.name.lower()), (right.name.lower(), name.name.lower()))
                if pair not in self.clues.links:
                    self.clues.links.append(pair)

    def _size(self, node: exp.Expression | None) -> None:
        if isinstance(node, exp.Literal) and node.name.isdigit() and int(node.name) <= MAX_SIZE:
            size = int(node.name)
            if size not in self.clues.sizes:
                self.clues.sizes.append(size)


def constant(literal: exp.Literal) -> Any:
    """The value of a literal, its sign included."""
    if literal.is_string:
        return literal.name
    number = float(literal.name) if any(c in literal.name for c in ".eE") else int(literal.name)
    return -number if isinstance(literal.parent, exp.Neg) else number


def _is_format(literal: exp.Literal) -> bool:
    plain = isinstance(literal.parent, exp.Like | exp.Lower | exp.Upper | exp.EQ)
    return literal.is_string and not plain and _FORMAT.fullmatch(literal.name) is not None


def _date_function(node: exp.Expression) -> bool:
    if isinstance(node, exp.TimeToStr | exp.TsOrDsToTimestamp | exp.TsOrDsToDate | exp.Date | exp.Substring):
        return not isinstance(node, exp.Substring)
    name = (node.name if isinstance(node, exp.Anonymous) else node.key).lower()
    return name in ("strftime", "date", "datetime", "time", "julianday", "unixepoch")


def _append(where: dict[Key, list[Any]], key: Key, value: Any) -> None:
    found = where.setdefault(key, [])
    if not any(type(old) is type(value) and old == value for old in found):
        found.append(value)
