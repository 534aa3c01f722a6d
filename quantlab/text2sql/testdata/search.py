"""The search for witness databases of one question: candidates are drawn, tried against the mutants, kept or dropped.

A candidate is kept when some living mutant gives another result on it than the gold does, or when it is the first on
which the gold returns anything. The search ends when every mutant is dead, when nothing has died for a while, or when
enough are kept. What runs, runs in the sandbox, all queries of a candidate in one round trip.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from quantlab.text2sql.sandbox.pool import Execution, Sandbox
from quantlab.text2sql.schema.schema import Column, Schema
from quantlab.text2sql.scoring.execution import compared, gold_of
from quantlab.text2sql.scoring.order_by import OrderPlan, order_plan
from quantlab.text2sql.testdata.boundary_values import kind_of, pool
from quantlab.text2sql.testdata.mutants import Mutant, mutants
from quantlab.text2sql.testdata.query_facts import MAX_SIZE, PLACE, Clues, Key, gather
from quantlab.text2sql.testdata.row_generator import make
from quantlab.text2sql.testdata.value_pool import Profile, Stock, TableRows

CANDIDATES = 60  # databases tried
PATIENCE = 20  # tried in a row without a kill until the rest is given up
KEPT = 8
WORK = 300_000_000  # SQLite steps of all queries together until the search is given up; steps, so that it is repeatable

PROFILES = (
    Profile(rows=8, good=0.6, near=0.3, plain=4, nulls=0.15),
    Profile(rows=12, good=0.7, near=0.2, plain=9, nulls=0.0),
    Profile(rows=6, good=1.0, near=0.0, plain=3, nulls=0.1),
    Profile(rows=18, good=0.4, near=0.5, plain=3, nulls=0.25),
    Profile(rows=4, good=0.9, near=0.1, plain=8, nulls=0.0, runs=False),
    Profile(rows=24, good=0.75, near=0.2, plain=9, nulls=0.1),
    Profile(rows=10, good=0.5, near=0.3, plain=2, nulls=0.4, runs=False),
    Profile(rows=3, good=1.0, near=0.0, plain=6, nulls=0.0, runs=False),
    Profile(rows=14, good=0.15, near=0.75, plain=9, nulls=0.0, runs=False),
    Profile(rows=6, good=0.25, near=0.75, plain=8, nulls=0.0, runs=False),
)
AFFINITY = {"integer": "INTEGER", "boolean": "INTEGER", "real": "REAL", "blob": "BLOB"}


class Search:
    """The search for one question. `alive` are the mutants that no kept database tells from the gold."""

    def __init__(self, schema: Schema, golds: Sequence[str], sandbox: Sandbox, seed: str) -> None:
        self.schema, self.gold, self.sandbox = schema, golds[0], sandbox
        self.seed = seed
        self.clues: Clues = gather(golds, schema)
        self.plan: OrderPlan | None = order_plan(self.gold)
        self.alive: list[Mutant] = mutants(self.gold, schema)
        self.total = len(self.alive)
        self.reason = ""

    def run(self) -> list[list[TableRows]]:
        """The rows of the databases to keep, at least one on which the gold returns something; else none."""
        if not self.clues.tables:
            self.reason = "the gold query cannot be read, or reads no table of the DDL"
            return []
        stock = self._stock()
        kept: list[list[TableRows]] = []
        results: set[object] = set()  # what the gold returned on those kept, where it returned anything
        idle = work = 0
        for number in range(CANDIDATES):
            rows, answers = self._candidate(number, stock)
            if answers[0].kind == "database" and "CHECK" in answers[0].reason:
                self.schema = without_checks(self.schema)  # no row met them: better without than not at all
                rows, answers = self._candidate(number, stock)
            gold = answers[0]
            work += sum(answer.steps for answer in answers)
            if gold.status != "rows":
                self.reason = self.reason or gold.reason
                if number >= 3 and not kept:
                    break  # it is not the rows
                continue
            killed = self._killed(answers)
            speaks = bool(gold.rows) and gold.rows not in results and len(results) < _wanted(gold)
            idle = 0 if killed or speaks else idle + 1
            if killed or speaks:
                kept.append(rows)
                self.alive = [mutant for mutant in self.alive if mutant not in killed]
                if gold.rows:
                    results.add(gold.rows)
            if (
                work > WORK
                or idle >= PATIENCE
                or len(kept) >= KEPT
                or (not self.alive and len(results) >= _wanted(gold))
            ):
                break
        if not results:
            self.reason = self.reason or "no rows were found for which the gold query returns any"
            return []
        return kept

    def _candidate(self, number: int, stock: Stock) -> tuple[list[TableRows], list[Execution]]:
        profile = PROFILES[number % len(PROFILES)]
        largest = max(self.clues.sizes, default=0)
        if number % 2 == 0 and largest:
            profile = replace(profile, rows=max(profile.rows, min(largest + 3, MAX_SIZE)))
        rng = random.Random(f"{self.seed} {number}")
        rows = make(self.clues.tables, stock, profile, rng)
        queries = [self.gold, (self.plan.probe or self.gold) if self.plan else self.gold]
        queries += [mutant.sql for mutant in self.alive]
        return rows, self.sandbox.trial(self.schema.create_sql(), rows, queries)

    def _killed(self, answers: Sequence[Execution]) -> set[Mutant]:
        """Which living mutants this database tells from the gold; those that do not run are taken off the list."""
        probed = answers[1] if self.plan is not None and self.plan.probe else None
        gold = gold_of(answers[0], self.plan, probed)
        killed, invalid = set(), set()
        for mutant, answer in zip(self.alive, answers[2:], strict=True):
            if answer.same:
                continue
            if answer.status == "error" and answer.kind == "sql":
                invalid.add(mutant)
            elif answer.status != "rows" or not compared(gold, answer).equal:
                killed.add(mutant)
        if invalid:
            self.alive = [mutant for mutant in self.alive if mutant not in invalid]
            self.total -= len(invalid)
        return killed

    def _stock(self) -> Stock:
        """Values for every column of the tables, and which of them meet which condition."""
        clues = self.clues
        constants = self._constants()
        linked: dict[Key, list[Key]] = {}
        for left, right in clues.links:
            linked.setdefault(left, []).append(right)
            linked.setdefault(right, []).append(left)
            shared = [*constants.get(left, ()), *constants.get(right, ())]
            if shared:
                constants[left] = constants[right] = list(dict.fromkeys(shared))
        # What a query says of a foreign key holds for the key it names.
        for child, parent in self._references():
            if child in constants:
                constants[parent] = list(dict.fromkeys([*constants.get(parent, ()), *constants[child]]))
            for condition in clues.conditions.get(child, ()):
                if condition not in clues.conditions.setdefault(parent, []):
                    clues.conditions[parent].append(condition)
        kinds: dict[Key, str] = {}
        near: dict[Key, list[Any]] = {}
        plain: dict[Key, list[Any]] = {}
        for key, column in self._columns():
            named = constants.get(key, [])
            kinds[key] = kind_of(column, named, key in clues.dated, key in clues.numeric)
            near[key], plain[key] = pool(column, kinds[key], named, averaged=key in clues.averaged)
        return Stock(
            kinds,
            near,
            plain,
            self._meets(kinds, near, plain),
            linked,
            frozenset(clues.grouped),
            tuple(size for size in clues.sizes if size),
            frozenset(clues.extremes),
            tuple(clues.distances),
        )

    def _columns(self) -> Iterator[tuple[Key, Column]]:
        for table in self.clues.tables:
            for column in table.columns:
                yield (table.name.lower(), column.name.lower()), column

    def _references(self) -> Iterator[tuple[Key, Key]]:
        """Columns of foreign keys, and the columns that they refer to."""
        for table in self.clues.tables:
            for key in table.foreign_keys:
                for name, other in zip(key.columns, key.references, strict=False):
                    yield (table.name.lower(), name.lower()), (key.table.lower(), other.lower())

    def _constants(self) -> dict[Key, list[Any]]:
        """The named constants, and the values of those that are expressions."""
        constants = {key: list(values) for key, values in self.clues.constants.items()}
        wanted = [(key, text) for key, texts in self.clues.expressions.items() for text in texts]
        if wanted:
            answers = self.sandbox.trial(
                "CREATE TABLE nothing (x)", [], [f"SELECT {text}" for _, text in wanted]
            )
            for (key, _), answer in zip(wanted, answers, strict=True):
                if answer.status == "rows" and answer.rows and answer.rows[0][0] is not None:
                    constants.setdefault(key, []).insert(0, answer.rows[0][0])
        return constants

    def _meets(
        self, kinds: dict[Key, str], near: dict[Key, list[Any]], plain: dict[Key, list[Any]]
    ) -> dict[Key, list[list[Any]]]:
        """Condition by condition, the values of its column that meet it; SQLite says so."""
        create, rows, queries, asked = [], [], [], []
        for number, (key, conditions) in enumerate(self.clues.conditions.items()):
            if key not in kinds:
                continue
            name = f"values{number}"
            create.append(f"CREATE TABLE {name} ({PLACE} {AFFINITY.get(kinds[key], 'TEXT')});")
            values = list(dict.fromkeys([*near[key], *plain[key]]))
            rows.append((name, (PLACE,), [[value] for value in values]))
            for condition in conditions:
                queries.append(f"SELECT {PLACE} FROM {name} WHERE {condition}")
                asked.append(key)
        meets: dict[Key, list[list[Any]]] = {}
        if queries:
            for key, answer in zip(asked, self.sandbox.trial("\n".join(create), rows, queries), strict=True):
                if answer.status == "rows" and answer.rows:
                    meets.setdefault(key, []).append([row[0] for row in answer.rows])
        return meets


def _wanted(gold: Execution) -> int:
    """On how many databases the gold should return something different each: a lone number is met by accident."""
    return 3 if len(gold.rows) == 1 and len(gold.columns) == 1 else 2


def without_checks(schema: Schema) -> Schema:
    """The same tables without CHECKs between columns or on expressions; bounds and choices of columns stay."""
    return replace(schema, tables={name: replace(table, checks=()) for name, table in schema.tables.items()})
