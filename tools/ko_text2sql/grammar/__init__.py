"""Pairs of a Korean question and its SQL, made from any domain by a grammar.

A kind ("top_n", "group_having", ...) is drawn by weight; the kind chooses tables, columns and values that the
domain has, and one of many ways to ask. A pair is a function of the domain and of the generator's state. Kinds that
the domain cannot serve (no dates, no foreign keys) are passed over.

Not covered: calculations between columns, window functions, set operations, more than three tables. Literals are
drawn from what the domain's database holds or may hold; whether a query returns rows is for the caller to check.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from quantlab.data.schema import Domain
from tools.ko_text2sql.grammar import (
    aggregates,
    english,
    grouping,
    joins,
    links,
    nested,
    ordering,
    parents,
    single,
)
from tools.ko_text2sql.grammar.facts import facts_of
from tools.ko_text2sql.grammar.maker import Maker, Question

__all__ = ["KINDS", "Pair", "generate"]


class Pair(NamedTuple):
    """A question, the query that answers it, and the tables that the query reads, in schema order."""

    question: str
    sql: str
    tables: tuple[str, ...]
    kind: str
    level: str  # easy | medium | hard


class Kind(NamedTuple):
    make: Callable[[Maker], Question | None]
    weight: float
    level: str


KINDS: dict[str, Kind] = {
    "project": Kind(single.project, 4, "easy"),
    "lookup": Kind(single.lookup, 5, "easy"),
    "filter_category": Kind(single.filter_category, 4, "easy"),
    "filter_number": Kind(single.filter_number, 5, "easy"),
    "filter_date": Kind(single.filter_date, 4, "easy"),
    "filter_flag": Kind(single.filter_flag, 2, "easy"),
    "filter_null": Kind(single.filter_null, 1.5, "easy"),
    "filter_like": Kind(single.filter_like, 2.5, "easy"),
    "filter_and": Kind(single.filter_and, 5, "medium"),
    "filter_or": Kind(single.filter_or, 3, "medium"),
    "distinct": Kind(single.distinct, 2, "easy"),
    "top_one": Kind(ordering.top_one, 5, "medium"),
    "top_n": Kind(ordering.top_n, 4, "medium"),
    "nth": Kind(ordering.nth, 1, "medium"),
    "ordered": Kind(ordering.ordered, 3, "easy"),
    "count_all": Kind(aggregates.count_all, 1.5, "easy"),
    "count_where": Kind(aggregates.count_where, 5, "easy"),
    "count_distinct": Kind(aggregates.count_distinct, 2, "easy"),
    "aggregate": Kind(aggregates.aggregate, 6, "easy"),
    "aggregate_two": Kind(aggregates.aggregate_two, 2, "medium"),
    "share": Kind(aggregates.share, 1.2, "hard"),
    "group_count": Kind(grouping.group_count, 4, "medium"),
    "group_aggregate": Kind(grouping.group_aggregate, 4, "medium"),
    "group_year": Kind(grouping.group_year, 1.5, "medium"),
    "group_ordered": Kind(grouping.group_ordered, 2.5, "medium"),
    "group_top": Kind(grouping.group_top, 3, "medium"),
    "group_having": Kind(grouping.group_having, 4, "hard"),
    "group_two": Kind(grouping.group_two, 0.8, "medium"),
    "child_by_parent_label": Kind(joins.child_by_parent_label, 4, "medium"),
    "child_by_parent": Kind(joins.child_by_parent, 4, "medium"),
    "parent_of_child": Kind(joins.parent_of_child, 3, "medium"),
    "parent_by_child": Kind(joins.parent_by_child, 3, "medium"),
    "join_pairs": Kind(joins.join_pairs, 3, "medium"),
    "child_top": Kind(joins.child_top, 3, "hard"),
    "count_of_parent": Kind(joins.count_of_parent, 3, "medium"),
    "aggregate_of_parent": Kind(joins.aggregate_of_parent, 3, "hard"),
    "per_parent": Kind(parents.per_parent, 4, "medium"),
    "top_parent": Kind(parents.top_parent, 4, "hard"),
    "parents_having": Kind(parents.parents_having, 3, "hard"),
    "parents_without": Kind(parents.parents_without, 2.5, "hard"),
    "parents_with": Kind(parents.parents_with, 1.5, "hard"),
    "linked_labels": Kind(links.linked_labels, 4, "hard"),
    "linked_count": Kind(links.linked_count, 1, "hard"),
    "linked_top": Kind(links.linked_top, 1, "hard"),
    "chain": Kind(links.chain, 2.5, "hard"),
    "chain_group": Kind(links.chain_group, 1, "hard"),
    "above_average": Kind(nested.above_average, 3.5, "hard"),
    "at_extreme": Kind(nested.at_extreme, 1.5, "hard"),
    "same_as": Kind(nested.same_as, 2, "hard"),
    "more_than_named": Kind(nested.more_than_named, 2, "hard"),
    "exists": Kind(nested.exists, 2, "hard"),
    "both_kinds": Kind(nested.both_kinds, 1, "hard"),
    "child_of_extreme": Kind(nested.child_of_extreme, 1.2, "hard"),
    "above_group_average": Kind(nested.above_group_average, 0.7, "hard"),
    "average_of_counts": Kind(nested.average_of_counts, 0.6, "hard"),
}
_NAMES = tuple(KINDS)
_SUMS = tuple(accumulate(kind.weight for kind in KINDS.values()))
_TRIES = 60


def generate(domain: Domain, rng: random.Random, kind: str | None = None, language: str = "ko") -> Pair:
    """A pair from `domain` in Korean ("ko") or English ("en").

    `kind` asks for one kind; where the domain cannot serve it, the pair counts the rows of a table. English has fewer
    ways to ask and leaves out some of the nested kinds.
    """
    if language not in ("ko", "en"):
        raise ValueError(f"language is 'ko' or 'en', not {language!r}")
    maker = Maker(facts_of(domain), rng)
    for _ in range(_TRIES):
        name = kind or rng.choices(_NAMES, cum_weights=_SUMS)[0]
        made = KINDS[name].make(maker)
        if made is not None and language == "en":
            asked = english.question(made.sql, rng)
            made = made._replace(question=asked) if asked else None
        if made is not None:
            return Pair(*made, name, KINDS[name].level)
    made = aggregates.count_all(maker)
    assert made is not None  # every domain has a table
    asked = english.question(made.sql, rng) if language == "en" else None
    return Pair(asked or made.question, made.sql, made.tables, "count_all", "easy")
