"""The mutation operators: what may go wrong in a query, one function each; those on whole clauses stand in
`clause_operators.py`.

Every function takes a `Target` and yields the texts of its mutants; the tree is whole again after each. `OPERATORS` is
the catalogue. Only edits whose result is still a valid query for the same schema are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlglot import exp

from quantlab.text2sql.testdata.clause_operators import (
    distinct,
    grouping,
    having,
    join_column,
    join_kind,
    limit,
    set_operation,
    sort_direction,
    sort_dropped,
)
from quantlab.text2sql.testdata.equivalence import decided_by, never_twice
from quantlab.text2sql.testdata.mutation_target import (
    Operator,
    Target,
    alike,
    copied,
    is_join,
    is_join_side,
    named,
)

BOUNDARY: Mapping[type, type] = {exp.GT: exp.GTE, exp.GTE: exp.GT, exp.LT: exp.LTE, exp.LTE: exp.LT}
DIRECTION: Mapping[type, type] = {
    exp.GT: exp.LT,
    exp.GTE: exp.LTE,
    exp.LT: exp.GT,
    exp.LTE: exp.GTE,
    exp.EQ: exp.NEQ,
    exp.NEQ: exp.EQ,
}
AGGREGATES: Mapping[type, type] = {exp.Sum: exp.Avg, exp.Avg: exp.Sum, exp.Min: exp.Max, exp.Max: exp.Min}
ARITHMETIC: Mapping[type, type] = {exp.Add: exp.Sub, exp.Sub: exp.Add, exp.Mul: exp.Div, exp.Div: exp.Mul}
DATE_FORMATS = {"%Y": "%m", "%m": "%d", "%d": "%m", "%Y-%m": "%Y", "%H": "%M", "%w": "%d"}


def _swapped(target: Target, table: Mapping[type, type]) -> Iterator[str]:
    for node in list(target.tree.find_all(*table)):
        if isinstance(node, exp.EQ | exp.NEQ) and is_join(node):
            continue
        yield target.with_node(node, table[type(node)](**{k: copied(v) for k, v in node.args.items()}))


def boundary(target: Target) -> Iterator[str]:
    yield from _swapped(target, BOUNDARY)


def direction(target: Target) -> Iterator[str]:
    yield from _swapped(target, DIRECTION)


def connective(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(exp.And, exp.Or)):
        if node.find_ancestor(exp.Join) is None:
            other = exp.Or if isinstance(node, exp.And) else exp.And
            yield target.with_node(
                node, exp.paren(other(this=node.this.copy(), expression=node.expression.copy()))
            )


def dropped_predicate(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(exp.And, exp.Or)):
        for kept in (node.this, node.expression):
            yield target.with_node(node, kept.copy())
    for select in list(target.tree.find_all(exp.Select)):
        if select.args.get("where") is not None:
            yield target.with_arg(select, where=None)


def negated_predicate(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(exp.In, exp.Like, exp.Is, exp.Between, exp.Exists)):
        outer = node.parent
        if isinstance(outer, exp.Not):
            yield target.with_node(outer, node.copy())
        elif node.args.get("negate"):
            yield target.with_arg(node, negate=None)
        else:
            yield target.with_node(node, exp.Not(this=node.copy()))
    for column in _flags(target):
        yield target.with_node(column, exp.Not(this=column.copy()))


def _flags(target: Target) -> list[exp.Column]:
    """Columns that stand alone as a condition."""
    return [column for column, _ in target.origins if isinstance(column.parent, exp.Where | exp.And | exp.Or)]


def null_filter(target: Target) -> Iterator[str]:
    """Rows with NULL in a column of the result left out."""
    for node, origin in target.origins:
        select = node.find_ancestor(exp.Select)
        if origin.column.not_null or select is None or node.find_ancestor(exp.AggFunc) is not None:
            continue
        if not any(part.unalias() is node for part in select.expressions):
            continue
        kept = exp.Not(this=exp.Is(this=node.copy(), expression=exp.Null()))
        where = select.args.get("where")
        both = exp.and_(where.this.copy(), kept) if where is not None else kept
        yield target.with_arg(select, where=exp.Where(this=both))


def aggregate(target: Target) -> Iterator[str]:
    yield from _swapped(target, AGGREGATES)


def counted(target: Target) -> Iterator[str]:
    """COUNT(x) ↔ COUNT(DISTINCT x); COUNT(*) → COUNT of a column that may be NULL, or of distinct values."""
    for node in list(target.tree.find_all(exp.Count)):
        inside = node.this
        if isinstance(inside, exp.Distinct):
            if len(inside.expressions) == 1:
                yield target.with_arg(node, this=inside.expressions[0].copy())
        elif isinstance(inside, exp.Star):
            for name in _loose_columns(target, node):
                yield target.with_arg(node, this=name)
        elif isinstance(inside, exp.Column) and not never_twice(target, inside):
            yield target.with_arg(node, this=exp.Distinct(expressions=[inside.copy()]))
    for node in list(target.tree.find_all(exp.Sum, exp.Avg)):
        if isinstance(node.this, exp.Column):
            yield target.with_arg(node, this=exp.Distinct(expressions=[node.this.copy()]))


def _loose_columns(target: Target, node: exp.Expression) -> list[exp.Expression]:
    """What COUNT(*) may be mistaken for: a nullable column, and the distinct values of one used in the query."""
    select = node.find_ancestor(exp.Select)
    found: list[exp.Expression] = []
    for column, origin in target.origins:
        if column.find_ancestor(exp.Select) is select and column.find_ancestor(exp.AggFunc) is None:
            if not never_twice(target, column):
                found.append(exp.Distinct(expressions=[column.copy()]))
            for other in origin.table.columns:
                if not other.not_null and other.name != column.name:
                    found.append(named(column, other.name))
                    break
            break
    return found


def literal(target: Target) -> Iterator[str]:
    """A number one more or less; a text that is another one."""
    for node in list(target.tree.find_all(exp.Literal)):
        if node.find_ancestor(exp.Limit, exp.Offset) is not None or _is_format(node):
            continue
        if isinstance(node.parent, exp.Ordered | exp.Group):
            continue  # the number of a result column
        if isinstance(node.parent, exp.Select) and node.find_ancestor(exp.Exists) is not None:
            continue  # EXISTS looks at no value
        if not node.is_string:
            for other in _neighbours(node.name):
                yield target.with_node(node, exp.Literal.number(other))
        elif not isinstance(node.parent, exp.Like):
            yield target.with_node(node, exp.Literal.string(_other_text(node.name)))


def _is_format(node: exp.Expression) -> bool:
    return isinstance(node.parent, exp.TimeToStr | exp.StrToTime) or (
        isinstance(node.parent, exp.Anonymous) and node.name.startswith("%")
    )


def _neighbours(number: str) -> list[str]:
    try:
        value = float(number)
    except ValueError:
        return []
    if "." in number:
        return [f"{value + 0.5:g}", f"{max(value - 0.5, 0):g}"]
    whole = int(value)
    return [str(whole + 1), *([str(whole - 1)] if whole > 0 else [])]


def _other_text(text: str) -> str:
    """Another text of the same form: the next year of a date, else the text with its last letter gone."""
    if len(text) >= 4 and text[:4].isdigit():
        return f"{int(text[:4]) + 1:04d}{text[4:]}"
    return text[:-1] if len(text) > 1 else text + "x"


def like_pattern(target: Target) -> Iterator[str]:
    """A wildcard at one end taken away or added; a letter less to look for."""
    for node in list(target.tree.find_all(exp.Like)):
        pattern = node.expression
        if not isinstance(pattern, exp.Literal) or not pattern.is_string or not pattern.name.strip("%"):
            continue
        text = pattern.name
        variants = [
            text[1:] if text.startswith("%") else "%" + text,
            text[:-1] if text.endswith("%") else text + "%",
            text.rstrip("%")[:-1] + "%" if text.endswith("%") else text[:-1],
        ]
        for other in variants:
            if other.strip("%"):
                yield target.with_node(pattern, exp.Literal.string(other))


def between_bounds(target: Target) -> Iterator[str]:
    """BETWEEN without one of its ends."""
    for node in list(target.tree.find_all(exp.Between)):
        value, low, high = (node.args[key] for key in ("this", "low", "high"))
        for left, right in ((exp.GT, exp.LTE), (exp.GTE, exp.LT)):
            both = exp.and_(
                left(this=value.copy(), expression=low.copy()),
                right(this=value.copy(), expression=high.copy()),
            )
            yield target.with_node(node, exp.paren(both))


def in_list(target: Target) -> Iterator[str]:
    """IN without one of its values."""
    for node in list(target.tree.find_all(exp.In)):
        values = node.expressions
        for number in range(len(values) if len(values) > 1 else 0):
            yield target.with_arg(node, expressions=[v.copy() for at, v in enumerate(values) if at != number])


def column(target: Target) -> Iterator[str]:
    """A column mistaken for another of the same kind in the same table."""
    for node, origin in target.origins:
        if node.find_ancestor(exp.Join) is None and not is_join_side(node):
            for name in alike(origin):
                other = origin.table.column(name)
                if (
                    isinstance(node.parent, exp.Is | exp.Count)
                    and origin.column.not_null
                    and other
                    and other.not_null
                ):
                    continue  # NULL for the same rows of an outer join
                keys = node.parent.expressions if isinstance(node.parent, exp.Group) else []
                if keys and decided_by(target, node, [key for key in keys if key is not node]):
                    continue
                yield target.with_node(node, named(node, name))


def arithmetic(target: Target) -> Iterator[str]:
    for node in list(target.tree.find_all(*ARITHMETIC)):
        if isinstance(node, exp.Binary):
            yield target.with_node(
                node, ARITHMETIC[type(node)](this=node.this.copy(), expression=node.expression.copy())
            )


def null_default(target: Target) -> Iterator[str]:
    """COALESCE and IFNULL left out."""
    for node in list(target.tree.find_all(exp.Coalesce)):
        yield target.with_node(node, node.this.copy())


def case_branch(target: Target) -> Iterator[str]:
    """The result of one WHEN taken for the ELSE."""
    for node in list(target.tree.find_all(exp.Case)):
        default = node.args.get("default")
        for branch in node.args.get("ifs") or []:
            if default is not None:
                yield target.with_arg(branch, true=default.copy())


def date_part(target: Target) -> Iterator[str]:
    """Another part of a date: the month for the year."""
    for node in list(target.tree.find_all(exp.Literal)):
        if node.is_string and node.name in DATE_FORMATS and node.parent is not None:
            yield target.with_node(node, exp.Literal.string(DATE_FORMATS[node.name]))


def function_dropped(target: Target) -> Iterator[str]:
    """ROUND, LOWER, UPPER, TRIM and ABS left out."""
    for node in list(target.tree.find_all(exp.Round, exp.Lower, exp.Upper, exp.Trim, exp.Abs)):
        within = node.find_ancestor(exp.Like, exp.Select)
        if isinstance(node, exp.Lower | exp.Upper) and isinstance(within, exp.Like):
            continue  # LIKE looks at no case
        yield target.with_node(node, node.this.copy())


OPERATORS: Mapping[str, Operator] = {
    "boundary": boundary,
    "direction": direction,
    "connective": connective,
    "dropped predicate": dropped_predicate,
    "negated predicate": negated_predicate,
    "null filter": null_filter,
    "aggregate": aggregate,
    "count": counted,
    "distinct": distinct,
    "join kind": join_kind,
    "sort direction": sort_direction,
    "sort dropped": sort_dropped,
    "limit": limit,
    "literal": literal,
    "like pattern": like_pattern,
    "between bounds": between_bounds,
    "in list": in_list,
    "column": column,
    "join column": join_column,
    "set operation": set_operation,
    "grouping": grouping,
    "having": having,
    "arithmetic": arithmetic,
    "null default": null_default,
    "case branch": case_branch,
    "date part": date_part,
    "function dropped": function_dropped,
}
