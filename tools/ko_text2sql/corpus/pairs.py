"""Question and query pairs beside their schema, in many arrangements.

A question is always a comment beside its query, as in files of SQL: nowhere is one asked and
answered, and nothing marks the end of a query: after one comes the next pair, a comment, some prose.
So a model trained on this text knows schemas, questions and SQL, but has not been taught to answer,
neither the prompt, whose headings never occur here, nor when to stop.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache

from quantlab.data.exclusions import Exclusions
from quantlab.data.schema import Domain
from tools.ko_text2sql.corpus.layouts import ddl_style, schema_summary, schema_text, sql_style
from tools.ko_text2sql.corpus.wording import read_yaml
from tools.ko_text2sql.grammar import Pair, generate

GAPS = ("\n", "\n\n", "\n\n")


MARKS = ("\n", "\n", "\n-- ", "\n→ ", "\n참고: ", "\n설명: ", " ")  # before a remark


@cache
def templates(kind: str, language: str = "ko") -> list[str]:
    """The arrangements of a kind; for English questions those that hold no Korean."""
    found: list[str] = read_yaml("arrangements.yaml")[kind]
    return found if language == "ko" else [template for template in found if template.isascii()]


@cache
def notes(language: str) -> dict[str, list[str]]:
    """Remarks by the clause that they are about."""
    found: dict[str, list[str]] = read_yaml("lessons.yaml")["notes"]
    if language == "ko":
        return found
    english = {clause: [text for text in texts if text.isascii()] for clause, texts in found.items()}
    return {clause: texts for clause, texts in english.items() if texts}


def remark(sql: str, language: str, rng: random.Random) -> str:
    """A sentence about a clause of the query."""
    fitting = [clause for clause in notes(language) if clause in sql]
    # the last one, SELECT, fits every query and says that nothing else does
    told = fitting[:-1][:3] or fitting
    return rng.choice(notes(language)[rng.choice(told)])


def arranged(pairs: Sequence[Pair], language: str, rng: random.Random) -> str:
    """Several pairs about one schema, mostly in one arrangement."""
    style = sql_style(rng)
    template = rng.choice(templates("pairs", language))
    mixed = rng.random() < 0.15
    remarks = rng.choice((0.0, 0.0, 0.0, 0.3, 0.8))
    mark = rng.choice(MARKS[:3] if language == "en" else MARKS)
    texts = []
    for number, pair in enumerate(pairs, start=1):
        if mixed:
            template = rng.choice(templates("pairs", language))
        text = template.format(q=pair.question, s=style(pair.sql), n=number)
        texts.append(f"{text}{mark}{remark(pair.sql, language, rng)}" if rng.random() < remarks else text)
    return rng.choice(GAPS).join(texts)


def worked_examples(
    domain: Domain, tables: Sequence[str], pairs: Sequence[Pair], rng: random.Random, language: str = "ko"
) -> str:
    """A schema and pairs about it: mostly the schema first, sometimes a summary, or no schema at all."""
    body = arranged(pairs, language, rng)
    roll = rng.random()
    if roll < 0.84:
        schema = schema_text(domain, tables, ddl_style(rng, canonical=0.6))
    elif roll < 0.95:
        schema = schema_summary(domain, tables, rng)
    else:
        return body
    parts = [schema]
    words = {"ko": domain.ko, "name": domain.name, "tables": ", ".join(tables)}
    if rng.random() < 0.35:
        parts.insert(0, rng.choice(templates("openings", language)).format(**words))
    if rng.random() < 0.30:
        parts.append(rng.choice(templates("bridges", language)).format(**words))
    parts.append(body)
    return rng.choice(GAPS).join(parts)


class PairSource:
    """Pairs about one domain, grouped so that those of a document share a few tables.

    A stock of generated pairs is kept; a document takes one of them, the tables that it uses and one or two more of the
    domain, and then others of the stock that get by with these tables. What was taken is replaced by fresh pairs.
    """

    def __init__(self, domain: Domain, rng: random.Random, excluded: Exclusions, stock: int = 600) -> None:
        self.domain = domain
        self.rng = rng
        self.excluded = excluded
        self._source = self._pairs()
        self.stock = [next(self._source) for _ in range(stock)]

    def _pairs(self) -> Iterator[Pair]:
        while True:
            pair = generate(self.domain, self.rng)
            if self.excluded.allows_training(self.domain.name, pair.question, pair.sql):
                yield pair

    def take(self, count: int) -> tuple[tuple[str, ...], list[Pair]]:
        """Table names in schema order, and up to `count` pairs that use only these."""
        names = [table.name for table in self.domain.tables]
        first = self.rng.choice(self.stock)
        spare = [name for name in names if name not in first.tables]
        tables = {*first.tables, *self.rng.sample(spare, min(len(spare), self.rng.choice((1, 2, 2, 3))))}
        fitting = [at for at, pair in enumerate(self.stock) if tables.issuperset(pair.tables)]
        taken = self.rng.sample(fitting, min(count, len(fitting)))
        pairs = [self.stock[at] for at in taken]
        for at in taken:
            self.stock[at] = next(self._source)
        return tuple(name for name in names if name in tables), pairs


def few_pairs(
    domain: Domain, rng: random.Random, excluded: Exclusions, count: int, language: str = "ko"
) -> list[Pair]:
    """Different pairs about a small domain whose whole schema is shown."""
    found: dict[str, Pair] = {}
    for _ in range(count * 2):
        pair = generate(domain, rng, language=language)
        if excluded.allows_training(domain.name, pair.question, pair.sql):
            found[pair.sql] = pair
        if len(found) == count:
            break
    return list(found.values())
