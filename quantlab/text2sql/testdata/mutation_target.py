"""A query under mutation, and what the operators and the rules of equivalence ask of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlglot import exp

from quantlab.text2sql.schema.resolve import Origin, Resolver, settle_strings
from quantlab.text2sql.schema.schema import Schema
from quantlab.text2sql.scoring.exact_match import parse

NUMBERS, TIMES = ("integer", "real"), ("date", "datetime", "time")


@dataclass
class Target:
    """A query under mutation: its tree, and what is known of its columns before anything is edited."""

    tree: exp.Expression
    schema: Schema
    origins: list[tuple[exp.Column, Origin]] = field(default_factory=list)

    def origin(self, node: exp.Expression | None) -> Origin | None:
        """Where a column node of the tree comes from."""
        return next((origin for column, origin in self.origins if column is node), None)

    def text(self) -> str:
        return self.tree.sql(dialect="sqlite", comments=False)

    def with_node(self, node: exp.Expression, other: exp.Expression) -> str:
        """The query's text with `node` replaced; the tree is as before afterwards."""
        if node is self.tree:
            return other.sql(dialect="sqlite", comments=False)
        node.replace(other)
        try:
            return self.text()
        finally:
            other.replace(node)

    def with_arg(self, node: exp.Expression, **changes: object) -> str:
        """The query's text with arguments of `node` set; the tree is as before afterwards."""
        before = {key: node.args.get(key) for key in changes}
        for key, value in changes.items():
            node.set(key, value)
        try:
            return self.text()
        finally:
            for key, value in before.items():
                node.set(key, value)


Operator = Callable[[Target], Iterator[str]]


def target_of(sql: str, schema: Schema) -> Target | None:
    """The query ready for mutation, or None where it is not one query that sqlglot reads."""
    tree = parse(sql)
    if not isinstance(tree, exp.Query):
        return None
    settle_strings(tree, schema)
    resolver = Resolver(tree, schema)
    columns = [node for node in tree.find_all(exp.Column) if not isinstance(node.this, exp.Star)]
    found = [(node, origin) for node in columns if (origin := resolver.column(node)) is not None]
    return Target(tree, schema, found)


def copied(value: Any) -> Any:
    """A copy of an argument of a node."""
    if isinstance(value, exp.Expression):
        return value.copy()
    return [copied(item) for item in value] if isinstance(value, list) else value


def is_join(node: exp.Expression) -> bool:
    """Whether an equality ties two columns together, as a join condition does."""
    return isinstance(node.this, exp.Column) and isinstance(node.args.get("expression"), exp.Column)


def is_join_side(node: exp.Column) -> bool:
    """Whether a column is one side of such an equality."""
    return isinstance(node.parent, exp.EQ) and is_join(node.parent)


def alike(origin: Origin) -> list[str]:
    """The next column of the same kind, going round; for the grouping of kinds numbers are one, times are one."""

    def family(kind: str) -> str:
        return "number" if kind in NUMBERS else "time" if kind in TIMES else kind

    columns = origin.table.columns
    at = next(i for i, c in enumerate(columns) if c.name == origin.column.name)
    rest = [*columns[at + 1 :], *columns[:at]]
    return [c.name for c in rest if family(c.kind) == family(origin.column.kind)][:1]


def named(column: exp.Column, name: str) -> exp.Column:
    """A column beside `column`: the same table, another name."""
    other: exp.Column = column.copy()
    other.set("this", exp.to_identifier(name, quoted=not name.isascii() or not name.isidentifier()))
    return other
