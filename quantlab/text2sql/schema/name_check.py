"""Whether the names in a query exist: every table and column against the DDL, the way SQLite resolves them.

The DDL is a `KnownNames`; the query's syntax tree (sqlglot) is walked with one scope for each SELECT. Names
compare without case. Covered: aliases, common table expressions (recursive ones too), subqueries and correlation,
`*` and `t.*`, USING and NATURAL, set operations, aliases of results in WHERE, GROUP BY, HAVING and ORDER BY
(SQLite allows all four), rowid, ambiguous columns, double-quoted strings.

sqlglot's own `qualify` answers the same question for stricter dialects: it refuses what SQLite runs (an alias in
WHERE, a double-quoted string), says less about what is wrong, and takes several times as long.

Where something has no known columns (a view, a table function), any column of it is accepted. Functions and types
are not looked at; executing does that.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sqlglot import exp

from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.schema.schema import SchemaError

Columns = dict[str, str] | None  # lower case → as written; None: not known


@dataclass(frozen=True)
class KnownNames:
    """What names some DDL defines, tables with their columns, views by name only: lower-case name → (name as written,
    its columns)."""

    tables: dict[str, tuple[str, Columns]]


@functools.lru_cache(maxsize=4096)
def known_names(ddl: str) -> KnownNames | None:
    """The tables of `ddl`, or None where no dialect reads it or it defines no table."""
    try:
        found = read_schema(ddl)
    except SchemaError:
        return None
    tables: dict[str, tuple[str, Columns]] = {name.lower(): (name, None) for name in found.views}
    for key, table in found.tables.items():
        tables[key] = table.name, {column.name.lower(): column.name for column in table.columns}
    return KnownNames(tables)


ROWID = frozenset({"rowid", "oid", "_rowid_"})
# Units stand bare in other dialects' date functions and are no columns: TIMESTAMPDIFF(DAY, a, b).
UNITS = frozenset({"year", "quarter", "month", "week", "day", "hour", "minute", "second"})


class UnknownName(ValueError):
    """A name that does not exist or is ambiguous; the text says which, and the nearest."""


def unknown_name(tree: exp.Expression, schema: KnownNames) -> str | None:
    """What is wrong with the names of the query `tree`, in words; None where all of them exist."""
    try:
        _query(tree, _Scope(schema, {}))
    except UnknownName as error:
        return str(error)
    except RecursionError:
        return "the query is nested too deeply"
    return None


def nearest_name(name: str, names: Sequence[str]) -> str:
    """`; did you mean x?`, or nothing."""
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


@dataclass
class _Source:
    """Something that FROM reads. `real`: a table of the DDL, which has a rowid."""

    name: str
    columns: Columns
    real: bool = False
    complete: bool = True  # False: it has further columns, whose names are expressions


@dataclass
class _Scope:
    """What a name can mean inside one SELECT. `ctes` holds what WITH defined, here or further out."""

    schema: KnownNames
    ctes: dict[str, _Source]
    parent: _Scope | None = None
    sources: dict[str, _Source] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)  # columns that USING or NATURAL made one
    aliases: dict[str, str] = field(default_factory=dict)  # of results, lower case → as written

    def chain(self) -> Iterator[_Scope]:
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


def _query(tree: exp.Expression, outer: _Scope) -> _Source:
    """Check a query; returns its result columns as a source without a name."""
    scope = _Scope(outer.schema, dict(outer.ctes), outer)
    _with(tree, scope)
    if isinstance(tree, exp.Select):
        return _select(tree, scope)
    if isinstance(tree, exp.SetOperation):
        left, right = _query(tree.this, scope), _query(tree.expression, scope)
        _sort_of_compound(tree, left, right, scope)
        return left
    if isinstance(tree, exp.Subquery | exp.Paren):
        inner = _query(tree.this, scope)
        _sort_of_compound(tree, inner, inner, scope)
        return inner
    if isinstance(tree, exp.Values):
        _expressions(tree.expressions, scope)
        width = len(tree.expressions[0].expressions) if tree.expressions else 0
        return _Source("", {f"column{n}": f"column{n}" for n in range(1, width + 1)})
    if isinstance(tree, exp.Table):  # parenthesised table or join
        _add_source(tree, scope)
        for join in tree.args.get("joins") or []:
            _join(join, scope)
        return _star(scope)
    raise UnknownName(f"not a query: {tree.sql(dialect='sqlite')[:60]}")


def _with(tree: exp.Expression, scope: _Scope) -> None:
    ctes = tree.args.get("with_").expressions if tree.args.get("with_") else []
    for cte in ctes:  # all names first: SQLite lets one refer to a later one
        scope.ctes[cte.alias.lower()] = _Source(cte.alias, _alias_columns(cte))
    for cte in ctes:
        result = _query(cte.this, scope)
        columns = _alias_columns(cte) or result.columns
        scope.ctes[cte.alias.lower()] = _Source(cte.alias, columns, complete=result.complete)


def _select(tree: exp.Select, scope: _Scope) -> _Source:
    start = tree.args.get("from_")
    if start is not None:
        _add_source(start.this, scope)
    for lateral in tree.args.get("laterals") or []:
        _add_source(lateral, scope)
    for join in tree.args.get("joins") or []:
        _join(join, scope)
    for part in tree.expressions:
        if isinstance(part, exp.Alias):
            scope.aliases[part.alias.lower()] = part.alias
    for join in tree.args.get("joins") or []:
        if join.args.get("on") is not None:
            _expression(join.args["on"], scope)
    _expressions(tree.expressions, scope)
    for key in ("where", "group", "having", "qualify", "order", "limit", "offset", "distinct"):
        if isinstance(tree.args.get(key), exp.Expression):
            _expression(tree.args[key], scope)
    _expressions(tree.args.get("windows") or [], scope)
    return _results(tree, scope)


def _add_source(node: exp.Expression, scope: _Scope) -> None:
    """Take a FROM or JOIN item into the scope; what is inside it sees the outer queries, not its neighbours."""
    if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
        source = _table(node, scope)
        for join in node.args.get("joins") or []:
            scope.sources[(node.alias or node.name).lower()] = source
            _join(join, scope)
    elif isinstance(node, exp.Subquery) and isinstance(node.this, exp.Table) and not node.alias:
        _add_source(node.this, scope)  # (a JOIN b): its tables stay visible
        return
    elif isinstance(node, exp.Subquery | exp.Values):
        hidden = _Scope(scope.schema, scope.ctes, scope.parent)
        source = _query(node, hidden)
    else:  # a table function: its columns are not known, its arguments see the tables before it
        if isinstance(node, exp.Table | exp.Lateral):
            _expressions([node.this] if isinstance(node.this, exp.Expression) else [], scope)
        source = _Source(node.alias or node.name, None)
    columns = _alias_columns(node)
    if columns is not None:
        source = _Source(source.name, columns)
    name = node.alias or (node.name if isinstance(node, exp.Table) else "")
    key = name.lower() or f" {len(scope.sources)}"  # an unnamed subquery: reached by bare columns only
    if key in scope.sources and scope.sources[key] is not source:
        key = (
            f" {key} {len(scope.sources)}"  # the same name twice: SQLite complains only of ambiguous columns
        )
    scope.sources[key] = source


def _table(node: exp.Table, scope: _Scope) -> _Source:
    key = node.name.lower()
    if key in scope.ctes and not node.db:
        return replace(scope.ctes[key])
    if key in scope.schema.tables:
        name, columns = scope.schema.tables[key]
        return _Source(name, columns, real=True)
    if key in ("sqlite_master", "sqlite_schema"):
        return _Source(node.name, None)
    known = [name for name, _ in scope.schema.tables.values()] + [cte.name for cte in scope.ctes.values()]
    raise UnknownName(f"no table {node.name}{nearest_name(node.name, known) or _there_are(known)}")


def _there_are(names: Sequence[str]) -> str:
    more = ", …" if len(names) > 8 else ""
    return f"; there are {', '.join(names[:8])}{more}" if names else ""


def _join(join: exp.Join, scope: _Scope) -> None:
    before = list(scope.sources.values())
    _add_source(join.this, scope)
    added = [source for source in scope.sources.values() if all(source is not old for old in before)]
    for using in join.args.get("using") or []:
        for side in (before, added):
            if not any(_has(source, using.name) for source in side):
                known = [name for source in side for name in (source.columns or {}).values()]
                tables = " and ".join(source.name or "a subquery" for source in side)
                raise UnknownName(f"no column {using.name} in {tables}{nearest_name(using.name, known)}")
        scope.shared.add(using.name.lower())
    if join.args.get("method") == "NATURAL":
        for source in before:
            for other in added:
                scope.shared |= (source.columns or {}).keys() & (other.columns or {}).keys()


def _has(source: _Source, name: str) -> bool:
    lower = name.lower()
    return source.columns is None or lower in source.columns or (source.real and lower in ROWID)


def _alias_columns(node: exp.Expression) -> Columns:
    """Column names given with an alias, as in `t(a, b)`."""
    alias = node.args.get("alias")
    names = [column.name for column in alias.args.get("columns") or []] if alias is not None else []
    return {name.lower(): name for name in names} or None


def _expressions(nodes: Sequence[exp.Expression], scope: _Scope) -> None:
    for node in nodes:
        _expression(node, scope)


def _expression(node: exp.Expression, scope: _Scope) -> None:
    """Check the columns below `node`; a query below it gets a scope of its own, inside this one."""
    waiting: list[exp.Expression] = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current, exp.Query):
            _query(current, scope)
        elif isinstance(current, exp.Column):
            _column(current, scope)
        elif isinstance(current, exp.Table):
            _table(current, scope)
        else:
            field_ = current.args.get("field") if isinstance(current, exp.In) else None
            if isinstance(field_, exp.Column):  # x IN t: a table
                _table(exp.Table(this=field_.this.copy(), db=field_.args.get("table")), scope)
                waiting.append(current.this)
                continue
            waiting.extend(reversed(list(current.iter_expressions())))


def _column(column: exp.Column, scope: _Scope) -> None:
    if column.table:
        _qualified(column, scope)
    elif not isinstance(column.this, exp.Star):
        _bare(column, scope)


def _qualified(column: exp.Column, scope: _Scope) -> None:
    table, name = column.table, column.name
    for level in scope.chain():
        source = level.sources.get(table.lower())
        if source is None:
            continue
        if isinstance(column.this, exp.Star) or _has(source, name) or not source.complete:
            return
        known = list((source.columns or {}).values())
        label = source.name if source.name.lower() == table.lower() else f"{source.name} AS {table}".strip()
        raise UnknownName(f"no column {name} in {label}{_held_by(name, scope) or nearest_name(name, known)}")
    visible = [key for level in scope.chain() for key in level.sources if not key.startswith(" ")]
    aliased = [
        key
        for level in scope.chain()
        for key, source in level.sources.items()
        if source.name.lower() == table.lower()
    ]
    if aliased:
        raise UnknownName(f"no table {table} here: it is called {aliased[0]}")
    raise UnknownName(f"no table or alias {table} here{nearest_name(table, visible)}")


def _bare(column: exp.Column, scope: _Scope) -> None:
    name = column.name
    lower = name.lower()
    for level in scope.chain():
        known = [s for s in level.sources.values() if s.columns is not None and _has(s, name)]
        if len(known) > 1 and lower not in level.shared and lower not in ROWID:
            if lower in level.aliases and isinstance(column.find_ancestor(exp.Order, exp.Query), exp.Order):
                return  # ORDER BY looks at results first
            tables = " and ".join(source.name or "a subquery" for source in known)
            raise UnknownName(f"column {name} is ambiguous: {tables} have it")
        open_ended = any(s.columns is None or not s.complete for s in level.sources.values())
        if known or lower in level.aliases or open_ended:
            return
    if column.this.args.get("quoted") and _stands_for_text(column):
        return
    if lower in UNITS and isinstance(column.parent, exp.Func):
        return
    names = [n for level in scope.chain() for s in level.sources.values() for n in (s.columns or {}).values()]
    names += [alias for level in scope.chain() for alias in level.aliases.values()]
    raise UnknownName(f"no column {name}{_held_by(name, scope) or nearest_name(name, names)}")


def _stands_for_text(column: exp.Column) -> bool:
    """Whether a quoted name that is no column is meant as a string. SQLite takes any such name in double quotes for
    a string; that is what was meant beside an operator or as an argument, and a misspelt column where a result, a
    group or a sort key is named."""
    parent = column.parent
    while isinstance(parent, exp.Paren):
        parent = parent.parent
    return not isinstance(parent, exp.Select | exp.Alias | exp.Group | exp.Ordered | exp.Distinct)


def _held_by(name: str, scope: _Scope) -> str:
    """`; t has it` where another table has a column of exactly this name."""
    tables = [table for table, columns in scope.schema.tables.values() if name.lower() in (columns or {})]
    return f"; {' and '.join(tables[:3])} {'has' if len(tables) == 1 else 'have'} it" if tables else ""


def _results(tree: exp.Select, scope: _Scope) -> _Source:
    columns: dict[str, str] = {}
    complete = True
    for part in tree.expressions:
        if isinstance(part, exp.Star) or (isinstance(part, exp.Column) and isinstance(part.this, exp.Star)):
            wanted = part.table.lower() if isinstance(part, exp.Column) else None
            found = _star(scope, wanted)
            if found.columns is None:
                return _Source("", None)
            columns |= found.columns
            complete = complete and found.complete
        elif part.alias_or_name and isinstance(part, exp.Alias | exp.Column):
            columns[part.alias_or_name.lower()] = part.alias_or_name
        else:
            complete = False  # named by the text of its expression
    return _Source("", columns, complete=complete)


def _star(scope: _Scope, only: str | None = None) -> _Source:
    columns: dict[str, str] = {}
    complete = True
    for key, source in scope.sources.items():
        if only is not None and key != only:
            continue
        if source.columns is None:
            return _Source("", None)
        columns |= source.columns
        complete = complete and source.complete
    return _Source("", columns, complete=complete)


def _sort_of_compound(tree: exp.Expression, left: _Source, right: _Source, scope: _Scope) -> None:
    """ORDER BY of a set operation names results of either side."""
    order = tree.args.get("order")
    if order is None or left.columns is None or right.columns is None:
        return
    if not (left.complete and right.complete):
        return
    known = left.columns | right.columns
    for term in order.expressions:
        for column in term.find_all(exp.Column):
            if column.name.lower() not in known:
                raise UnknownName(
                    f"no result column {column.name} to sort by"
                    f"{nearest_name(column.name, list(known.values()))}"
                )
