"""Fill sentence templates with words.

A template is text with slots: ``{place}`` takes a word of the pool of that name, ``{place:은/는}``
adds the Korean particle that fits the word. A word may hold slots itself. Numbers, prices and dates
are drawn, not listed.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.ko_text2sql.josa import josa

Pools = Mapping[str, Sequence[str]]
SLOT = re.compile(r"\{(\w+)(?::([^}]+))?\}")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DRAWN: dict[str, Callable[[random.Random], str]] = {
    "n": lambda rng: str(rng.randint(2, 30)),
    "age": lambda rng: str(rng.randint(5, 90)),
    "hour": lambda rng: str(rng.randint(6, 11)),
    "hour2": lambda rng: str(rng.randint(5, 10)),
    "won": lambda rng: f"{rng.randint(5, 400) * 100:,}",
    "number": lambda rng: str(rng.choice((rng.randint(2, 99), rng.randint(1, 90) * 100))),
}


@cache
def read_yaml(name: str) -> Any:
    """The parsed content of one of the word files that lie beside this module."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(Path(__file__).with_name(name).read_text(encoding="utf-8"), Loader=loader)


def korean_date(rng: random.Random) -> str:
    return f"{rng.randint(1995, 2024)}년 {rng.randint(1, 12)}월 {rng.randint(1, 28)}일"


def english_date(rng: random.Random) -> str:
    return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1995, 2024)}"


def fill(template: str, rng: random.Random, pools: Pools, bound: Mapping[str, str] | None = None) -> str:
    """The template with every slot filled; words in ``bound`` are used instead of drawing from the pool."""

    def word(slot: re.Match[str]) -> str:
        name, particle = slot.groups()
        if bound and name in bound:
            text = bound[name]
        elif name in DRAWN:
            text = DRAWN[name](rng)
        else:
            text = rng.choice(pools[name])
        if "{" in text:
            text = fill(text, rng, pools, bound)
        return josa(text, particle) if particle else text

    return SLOT.sub(word, template)


def capitalised(sentence: str) -> str:
    """The sentence with its first letter in upper case, past an opening quotation mark."""
    start = 1 if sentence.startswith('"') else 0
    return sentence[:start] + sentence[start : start + 1].upper() + sentence[start + 1 :]
