"""The shape of a query: set operations, FETCH, DISTINCT ON, names for the columns of a derived table.

SQLite takes no parentheses around the sides of UNION, and applies UNION, INTERSECT and EXCEPT from left to right; sides
that are more than a plain SELECT become `SELECT * FROM (…)`.
"""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.dialects.check import given
from quantlab.text2sql.dialects.nodes import Untranslatable, number


def settle_structure(tree: exp.Expression) -> exp.Expression:
    """Set operations, FETCH, DISTINCT ON and joins in SQLite's form; the root may change."""
    for node in reversed(list(tree.walk(bfs=False))):
        if isinstance(node, exp.SetOperation):
            _set_operation(node)
        elif isinstance(node, exp.Fetch):
            _fetch(node)
        elif isinstance(node, exp.Limit) and isinstance(node.expression, exp.Var):
            node.set("expression", number(-1))  # LIMIT ALL
        elif isinstance(node, exp.Join) and node.args.get("kind") == "STRAIGHT_JOIN":
            node.set("kind", None)
        elif isinstance(node, exp.Subquery | exp.Values) and _column_names(node):
            node.replace(_named_columns(node))
        elif isinstance(node, exp.Select) and _distinct_on(node) is not None:
            first = _first_rows(node)
            if node is tree:
                tree = first
            else:
                node.replace(first)
    while isinstance(tree, exp.Subquery) and not tree.alias and set(given(tree)) == {"this"}:
        tree = tree.this
    return tree


def _set_operation(node: exp.SetOperation) -> None:
    if not isinstance(node, exp.Union) and not node.args.get("distinct"):
        raise Untranslatable(f"{type(node).__name__.upper()} ALL has no counterpart in SQLite")
    if node.args.get("by_name") or node.args.get("side"):
        raise Untranslatable("UNION BY NAME has no counterpart in SQLite")
    for side in ("this", "expression"):
        query = node.args[side]
        inner = query.this if isinstance(query, exp.Subquery) and set(given(query)) == {"this"} else query
        chain = side == "this" and isinstance(inner, exp.SetOperation)
        plain = isinstance(inner, exp.Select | exp.Values) or chain
        if plain and not any(inner.args.get(part) for part in ("order", "limit", "offset", "with_")):
            node.set(side, inner)
        else:
            whole = inner if isinstance(inner, exp.Query) and not isinstance(inner, exp.Subquery) else query
            derived = whole if isinstance(whole, exp.Subquery) else exp.Subquery(this=whole.copy())
            node.set(side, exp.select("*").from_(derived, copy=False))


def _column_names(node: exp.Expression) -> list[exp.Expression]:
    alias = node.args.get("alias")
    return alias.args.get("columns") or [] if alias is not None else []


def _named_columns(node: exp.Expression) -> exp.Expression:
    """`(…) AS t(a, b)`: SQLite gives names to the columns of a common table expression only."""
    table, columns = exp.to_identifier("_named"), _column_names(node)
    query = node.this.copy() if isinstance(node, exp.Subquery) else exp.Values(expressions=node.expressions)
    named = exp.CTE(this=query, alias=exp.TableAlias(this=table, columns=[name.copy() for name in columns]))
    outer = exp.select("*").from_(exp.Table(this=table.copy()), copy=False)
    outer.set("with_", exp.With(expressions=[named]))
    return exp.Subquery(this=outer, alias=exp.TableAlias(this=node.args["alias"].this.copy()))


def _fetch(node: exp.Fetch) -> None:
    options = node.args.get("limit_options")
    if options is not None and (options.args.get("with_ties") or options.args.get("percent")):
        raise Untranslatable("FETCH … WITH TIES has no counterpart in SQLite")
    node.replace(exp.Limit(expression=node.args.get("count") or number(1)))


def _distinct_on(select: exp.Select) -> exp.Expression | None:
    distinct = select.args.get("distinct")
    return distinct.args.get("on") if distinct is not None else None


def _first_rows(select: exp.Select) -> exp.Select:
    """DISTINCT ON (keys): the first row of each, in the order of ORDER BY, by ROW_NUMBER."""
    keys = _distinct_on(select)
    assert keys is not None
    if any(select.args.get(part) for part in ("group", "having", "windows")):
        raise Untranslatable("DISTINCT ON together with GROUP BY has no counterpart in SQLite")
    if any(column.is_star for column in select.expressions):
        raise Untranslatable("DISTINCT ON with * has no counterpart in SQLite")
    inner = select.copy()
    outer = exp.Select()
    for part in ("with_", "limit", "offset"):
        if inner.args.get(part):
            outer.set(part, inner.args[part].copy())
            inner.set(part, None)
    order = inner.args.get("order")
    inner.set("order", None)
    inner.set("distinct", None)
    names = [f"_{at}" for at in range(len(inner.expressions))]
    outputs = [column.alias_or_name or f"column{at}" for at, column in enumerate(inner.expressions, start=1)]
    aliases = {
        column.alias.lower(): column.this for column in inner.expressions if isinstance(column, exp.Alias)
    }
    columns = [
        exp.alias_(column.unalias().copy(), name)
        for column, name in zip(inner.expressions, names, strict=True)
    ]
    terms = [
        _resolved(term.copy(), inner, aliases) for term in (order.expressions if order is not None else [])
    ]
    sort_names = [f"_s{at}" for at in range(len(terms))]
    columns += [exp.alias_(term.this.copy(), name) for term, name in zip(terms, sort_names, strict=True)]
    window = exp.Window(
        this=exp.Anonymous(this="ROW_NUMBER", expressions=[]),
        partition_by=[_resolved(key.copy(), inner, aliases) for key in _listed(keys)],
        order=exp.Order(expressions=[term.copy() for term in terms]) if terms else None,
    )
    inner.set("expressions", [*columns, exp.alias_(window, "_row")])
    outer.set(
        "expressions",
        [
            exp.alias_(exp.column(name), output, quoted=True)
            for name, output in zip(names, outputs, strict=True)
        ],
    )
    derived = exp.Subquery(this=inner, alias=exp.TableAlias(this=exp.to_identifier("_first")))
    outer.set("from_", exp.From(this=derived))
    outer.set("where", exp.Where(this=exp.EQ(this=exp.column("_row"), expression=number(1))))
    if terms:
        for term, name in zip(terms, sort_names, strict=True):
            term.set("this", exp.column(name))
        outer.set("order", exp.Order(expressions=terms))
    return outer


def _listed(keys: exp.Expression) -> list[exp.Expression]:
    if isinstance(keys, exp.Tuple):
        return list(keys.expressions)
    return [keys.this if isinstance(keys, exp.Paren) else keys]


def _resolved(term: exp.Expression, select: exp.Select, aliases: dict[str, exp.Expression]) -> exp.Expression:
    """A sort term or key with an ordinal or an alias of the select list written out."""
    value = term.this if isinstance(term, exp.Ordered) else term
    found = None
    if isinstance(value, exp.Literal) and not value.is_string:
        found = select.expressions[int(value.name) - 1].unalias()
    elif isinstance(value, exp.Column) and not value.table:
        found = aliases.get(value.name.lower())
    if found is None:
        return term
    if isinstance(term, exp.Ordered):
        term.set("this", found.copy())
        return term
    return found.copy()
