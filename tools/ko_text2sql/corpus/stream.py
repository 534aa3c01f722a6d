"""The endless stream of pretraining documents: what kinds there are, and in which shares.

The shares below are of documents; `tests/tools/test_corpus.py` checks the shares of text that follow
from them. The game domain (db_id 1) is held out: it is never loaded here, and nothing of the
synthetic schemas is taken from it.
"""

from __future__ import annotations

import datetime
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from quantlab.data.domains import domain_names, load_domain
from quantlab.data.exclusions import evaluation_rows
from quantlab.data.schema import Domain, Table
from tools.ko_text2sql.corpus.layouts import ddl_style, schema_summary, schema_text
from tools.ko_text2sql.corpus.pairs import PairSource, few_pairs, worked_examples
from tools.ko_text2sql.corpus.prose import lesson, story, sums, talk
from tools.ko_text2sql.corpus.rows import excerpt
from tools.ko_text2sql.corpus.schemas import glossary, random_domain

HELD_OUT = "game"
# relative frequency of each kind of document, and the method of `Writer` that makes it
SHARES: Mapping[str, float] = {
    "domain_pairs": 34,
    "random_pairs": 17,
    "english_pairs": 5,
    "schema": 12,
    "rows": 9,
    "lesson": 9,
    "talk": 5,
    "glossary": 6,
    "korean": 17,
    "english": 16,
    "sums": 2,
}


def training_domains() -> list[Domain]:
    """The seven written domains that may be trained on."""
    return [load_domain(name) for name in domain_names() if name != HELD_OUT]


def lesson_words(table: Table, rng: random.Random) -> dict[str, str] | None:
    """Names of the table's columns and a few values for the lesson templates; None when it lacks a kind of column."""
    by_role = {role: [c for c in table.columns if c.role == role] for role in ("number", "category", "date")}
    categories = [c for c in by_role["category"] if len(c.values) > 1]
    if not by_role["number"] or not categories:
        return None
    number, category = rng.choice(by_role["number"]), rng.choice(categories)
    date = rng.choice(by_role["date"]) if by_role["date"] else None
    label = table.label or category
    low, high = (float(str(bound)) for bound in number.range or (0, 100))
    x, y = sorted(int(rng.uniform(low, high)) for _ in range(2))
    first = datetime.date(rng.randint(2010, 2023), rng.randint(1, 12), rng.randint(1, 28))
    later = first + datetime.timedelta(days=rng.randint(20, 400))
    v, v2 = (str(value) for value in rng.sample(category.values, 2))
    return {
        "t": table.name, "T": table.ko, "C": table.counter, "k": table.key.name, "l": label.name, "L": label.ko,
        "n": number.name, "N": number.ko, "hi": number.high or "높은", "lo": number.low or "낮은",
        "g": category.name, "G": category.ko, "v": v, "v2": v2, "x": str(x), "y": str(y), "x2": str(rng.randint(2, 10)),
        "d": date.name if date else "created_on", "D": date.ko if date else "등록일",
        "day": first.isoformat(), "day2": later.isoformat(), "year": str(first.year),
    }  # fmt: skip


class Writer:
    """Makes documents of every kind from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.excluded = evaluation_rows()
        self.domains = training_domains()
        self.sources = [PairSource(domain, rng, self.excluded) for domain in self.domains]

    def domain_pairs(self) -> str:
        source = self.rng.choice(self.sources)
        tables, pairs = source.take(self.rng.randint(4, 8))
        return worked_examples(source.domain, tables, pairs, self.rng)

    def random_pairs(self, language: str = "ko") -> str:
        domain = random_domain(self.rng)
        pairs = few_pairs(domain, self.rng, self.excluded, self.rng.randint(4, 8), language)
        return worked_examples(domain, [table.name for table in domain.tables], pairs, self.rng, language)

    def english_pairs(self) -> str:
        return self.random_pairs("en")

    def _some_domain(self) -> tuple[Domain, Sequence[str]]:
        """Mostly a made-up domain; names of one to four of its tables."""
        domain = random_domain(self.rng) if self.rng.random() < 0.8 else self.rng.choice(self.domains)
        names = [table.name for table in domain.tables]
        return domain, self.rng.sample(names, min(len(names), self.rng.choice((1, 2, 3, 4))))

    def schema(self) -> str:
        domain, names = self._some_domain()
        parts = [schema_text(domain, names, ddl_style(self.rng, canonical=0.3))]
        if self.rng.random() < 0.3:
            parts.append(schema_summary(domain, names, self.rng))
        return "\n\n".join(parts)

    def rows(self) -> str:
        domain, names = self._some_domain()
        text = excerpt(domain, names, self.rng)
        if self.rng.random() < 0.4:
            text = schema_text(domain, names, ddl_style(self.rng)) + "\n\n" + text
        return text

    def _words(self) -> dict[str, str]:
        while True:
            domain, names = self._some_domain()
            words = lesson_words(domain.table(names[0]), self.rng)
            if words:
                return words

    def lesson(self) -> str:
        return lesson(self.rng, self._words(), "korean" if self.rng.random() < 0.7 else "english")

    def talk(self) -> str:
        return "\n".join(talk(self.rng, self._words()) for _ in range(self.rng.randint(1, 3)))

    def glossary(self) -> str:
        return glossary(self.rng)

    def korean(self) -> str:
        return story("korean", self.rng)

    def english(self) -> str:
        return story("english", self.rng)

    def sums(self) -> str:
        return sums(self.rng)


def set_aside(document: str) -> bool:
    """Whether a document belongs to the held-out part: one in 48, by its content."""
    return zlib.crc32(document.encode()) % 48 == 0


def kinds_and_documents(seed: int | str, held_out: bool = False) -> Iterator[tuple[str, str]]:
    """(kind, document), endless; the same seed gives the same stream.

    A document that belongs to the held-out part is in no training stream, whatever the seed, and the other way round.
    """
    rng = random.Random(f"corpus {seed}")
    writer = Writer(rng)
    makers: dict[str, Callable[[], str]] = {kind: getattr(writer, kind) for kind in SHARES}
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        for kind in rng.choices(kinds, weights, k=64):
            document = makers[kind]()
            if set_aside(document) == held_out:
                yield kind, document


def documents(seed: int | str, held_out: bool = False) -> Iterator[str]:
    """Pretraining documents, endless; the same seed gives the same stream."""
    return (document for _, document in kinds_and_documents(seed, held_out))
