"""Plain prose: everyday Korean and English from sentence templates, and short lessons about SQL.

The everyday texts bind a few words for a whole document (who, where, with what), so that later
sentences repeat words of earlier ones. The lessons speak about the tables of a domain and carry
queries, but none answers a question, except the worked examples of `tools.ko_text2sql.corpus.pairs`.
"""

import random
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tools.ko_text2sql.corpus.wording import (
    MONTHS,
    Pools,
    capitalised,
    english_date,
    fill,
    korean_date,
    read_yaml,
)
from tools.ko_text2sql.josa import josa


@cache
def language_pools(language: str) -> dict[str, list[str]]:
    content = read_yaml("phrases.yaml")[language]
    return {**content["pools"], **content.get("more", {})}


def _bindings(language: str, rng: random.Random) -> dict[str, str]:
    content: Mapping[str, Any] = read_yaml("phrases.yaml")[language]
    return {name: rng.choice(content["pools"][name]) for name in content["bound"]}


def sentences(language: str, rng: random.Random) -> Iterator[str]:
    """Endless everyday sentences about the same few people and things."""
    templates: list[str] = read_yaml("phrases.yaml")[language]["sentences"]
    pools: Pools = language_pools(language)
    bound = _bindings(language, rng)
    recent: list[str] = []
    while True:
        template = rng.choice(templates)
        if template in recent:
            continue
        recent = [*recent[-6:], template]
        if language == "korean":
            drawn = {"date": korean_date(rng), "month": str(rng.randint(1, 12))}
        else:
            drawn = {"date": english_date(rng), "month": rng.choice(MONTHS)}
        # the bound words are used most of the time; now and then somebody or something else comes up
        kept = {name: word for name, word in bound.items() if rng.random() < 0.7}
        yield capitalised(fill(template, rng, pools, {**kept, **drawn}))


def story(language: str, rng: random.Random, low: int = 4, high: int = 14) -> str:
    """A few paragraphs of everyday prose."""
    source = sentences(language, rng)
    text = []
    left = rng.randint(low, high)
    while left > 0:
        paragraph = min(left, rng.randint(3, 6))
        text.append(" ".join(next(source) for _ in range(paragraph)))
        left -= paragraph
    return rng.choice(("\n", "\n\n")).join(text)


def sums(rng: random.Random) -> str:
    """Small exercises with numbers and dates, a line each."""
    lines = []
    kind = rng.randrange(4)
    for _ in range(rng.randint(4, 10)):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        if kind == 0:
            lines.append(f"{a} + {b} = {a + b}")
        elif kind == 1:
            lines.append(f"{max(a, b)} - {min(a, b)} = {abs(a - b)}")
        elif kind == 2:
            high, low = max(a, b), min(a, b)
            lines.append(
                f"{josa(str(high), '은/는')} {low} 이상이다." if rng.random() < 0.5 else f"{low} <= {high}"
            )
        else:
            year, month, day = rng.randint(1995, 2024), rng.randint(1, 12), rng.randint(1, 28)
            written = josa(f"'{year}-{month:02}-{day:02}'", "으로/로")
            lines.append(f"{year}년 {month}월 {day}일은 {written} 적는다.")
    return "\n".join(lines)


def lesson(rng: random.Random, words: Mapping[str, str], language: str) -> str:
    """Two to five short explanations of SQL clauses, with the given table and column names."""
    templates: list[str] = read_yaml("lessons.yaml")[language]
    parts = [fill(template, rng, {}, words) for template in rng.sample(templates, rng.randint(2, 5))]
    return "\n\n".join(parts)


def talk(rng: random.Random, words: Mapping[str, str]) -> str:
    """Remarks about a table in plain words, Korean."""
    templates: list[str] = read_yaml("lessons.yaml")["talk"]
    return " ".join(fill(template, rng, {}, words) for template in rng.sample(templates, rng.randint(3, 6)))
