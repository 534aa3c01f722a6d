"""Mutation operators on whole clauses: DISTINCT, joins, ORDER BY, LIMIT, set operations, GROUP BY, HAVING.

Every function takes a `Target` and yields the texts of its mutants; the tree is whole again after each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlglot import exp

from quantlab.text2sql.testdata.equivalence import (
    always_matched,
    decided_by,
    is_value,
    made_distinct,
    needed,
    never_repeats,
)
from quantlab.text2sql.testdata.mutation_target import Target, alike, copied, is_join_side, named


def distinct(target: Target) -> Iterator[str]:
    for select in list(target.tree.find_all(exp.Select)):
        if never_repeats(target, select) or is_value(select) or made_distinct(select):
            continue
        if select.args.get("distinct") is not None:
            yield target.with_arg(select, distinct=None)
        elif select.find_ancestor(exp.In, exp.Exists) is None:
            yield target.with_arg(select, distinct=exp.Distinct())


def join_kind(target: Target) -> Iterator[str]:
    for join in list(target.tree.find_all(exp.Join)):
        if join.args.get("on") is None and not join.args.get("using"):
            continue
        if always_matched(target, join) or needed(target, join):
            continue
        if join.side == "LEFT":
            yield target.with_arg(join, side=None, kind=None)
        elif not join.side and join.kind in ("", "INNER"):
            yield target.with_arg(join, side="LEFT", kind=None)


def sort_direction(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(exp.Ordered)):
        yield target.with_arg(node, desc=not node.args.get("desc"), nulls_first=None)


def sort_dropped(target: Target) -> Iterator[str]:
    for order in list(target.tree.find_all(exp.Order)):
        if order.parent is not None and len(order.expressions) == 1:
            yield target.with_arg(order.parent, order=None)
        elif order.parent is not None:
            for number in range(len(order.expressions)):
                kept = [part.copy() for at, part in enumerate(order.expressions) if at != number]
                yield target.with_arg(order, expressions=kept)


def limit(target: Target) -> Iterator[str]:
    """LIMIT n ± 1 or none; OFFSET ± 1 or none."""
    for node in list(target.tree.find_all(exp.Limit, exp.Offset)):
        number, owner = node.expression, node.parent
        if owner is None or not isinstance(number, exp.Literal) or not number.name.isdigit():
            continue
        if is_value(owner) or owner.find_ancestor(exp.Exists) is not None:
            continue
        size = int(number.name)
        for other in (size + 1, size - 1):
            if other >= (1 if isinstance(node, exp.Limit) else 0):
                yield target.with_node(number, exp.Literal.number(other))
        if isinstance(node, exp.Offset):
            yield target.with_arg(owner, offset=None)
        elif owner.args.get("offset") is None:
            yield target.with_arg(owner, limit=None)


def join_column(target: Target) -> Iterator[str]:
    """A join condition on another column of the same kind."""
    for node, origin in target.origins:
        if is_join_side(node):
            for name in alike(origin):
                yield target.with_node(node, named(node, name))


def set_operation(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(exp.SetOperation)):
        parts: dict[str, Any] = {k: copied(v) for k, v in node.args.items()}
        if isinstance(node, exp.Union):
            yield target.with_arg(node, distinct=not node.args.get("distinct"))
            yield target.with_node(node, exp.Intersect(**parts | {"distinct": True}))
        else:
            other = exp.Except if isinstance(node, exp.Intersect) else exp.Intersect
            yield target.with_node(node, other(**parts))
            yield target.with_node(node, exp.Union(**parts | {"distinct": True}))


def grouping(target: Target) -> Iterator[str]:
    """One of several keys of GROUP BY dropped; all of them."""
    for group in list(target.tree.find_all(exp.Group)):
        keys = group.expressions
        for number in range(len(keys) if len(keys) > 1 else 0):
            kept = [key for at, key in enumerate(keys) if at != number]
            if not decided_by(target, keys[number], kept):
                yield target.with_arg(group, expressions=[key.copy() for key in kept])
        if len(keys) == 1 and group.parent is not None and group.parent.args.get("having") is None:
            yield target.with_arg(group.parent, group=None)


def having(target: Target) -> Iterator[str]:
    for select in list(target.tree.find_all(exp.Select)):
        if select.args.get("having") is not None:
            yield target.with_arg(select, having=None)
