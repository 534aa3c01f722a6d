"""When a mutant means the same as the original whatever the rows are: the frequent cases, proven from the schema.

Each function answers for one kind of edit; where it says yes, the mutant is not made. What they miss is made, survives
every database, and counts against the score.
"""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.testdata.mutation_target import Target

REJECTS_NULL = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Like, exp.Between, exp.In)


def never_twice(target: Target, column: exp.Column) -> bool:
    """Whether a column is a key of the only table that its SELECT reads."""
    origin, select = target.origin(column), column.find_ancestor(exp.Select)
    return origin is not None and origin.column.unique and select is not None and not select.args.get("joins")


def never_repeats(target: Target, select: exp.Select) -> bool:
    """Whether no two rows of the result can be the same: one row only, every grouping key selected, or a key of the one
    table."""
    group = select.args.get("group")
    if group is None and all(part.find(exp.AggFunc) for part in select.expressions):
        return True
    selected = {part.unalias().sql(dialect="sqlite") for part in select.expressions}
    selected |= {part.alias for part in select.expressions if part.alias}
    if group is not None:
        return all(key.sql(dialect="sqlite") in selected or key.name.isdigit() for key in group.expressions)
    if select.args.get("joins") or select.args.get("from_") is None:
        return False
    return any(
        origin.column.unique and column.parent in (select, *select.expressions)
        for column, origin in target.origins
        if column.find_ancestor(exp.Select) is select
    )


def made_distinct(select: exp.Select) -> bool:
    """Whether a set operation around it takes repetitions out anyway."""
    around = select.parent
    return isinstance(around, exp.SetOperation) and bool(around.args.get("distinct", True))


def is_value(query: exp.Expression) -> bool:
    """Whether a query stands for one value, of which SQLite takes the first row."""
    holder = query.parent
    return isinstance(holder, exp.Subquery) and not isinstance(
        holder.parent, exp.From | exp.Join | exp.In | exp.Exists | exp.SetOperation | exp.CTE
    )


def always_matched(target: Target, join: exp.Join) -> bool:
    """Whether a foreign key that is never NULL sees to it that every row finds its partner: INNER and LEFT are one."""
    on = join.args.get("on")
    if not isinstance(on, exp.EQ):
        return False
    sides = [target.origin(side) for side in (on.this, on.expression)]
    select = join.find_ancestor(exp.Select)
    outer = any(other.side for other in (select.args.get("joins") or [])) if select is not None else True
    joined = join.this.alias_or_name.lower()
    for child, parent in (sides, reversed(sides)):
        if child is None or parent is None or parent.source != joined or (outer and not join.side):
            continue
        for key in child.table.foreign_keys:
            if (
                [name.lower() for name in key.columns] == [child.column.name.lower()]
                and key.table.lower() == parent.table.name.lower()
                and [name.lower() for name in key.references] == [parent.column.name.lower()]
            ):
                return child.column.not_null
    return False


def needed(target: Target, join: exp.Join) -> bool:
    """Whether WHERE or a later inner join throws away the rows that an outer join would add."""
    select = join.find_ancestor(exp.Select)
    if select is None:
        return False
    joined = join.this.alias_or_name.lower()
    demands: list[exp.Expression] = []
    where = select.args.get("where")
    if where is not None:
        demands += where.this.flatten() if isinstance(where.this, exp.And) else [where.this]
    later = False
    for other in select.args.get("joins") or []:
        if later and not other.side and other.args.get("on") is not None:
            on = other.args["on"]
            demands += on.flatten() if isinstance(on, exp.And) else [on]
        later = later or other is join
    return any(
        isinstance(demand.unnest(), REJECTS_NULL)
        and demand.find(exp.Coalesce, exp.Case, exp.Or) is None
        and any(
            origin.source == joined and column.find_ancestor(exp.Select) is select
            for column, origin in target.origins
            if any(column is inner for inner in demand.find_all(exp.Column))
        )
        for demand in demands
    )


def decided_by(target: Target, key: exp.Expression, others: list[exp.Expression]) -> bool:
    """Whether a grouping key says nothing new: a key of the same row is among the others."""
    origin = target.origin(key)
    found = [target.origin(other) for other in others]
    return origin is not None and any(
        o is not None and o.source == origin.source and o.column.unique for o in found
    )
