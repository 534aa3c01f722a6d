"""Exact match after normalising (EM), through sqlglot.

Two queries match exactly when their syntax trees print alike after what says nothing was taken away:
layout, comments, keyword and identifier case, quotes around identifiers, the words AS, INNER, OUTER and
ASC, `<>` against `!=`, and the names of table aliases, which become t1, t2, … in order of appearance; a
qualifier is dropped where only one table is read. Nothing that needs reasoning is done (no reordering of
AND, no join rewriting): a query that is right in another form is EM-wrong, which is what execution accuracy
is for.
"""

from __future__ import annotations

import functools

import sqlglot
from sqlglot import exp

MAX_LENGTH = 20_000  # characters; longer text is not parsed, only folded


@functools.lru_cache(maxsize=4096)
def normalize(sql: str, dialect: str = "sqlite") -> str | None:
    """The normal form, or None where sqlglot does not understand the text as exactly one statement."""
    if len(sql) > MAX_LENGTH:
        return None
    tree = parse(sql, dialect)
    if tree is None:
        return None
    try:
        _fold_names(tree)
        _rename_aliases(tree)
        for join in tree.find_all(exp.Join):
            if join.args.get("kind") in ("INNER", "OUTER"):
                join.set("kind", None)
        for ordered in tree.find_all(exp.Ordered):
            ordered.set("desc", bool(ordered.args.get("desc")))
        return tree.sql(dialect=dialect, comments=False, normalize_functions="upper")
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
        return None


def parse(sql: str, dialect: str = "sqlite") -> exp.Expression | None:
    """The syntax tree of one statement; None for none, for several, for a very long one, and for what sqlglot cannot
    read."""
    if len(sql) > MAX_LENGTH:
        return None
    try:
        trees = [tree for tree in sqlglot.parse(sql, read=dialect) if tree is not None]
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
        return None
    return trees[0] if len(trees) == 1 else None


def exact_match(predicted: str, gold: str, dialect: str = "sqlite") -> bool:
    """EM. Where one of the two has no normal form, blanks, case and the last semicolon are all that is forgiven."""
    left, right = normalize(predicted, dialect), normalize(gold, dialect)
    if left is None or right is None:
        return fold(predicted) == fold(gold)
    return left == right


def fold(sql: str) -> str:
    return " ".join(sql.lower().split()).rstrip("; ")


def _fold_names(tree: exp.Expression) -> None:
    """Identifiers lower case and unquoted: SQLite compares them without case, quoted or not."""
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("this", identifier.name.lower())
        identifier.set("quoted", False)


def _rename_aliases(tree: exp.Expression) -> None:
    """Table aliases become t1, t2, …; without a choice of tables, qualifiers go."""
    tables = list(tree.find_all(exp.Table))
    subqueries = [node for node in tree.find_all(exp.Subquery) if node.alias]
    names: dict[str, str] = {}
    for table in tables:
        alias = table.alias or table.name
        if alias in names:
            return  # the same name in two scopes: leave every name as it is
        names[alias] = f"t{len(names) + 1}"
    single = len(tables) == 1 and not subqueries
    for column in tree.find_all(exp.Column):
        if column.table in names:
            column.set("table", None if single else exp.to_identifier(names[column.table]))
    for table in tables:
        alias = names[table.alias or table.name]
        table.set("alias", None if single else exp.TableAlias(this=exp.to_identifier(alias)))
