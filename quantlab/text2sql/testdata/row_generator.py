"""Rows for the tables of a question, drawn so that its query selects some of them and just misses others.

`make` fills the tables, parents first, with values from a `Stock`. A row is good (every conditioned column meets all
conditions), near (some do not) or random; a good child prefers a good parent, so that joins of good rows exist. The
columns a query groups by, foreign keys above all, come in runs of given sizes, so that groups exist just above, at and
just below HAVING's number, and one parent at least has no child. A `Profile` says how much of each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.text2sql.schema.schema import Column, ForeignKey, Table
from quantlab.text2sql.testdata.boundary_values import shifted
from quantlab.text2sql.testdata.query_facts import Key
from quantlab.text2sql.testdata.value_pool import Filled, Profile, Stock, TableRows, in_order

MAX_ROWS = 160  # of a table


def make(tables: Sequence[Table], stock: Stock, profile: Profile, rng: random.Random) -> list[TableRows]:
    """Rows of all tables, parents before children, every key unique and every foreign key kept."""
    filled: dict[str, Filled] = {}
    for table in in_order(tables):
        filled[table.name.lower()] = _Filler(table, stock, profile, rng, filled).fill()
    return [(f.table.name, tuple(c.name for c in f.table.columns), f.rows) for f in filled.values()]


class _Filler:
    """Fills one table."""

    def __init__(
        self,
        table: Table,
        stock: Stock,
        profile: Profile,
        rng: random.Random,
        filled: Mapping[str, Filled],
    ) -> None:
        self.table, self.stock, self.profile, self.rng, self.filled = table, stock, profile, rng, filled
        self.name = table.name.lower()
        self.places = {column.name.lower(): at for at, column in enumerate(table.columns)}
        self.foreign = [key for key in table.foreign_keys if key.table.lower() in filled or self._own(key)]
        in_keys = {name.lower() for key in self.foreign for name in key.columns}
        self.free = [column for column in table.columns if column.name.lower() not in in_keys]
        single = [table.primary_key] if table.primary_key else []
        self.uniques = [tuple(name.lower() for name in names) for names in (*single, *table.uniques)]
        self.uniques += [
            (c.name.lower(),) for c in table.columns if c.unique and (c.name.lower(),) not in self.uniques
        ]
        self.seen: dict[tuple[str, ...], set[tuple[Any, ...]]] = {names: set() for names in self.uniques}
        self.next_number: dict[str, int] = {}
        self.plain = {c.name.lower(): self._plain(c) for c in self.free}

    def _own(self, key: ForeignKey) -> bool:
        return key.table.lower() == self.name

    def _plain(self, column: Column) -> list[Any]:
        """The few plain values that this column uses on this database."""
        plain = self.stock.plain[self.name, column.name.lower()]
        count = min(len(plain), max(1, self.profile.plain + self.rng.choice((-1, 0, 0, 1))))
        return self.rng.sample(plain, count)

    def fill(self) -> Filled:
        result = Filled(self.table)
        runs = self._all_runs()
        group_runs = {c.name.lower(): self._value_runs(c) for c in self.free if self._groups(c)}
        wanted = max([self.profile.rows, *map(len, runs.values()), *map(len, group_runs.values())])
        wanted = min(wanted + self.rng.choice((0, 0, 1, 2)), MAX_ROWS)
        lead = self.rng.choice(list(runs)) if runs else None
        for number in range(wanted):
            roll = self.rng.random()
            near = roll < self.profile.good + self.profile.near
            mode = "good" if roll < self.profile.good else "near" if near else ""
            for attempt in range(4):  # a few tries at a row that breaks no key; two runs at once often do
                row: list[Any] = [None] * len(self.table.columns)
                parents: dict[str, tuple[Filled, int]] = {}  # table → the row that this one refers to
                for key in self.foreign:
                    run = runs.get(key) if attempt == 0 or (key is lead and attempt < 3) else None
                    chosen = self._refer(
                        row, key, result, mode, run[number] if run and number < len(run) else None
                    )
                    if chosen is not None:
                        parents[key.table.lower()] = (self.filled.get(key.table.lower(), result), chosen)
                for column in self.free:
                    run_ = group_runs.get(column.name.lower())
                    forced = run_[number] if run_ and number < len(run_) and mode == "good" else None
                    row[self.places[column.name.lower()]] = (
                        forced if forced is not None else self._value(column, mode, number)
                    )
                self._set_apart(row, parents)
                if self._fresh(row):
                    if mode == "good":
                        result.good.append(len(result.rows))
                    result.rows.append(row)
                    break
        return result

    def _groups(self, column: Column) -> bool:
        key = (self.name, column.name.lower())
        return (
            self.profile.runs and not column.unique and (key in self.stock.grouped or bool(self._linked(key)))
        )

    def _sizes(self) -> list[int]:
        """Sizes of groups: around those the query names, one, two, three."""
        sizes = [size for named in self.stock.sizes for size in (named, named + 1, named - 1) if size > 0]
        sizes += [1, 3, 2] if max(sizes, default=0) < 10 else [1, 2]
        sizes = list(dict.fromkeys(sizes))
        self.rng.shuffle(sizes)
        return sizes

    def _all_runs(self) -> dict[ForeignKey, list[int]]:
        if not self.profile.runs:
            return {}
        found = {key: self._runs(key) for key in self.foreign if not self._own(key)}
        return {key: run for key, run in found.items() if run}

    def _runs(self, key: ForeignKey) -> list[int]:
        """Numbers of parent rows for the children, one after another: each parent as often as its size says."""
        parents = len(self.filled[key.table.lower()].rows)
        if parents < 2:
            return []
        order = list(range(parents))
        self.rng.shuffle(order)
        good = set(self.filled[key.table.lower()].good)
        order.sort(key=lambda number: number not in good)  # those that a query selects first
        if len(order) > 2:
            order = order[:-1]  # one parent stays without a child
        run = [parent for parent, size in zip(order, self._sizes(), strict=False) for _ in range(size)]
        return run[:MAX_ROWS]

    def _value_runs(self, column: Column) -> list[Any]:
        key = (self.name, column.name.lower())
        values = [*self._meeting(key), *self.plain[column.name.lower()], *self.stock.near[key]]
        values = self._linked(key, good=True) or values
        values = [v for at, v in enumerate(values) if v not in values[:at]]
        run = [value for value, size in zip(values, self._sizes(), strict=False) for _ in range(size)]
        return run[:MAX_ROWS]

    def _meeting(self, key: Key) -> list[Any]:
        """Values that meet all conditions on the column, else any of them."""
        conditions = self.stock.meets.get(key) or []
        if not conditions:
            return []
        every = [v for v in conditions[0] if all(v in other for other in conditions[1:])]
        return every or [v for condition in conditions for v in condition]

    def _refer(
        self, row: list[Any], key: ForeignKey, result: Filled, mode: str, forced: int | None
    ) -> int | None:
        """Fill in a foreign key; returns the number of the parent's row."""
        own = self._own(key)
        parent = result if own else self.filled[key.table.lower()]
        optional = all(not self.table.columns[self.places[name.lower()]].not_null for name in key.columns)
        if not parent.rows or (
            optional and forced is None and self.rng.random() < max(self.profile.nulls, 0.3 * own)
        ):
            if optional:
                return None
            if not parent.rows:  # the first row of a table that must refer to itself: to itself, then
                number = self._number(self.table.columns[self.places[key.references[0].lower()]])
                row[self.places[key.columns[0].lower()]] = number
                row[self.places[key.references[0].lower()]] = number
                return None
        if forced is not None:
            chosen = forced
        elif mode == "good" and parent.good and self.rng.random() < 0.85:
            chosen = self.rng.choice(parent.good)
        else:
            chosen = self.rng.randrange(max(1, len(parent.rows) - 1))  # the last one stays without a child
        for name, value in zip(key.columns, parent.values(key.references, chosen), strict=True):
            row[self.places[name.lower()]] = value
        return chosen

    def _set_apart(self, row: list[Any], parents: Mapping[str, tuple[Filled, int]]) -> None:
        """Where the query compares the distance of two columns with a number: put them just so far apart."""
        for left, right, distance in self.stock.distances:
            if left[0] != self.name or self.rng.random() < 0.4:
                continue
            if right[0] == self.name:
                other = row[self.places[right[1]]]
            elif right[0] in parents:
                holder, number = parents[right[0]]
                other = holder.values([right[1]], number)[0]
            else:
                continue
            moved = shifted(other, distance + self.rng.choice((-1, 0, 0, 1)))
            if moved is not None:
                row[self.places[left[1]]] = moved

    def _value(self, column: Column, mode: str, number: int) -> Any:
        lower = column.name.lower()
        key = (self.name, lower)
        alone = (lower,) in self.seen
        if alone and self.stock.kinds[key] in ("integer", "real"):
            near = [value for value in self.stock.near[key] if isinstance(value, int | float)]
            return near[number] if number < len(near) else self._number(column)
        wanted = mode == "good" and self._meeting(key)
        if not column.not_null and not alone and not wanted and self.rng.random() < self.profile.nulls:
            return None
        if key in self.stock.extremes and mode != "good" and self.rng.random() < 0.3:
            extreme = self._extreme(key)
            if extreme is not None:
                return extreme
        linked = self._linked(key, good=mode == "good")
        if linked and self.rng.random() < 0.8:
            return self.rng.choice(linked)
        conditions = self.stock.meets.get(key) or []
        if conditions:
            meeting = self._meeting(key)
            if meeting and (mode == "good" or (mode == "near" and self.rng.random() < 0.5)):
                return self.rng.choice(meeting)
            missing = [value for value in self.stock.near[key] if value not in meeting]
        if conditions and mode == "near":
            pool = missing
        else:
            pool = self.stock.near[key] if self.rng.random() < 0.5 else self.plain[lower]
        pool = pool or self.plain[lower] or self.stock.near[key]
        value = self.rng.choice(pool) if pool else self._number(column)
        if alone and isinstance(value, str) and (value,) in self.seen[(lower,)]:
            return f"{value}{number}" if self.stock.kinds[key] == "text" else value
        return value

    def _extreme(self, key: Key) -> Any:
        """A value at one end of all that this column can get: a row that is not meant must not win by accident."""
        values = [*self.stock.near[key], *self.stock.plain[key]]
        if len({type(value) for value in values}) != 1:
            return None
        return self.rng.choice((min(values), max(values)))

    def _linked(self, key: Key, *, good: bool = False) -> list[Any]:
        """Values of a column that a join of the query sets equal to this one, where that table is filled already; those
        of its good rows alone, where there are any and `good` is asked for."""
        found: list[Any] = []
        for table, column in self.stock.linked.get(key, ()):
            if table in self.filled and self.filled[table].table.column(column) is not None:
                found += self.filled[table].column(column, good=good)
        return found

    def _number(self, column: Column) -> int:
        lower = column.name.lower()
        start = column.low if isinstance(column.low, int) else 1
        taken = self.seen.get((lower,), set())
        number = self.next_number.get(lower, start)
        while (number,) in taken:
            number += 1
        self.next_number[lower] = number + 1
        return number

    def _fresh(self, row: list[Any]) -> bool:
        """Whether the row repeats no key; if so, it is remembered."""
        keys = {names: tuple(row[self.places[name]] for name in names) for names in self.uniques}
        for names, values in keys.items():
            if None not in values and values in self.seen[names]:
                return False
        for names, values in keys.items():
            self.seen[names].add(values)
        return True
