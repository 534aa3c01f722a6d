"""Few-shot examples for the Text2SQL prompt: which rows of a source are shown before every question.

The same examples, in the same order, stand before every question. Examples chosen by likeness to the question
score higher, but on generated data they hand over the answer's shape, and a score would then say as much
about the search as about the model.

They are drawn with a seed, from the databases of the source in turn, so that a few examples show several. The
first k of a longer draw are the draw of k. Never drawn: a row of the bundled game database, which is held out,
and a row whose question or query stands among the evaluated ones, compared without case, spacing and
punctuation. Not covered: rows that say the same in other words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from quantlab.data.exclusions import normal_question, normal_sql
from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item

SOURCE = "ko_text2sql/train.jsonl"
HELD_OUT = "game"
HELD_OUT_ID = "1"  # its db_id, here and in the book's data, which has no names


def select_shots(
    source: Sequence[Item], count: int, evaluated: Sequence[Item], *, seed: int = 0, name: str = SOURCE
) -> list[Item]:
    """`count` rows of `source`; DataError where fewer may be shown. `name` is what the message calls the source."""
    usable = usable_shots(source, evaluated)
    if len(usable) < count:
        raise DataError(
            f"{name}: {count} examples are asked for, {len(usable)} of {len(source)} rows may be shown",
            hint="rows of the game database and rows that stand in the evaluated data are never shown",
        )
    chance = random.Random(seed)
    by_database: dict[str, list[Item]] = {}
    for item in usable:
        by_database.setdefault(item.db_id, []).append(item)
    queues = list(by_database.values())
    chance.shuffle(queues)
    drawn: list[Item] = []
    while len(drawn) < count:
        for queue in queues:
            if queue:
                drawn.append(queue.pop(chance.randrange(len(queue))))
    return drawn[:count]


def usable_shots(source: Sequence[Item], evaluated: Sequence[Item]) -> list[Item]:
    """The rows that may be shown, in their order."""
    questions = {normal_question(item.question) for item in evaluated}
    queries = {normal_sql(sql) for item in evaluated for sql in item.golds}
    return [
        item
        for item in source
        if not is_held_out(item)
        and normal_question(item.question) not in questions
        and not any(normal_sql(sql) in queries for sql in item.golds)
    ]


def is_held_out(item: Item) -> bool:
    """Whether a row is about the bundled game database: by name, by file, or by number where it has no name."""
    if "db" in item.extra:
        return str(item.extra["db"]).lower() == HELD_OUT
    named = item.database is not None and item.database.stem.lower() == HELD_OUT
    return named or item.db_id.lower() in (HELD_OUT, HELD_OUT_ID)
