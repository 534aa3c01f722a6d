"""Mutants of a query: small edits that a model gets wrong, each of which should give another result on a good database.

Mutation analysis (DeMillo, Lipton and Sayward 1978; for SQL: Tuya, Suárez-Cabal and de la Riva 2007): a set of
databases is as good as the share of mutants that it tells from the original. `mutants` lists them; the operators are
in `mutations.py`, one function each, in one table. A mutant is one edit, never two.

Some mutants mean the same as the original whatever the rows (DISTINCT over a key, LEFT JOIN over a foreign key that is
never NULL). `equivalent.py` recognises the frequent ones from the schema, and they are not made; the rest survive every
database and count against the score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlglot import exp
from sqlglot.errors import SqlglotError

from quantlab.sql.normalize import parse
from quantlab.sql.resolve import Origin, Resolver, settle_strings
from quantlab.sql.schema import Schema

NUMBERS, TIMES = ("integer", "real"), ("date", "datetime", "time")
PER_OPERATOR = 10
MAX_MUTANTS = 150


@dataclass(frozen=True)
class Mutant:
    """`operator` is a key of `mutations.OPERATORS`."""

    operator: str
    sql: str


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


def mutants(sql: str, schema: Schema) -> list[Mutant]:
    """The mutants of a query, each text once, in a fixed order; none where the query cannot be read."""
    from quantlab.sql.mutations import OPERATORS

    target = target_of(sql, schema)
    if target is None:
        return []
    seen = {target.text()}
    found: list[Mutant] = []
    for name, operator in OPERATORS.items():
        try:
            for text in islice(operator(target), PER_OPERATOR):
                if text not in seen:
                    seen.add(text)
                    found.append(Mutant(name, text))
        except (SqlglotError, RecursionError, ValueError):
            continue  # what sqlglot cannot print is no mutant
    return found[:MAX_MUTANTS]


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
