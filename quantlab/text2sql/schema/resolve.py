"""Which column of which table a name in a query means.

`Resolver` walks the scopes of a query (its SELECTs, subqueries, common table expressions) and traces a column through
derived tables to the base table it comes from: in `SELECT n FROM (SELECT age AS n FROM members)` the outer `n` is
`members.age`. A name that is computed, ambiguous, or of no known table traces to nothing (None); this is help for
making data and mutants, not a check of the query.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from quantlab.text2sql.schema.schema import Column, Schema, Table


@dataclass(frozen=True)
class Origin:
    """A column of a base table, and the name that the table goes by where the column was named."""

    table: Table
    column: Column
    source: str

    @property
    def key(self) -> tuple[str, str]:
        """(table, column), lower case: the same for every use of the column."""
        return self.table.name.lower(), self.column.name.lower()


class Resolver:
    """Resolves the columns of one query tree; answers are remembered, so the tree must not change in between."""

    def __init__(self, tree: exp.Expression, schema: Schema) -> None:
        self.schema = schema
        self.ctes = {cte.alias.lower(): cte.this for cte in tree.find_all(exp.CTE)}
        self._sources: dict[int, dict[str, Table | exp.Expression]] = {}
        self._known: dict[int, Origin | None] = {}

    def sources(self, select: exp.Select) -> dict[str, Table | exp.Expression]:
        """What FROM and JOIN of one SELECT read: alias or name, lower case → a table, or the query behind it."""
        found = self._sources.get(id(select))
        if found is None:
            found = {}
            start = select.args.get("from_")
            nodes = [start.this] if start is not None else []
            nodes += [join.this for join in select.args.get("joins") or []]
            for node in nodes:
                self._add(node, found)
            self._sources[id(select)] = found
        return found

    def _add(self, node: exp.Expression, found: dict[str, Table | exp.Expression]) -> None:
        if isinstance(node, exp.Table):
            name = node.name.lower()
            table = None if name in self.ctes else self.schema.table(name)
            target: Table | exp.Expression | None = table or self.ctes.get(name)
            if target is not None:
                found[(node.alias or name).lower()] = target
            for join in node.args.get("joins") or []:
                self._add(join.this, found)
        elif isinstance(node, exp.Subquery):
            if isinstance(node.this, exp.Table) and not node.alias:
                self._add(node.this, found)
            else:
                found[(node.alias or f" {len(found)}").lower()] = node.this

    def column(self, node: exp.Column) -> Origin | None:
        """Where a column comes from."""
        if id(node) not in self._known:
            self._known[id(node)] = self._trace(node.table.lower(), node.name.lower(), node, depth=0)
        return self._known[id(node)]

    def _trace(self, qualifier: str, name: str, node: exp.Expression, depth: int) -> Origin | None:
        if depth > 8:
            return None
        select = node.find_ancestor(exp.Select)
        while select is not None:
            for source, target in self.sources(select).items():
                if qualifier and source != qualifier:
                    continue
                found = self._inside(target, name, source, depth)
                if found is not None:
                    return found
                if qualifier:
                    return None
            select = select.find_ancestor(exp.Select)
        return None

    def _inside(self, target: Table | exp.Expression, name: str, source: str, depth: int) -> Origin | None:
        if isinstance(target, Table):
            column = target.column(name)
            return Origin(target, column, source) if column is not None else None
        query = target
        while isinstance(query, exp.SetOperation | exp.Subquery | exp.Paren):
            query = query.this
        if not isinstance(query, exp.Select):
            return None
        for part in query.expressions:
            plain = part.unalias()
            if part.alias_or_name.lower() == name and isinstance(plain, exp.Column):
                return self._trace(plain.table.lower(), plain.name.lower(), plain, depth + 1)
            if part.is_star:
                for inner_source, inner in self.sources(query).items():
                    found = self._inside(inner, name, inner_source, depth + 1)
                    if found is not None:
                        return found
        return None

    def tables(self, tree: exp.Expression) -> list[Table]:
        """The base tables that a query reads, each once, in the order they are named."""
        found: dict[str, Table] = {}
        for node in tree.find_all(exp.Table, bfs=False):
            table = None if node.name.lower() in self.ctes else self.schema.table(node.name)
            if table is not None:
                found.setdefault(table.name.lower(), table)
        return list(found.values())


def settle_strings(tree: exp.Expression, schema: Schema) -> None:
    """Turn names in double quotes that are no column into strings, as SQLite takes them; changes the tree."""
    resolver = Resolver(tree, schema)
    aliases = {node.alias.lower() for node in tree.find_all(exp.Alias)}
    for node in list(tree.find_all(exp.Column)):
        quoted = isinstance(node.this, exp.Identifier) and node.this.args.get("quoted")
        if quoted and not node.table and node.name.lower() not in aliases and resolver.column(node) is None:
            node.replace(exp.Literal.string(node.name))
