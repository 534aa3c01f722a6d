"""Mutants of a query: small edits that a model gets wrong, each of which should give another result on a good database.

Mutation analysis (DeMillo, Lipton and Sayward 1978; for SQL: Tuya, Suárez-Cabal and de la Riva 2007): a set of
databases is as good as the share of mutants that it tells from the original. `mutants` lists them; the operators are
in `operators.py`, one function each, in one table. A mutant is one edit, never two.

Some mutants mean the same as the original whatever the rows (DISTINCT over a key, LEFT JOIN over a foreign key that is
never NULL). `equivalence.py` recognises the frequent ones from the schema, and they are not made; the rest survive
every database and count against the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from sqlglot.errors import SqlglotError

from quantlab.text2sql.schema.schema import Schema
from quantlab.text2sql.testdata.mutation_target import target_of
from quantlab.text2sql.testdata.operators import OPERATORS

PER_OPERATOR = 10
MAX_MUTANTS = 150


@dataclass(frozen=True)
class Mutant:
    """`operator` is a key of `operators.OPERATORS`."""

    operator: str
    sql: str


def mutants(sql: str, schema: Schema) -> list[Mutant]:
    """The mutants of a query, each text once, in a fixed order; none where the query cannot be read."""
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
