"""Rows that are the same question again, and rows too close to an evaluated one.

Two rows are compared by the Jaccard similarity of their features: the character 3-grams of the question (without
case, spaces and punctuation, which Korean writes freely) and the tokens of the normalised query (without aliases
and qualifiers, each counted). MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, ch. 3), through datasketch, proposes pairs; each is then confirmed with the exact
similarity, so a threshold means what it says. The bands are chosen so that a pair at the threshold is missed less
than once in a million.

Likeness alone would call questions that differ in a number or in a direction the same, templated ones above all.
So what the query says counts absolutely:
- near duplicates must have the same query tokens (in any order): same tables, columns, values, comparisons;
- a row close to an evaluated one must have the same values (numbers and strings).

A question that equals an evaluated one, on whatever database, or a query that equals one on the same database, is
too close whatever the similarity is.

Evidence is part of what is asked: rows that differ in it are no duplicates of each other. To an evaluated row one may
be too close whatever its evidence says.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.text2sql.data.item import Item
from quantlab.text2sql.scoring.exact_match import fold, normalize

PERMUTATIONS = 128
SMALL_GROUP = 16  # so few are compared outright: exact, and cheaper than hashing them
MISSED = 1e-6  # share of pairs at the threshold that the bands may miss
GRAM = 3

_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?!\w)"
_TOKEN = re.compile(rf"'(?:[^']|'')*'|{_NUMBER}|\w+|<>|<=|>=|!=|\|\||[^\w\s(),.;]")
_ALIAS = re.compile(r"\b[Tt]\d+\.|\bAS [Tt]\d+\b")
_QUOTED = re.compile(r"('(?:[^']|'')*')")
_DECIMAL = re.compile(r"(?<=\d)\.(?=\d)")
_SIGN = re.compile(r"-(?=\d)")
_REST = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Profile:
    """What of a row is compared. `place` names its database."""

    place: tuple[str, str]
    question: str
    sql: str
    tokens: tuple[str, ...]  # of the query, sorted
    values: tuple[str, ...]  # numbers and strings of the query, sorted
    features: frozenset[str]
    evidence: str = ""


@dataclass(frozen=True)
class Near:
    """Row `index` repeats the earlier row `earlier`, which stays."""

    index: int
    earlier: int
    similarity: float


def profile(item: Item, sql: str | None = None) -> Profile:
    """The profile of a row with its own answer, or with `sql` in its place."""
    question = question_key(item.question)
    query = query_key(item.answer if sql is None else sql)
    tokens = query_tokens(query)
    grams = {question[at : at + GRAM] for at in range(max(1, len(question) - GRAM + 1))}
    counted = {f"{token}\x00{n}" for token, times in Counter(tokens).items() for n in range(times)}
    return Profile(
        place=(item.db_id, item.database.name if item.database else ""),
        question=question,
        sql=query,
        tokens=tuple(sorted(tokens)),
        values=tuple(sorted(filter(None, map(_value, tokens)))),
        features=frozenset({f"q{gram}" for gram in grams} | {f"s{token}" for token in counted}),
        evidence=evidence_key(item.evidence),
    )


def question_key(question: str) -> str:
    """The question without case, spaces and punctuation; signs and decimal points of numbers stay."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = _SIGN.sub("m", _DECIMAL.sub("p", text))
    return _REST.sub("", text) or text.strip()


def evidence_key(evidence: str) -> str:
    """The evidence with its blanks made one; case and signs stay, as values and formulas are written in them."""
    return " ".join(unicodedata.normalize("NFKC", evidence).split())


def query_key(sql: str) -> str:
    """The normalised query; where sqlglot does not read it, the text with blanks and case folded."""
    return normalize(sql) or fold(sql)


def query_tokens(normal: str) -> list[str]:
    """Tokens of a normalised query without aliases, qualifiers, brackets and commas; strings are one token."""
    parts = _QUOTED.split(normal)
    bare = [_ALIAS.sub("", part) if number % 2 == 0 else part for number, part in enumerate(parts)]
    return _TOKEN.findall("".join(bare))


def similarity(one: Profile, other: Profile) -> float:
    """Jaccard similarity of the features, 0 to 1."""
    common = len(one.features & other.features)
    return common / (len(one.features) + len(other.features) - common)


def exact_duplicates(profiles: Sequence[Profile]) -> dict[int, int]:
    """Index of a repeated row → index of the first one: same database, question, evidence and normalised query."""
    first: dict[tuple[Any, ...], int] = {}
    found: dict[int, int] = {}
    for index, row in enumerate(profiles):
        original = first.setdefault((row.place, row.question, row.evidence, row.sql), index)
        if original != index:
            found[index] = original
    return found


def near_duplicates(
    profiles: Sequence[Profile], threshold: float, advance: Callable[[float], None] | None = None
) -> list[Near]:
    """Rows that repeat an earlier kept row of their database with a similarity of at least `threshold`.

    Rows are taken in order and compared with the kept ones only, so a chain of small changes does not lose its end.
    """
    index = _Index(threshold)
    found: list[Near] = []
    for number, row in enumerate(profiles):
        # The same tokens and evidence are required anyway, so only rows that have them are hashed into one index.
        group = repr((row.place, row.evidence, row.tokens))
        best = _best(profiles, row, index.candidates(row, group), threshold)
        if best is None:
            index.add(number, row, group)
        else:
            found.append(Near(number, *best))
        if advance is not None:
            advance(1)
    return found


class Leakage:
    """Finds rows too close to an evaluated item (its question with any of its accepted queries)."""

    def __init__(self, evaluated: Iterable[Item], threshold: float) -> None:
        self.threshold = threshold
        self._profiles: list[Profile] = []
        self._ids: list[str] = []
        self._questions: dict[str, str] = {}
        self._queries: dict[tuple[str, str], str] = {}
        self._index = _Index(threshold)
        for item in evaluated:
            for sql in item.golds:
                row = profile(item, sql)
                self._index.add(len(self._profiles), row, repr(row.values))
                self._profiles.append(row)
                self._ids.append(item.id)
                self._questions.setdefault(row.question, item.id)
                for name in filter(None, row.place):
                    self._queries.setdefault((name, row.sql), item.id)

    def reason(self, row: Profile) -> str | None:
        """Why the row is too close to an evaluated item, or None."""
        if row.question in self._questions:
            return f"its question is that of the evaluated item {self._questions[row.question]}"
        for name in filter(None, row.place):
            if (name, row.sql) in self._queries:
                return f"its query is that of the evaluated item {self._queries[name, row.sql]}"
        candidates = self._index.candidates(row, repr(row.values))
        best = _best(self._profiles, row, candidates, self.threshold)
        if best is None:
            return None
        return f"similarity {best[1]:.2f} to the evaluated item {self._ids[best[0]]}"


class _Index:
    """MinHash signatures in locality-sensitive buckets, apart for each group that may be compared at all."""

    def __init__(self, threshold: float) -> None:
        self._bands = bands(threshold)
        self._groups: dict[str, list[int]] = {}
        self._rows: dict[int, Profile] = {}
        self._hashed: dict[str, Any] = {}

    def add(self, number: int, row: Profile, group: str) -> None:
        members = self._groups.setdefault(group, [])
        members.append(number)
        self._rows[number] = row
        if group in self._hashed:
            self._hashed[group].insert(number, _signature(row), check_duplication=False)
        elif len(members) > SMALL_GROUP:
            lsh = self._hashed[group] = _new_lsh(self._bands)
            for member in members:
                lsh.insert(member, _signature(self._rows[member]), check_duplication=False)

    def candidates(self, row: Profile, group: str) -> list[int]:
        """Numbers that may be near `row`, in the order in which they were added."""
        if group in self._hashed:
            return sorted(self._hashed[group].query(_signature(row)))
        return self._groups.get(group, [])


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows a band) within PERMUTATIONS: the longest bands that miss a pair at `threshold` less often than
    MISSED. A pair of similarity s shares a band with probability 1 − (1 − s^r)^b."""
    best = (PERMUTATIONS, 1)
    for rows in range(1, PERMUTATIONS + 1):
        count = PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= MISSED:
            best = (count, rows)
    return best


def _best(
    profiles: Sequence[Profile] | Mapping[int, Profile],
    row: Profile,
    candidates: Sequence[int],
    threshold: float,
) -> tuple[int, float] | None:
    """The most similar candidate at or above the threshold, the earliest of equals."""
    best: tuple[int, float] | None = None
    for number in candidates:
        value = similarity(row, profiles[number])
        if value >= threshold and (best is None or value > best[1]):
            best = number, value
    return best


def _new_lsh(shape: tuple[int, int]) -> Any:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=PERMUTATIONS, params=shape)


def _signature(row: Profile) -> Any:
    from datasketch import MinHash

    signature = MinHash(num_perm=PERMUTATIONS, seed=1)
    signature.update_batch([feature.encode("utf-8", "replace") for feature in sorted(row.features)])
    return signature


def _value(token: str) -> str | None:
    """A number or string of a query as it is compared; wildcards around a string do not matter."""
    if token.startswith("'"):
        return "'" + unicodedata.normalize("NFKC", token[1:-1]).casefold().strip("%_ ")
    return repr(float(token)) if re.fullmatch(_NUMBER, token) else None
