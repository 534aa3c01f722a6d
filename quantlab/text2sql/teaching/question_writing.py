"""New questions with their SQL, written by a teacher: which requests are made, and rows from the replies.

A plan splits `count` pairs over the levels by the largest remainder, so the proportions are exact, and the pairs of
a level over requests of `per_request`. Each level walks through the contexts in an order drawn from the seed; the
n-th visit to the same context gets the number n and the n-th topic, so no two requests are alike. A larger `count`
only adds requests behind those of a smaller one, apart from one that was not full: what was paid stays paid.

    plan = plan_writing(contexts, 1000, {"easy": 0.3, "medium": 0.4, "hard": 0.3}, per_request=5, prompt=prompt)
    gathered = gather([planned.request for planned in plan], …, accept=unusable_pairs)
    items = written_items(plan, [answer and answer.text for answer in gathered.answers])
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quantlab.errors import DataError
from quantlab.teacher.ledger import Request
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.teaching.judge import exact_keys, kind_of, parse_object, reason_of
from quantlab.text2sql.teaching.prompts import LEVELS, Prompt, write_request

Thing = TypeVar("Thing")

TOKENS_PER_PAIR = 220  # room for one pair in a reply; a cut reply is lost whole


@dataclass(frozen=True)
class Context:
    """Tables to write questions about, and the database that holds their rows, where there is one."""

    ddl: str
    db_id: str
    database: Path | None = None


@dataclass(frozen=True)
class Planned:
    """One request for `count` pairs of `level` on `context`."""

    request: Request
    context: Context
    level: str
    count: int
    topic: str
    variation: int


def contexts_of(items: Iterable[Item]) -> list[Context]:
    """The distinct contexts of rows, in order of appearance."""
    return list(dict.fromkeys(Context(item.context, item.db_id, item.database) for item in items))


def largest_remainder(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` split in the proportions of `shares`: whole numbers that add up to it (Hamilton's method).

    What is left over goes to the largest fractions; equal ones in the order of `shares`.
    """
    weight = sum(shares.values())
    if weight <= 0 or any(share < 0 for share in shares.values()):
        raise ValueError("expected proportions that are not negative and not all zero")
    exact = {name: total * share / weight for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(shares, key=lambda name: counts[name] - exact[name])  # stable: ties keep their order
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def plan_writing(
    contexts: Sequence[Context],
    count: int,
    levels: Mapping[str, float],
    *,
    prompt: Prompt,
    per_request: int = 5,
    seed: int = 0,
    examples: Sequence[tuple[str, str]] = (),
    max_tokens: int | None = None,
    temperature: float = 0.0,
    structured: bool = True,
) -> list[Planned]:
    """Requests for exactly `count` pairs; the same arguments give the same requests.

    `examples` are (question, SQL) pairs that show the style. `max_tokens` bounds a reply; by default it leaves room
    for the pairs asked for. DataError where there is no context.
    """
    by_ddl: dict[str, Context] = {}
    for context in contexts:
        by_ddl.setdefault(context.ddl.strip(), context)
    distinct = list(by_ddl.values())
    if not distinct:
        raise DataError("there are no tables to write questions about", hint="the source has no rows")
    counts = largest_remainder(count, {level: levels[level] for level in LEVELS if level in levels})
    plan: list[Planned] = []
    for level, wanted in counts.items():
        order = _shuffled(distinct, seed, level)
        for number in range(-(-wanted // per_request)):
            context, variation = order[number % len(order)], number // len(order) + 1
            topics = _shuffled(prompt.topics[level], seed, level, context.ddl)
            topic = topics[(variation - 1) % len(topics)]
            size = min(per_request, wanted - number * per_request)
            request = write_request(
                prompt,
                context.ddl,
                level,
                size,
                topic=topic,
                variation=variation,
                examples=examples,
                max_tokens=max_tokens or TOKENS_PER_PAIR * size,
                temperature=temperature,
                structured=structured,
                label=f"{level} {number + 1} (db {context.db_id})",
            )
            plan.append(Planned(request, context, level, size, topic, variation))
    return plan


def parse_written(text: str) -> list[tuple[str, str]]:
    """`{"pairs": [{"question": "…", "sql": "…"}, …]}` as (question, SQL) pairs; ValueError for anything else."""
    pairs = parse_object(text, ("pairs",))["pairs"]
    if not isinstance(pairs, list):
        raise ValueError(f"'pairs' must be a list, found {kind_of(pairs)}")
    if not pairs:
        raise ValueError("'pairs' is empty")
    found = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, dict):
            raise ValueError(f"pair {number} must be an object, found {kind_of(pair)}")
        exact_keys(pair, ("question", "sql"), f"pair {number}")
        for key in ("question", "sql"):
            if not isinstance(pair[key], str):
                raise ValueError(f"{key!r} of pair {number} must be text, found {kind_of(pair[key])}")
            if not pair[key].strip():
                raise ValueError(f"{key!r} of pair {number} is empty")
        found.append((" ".join(pair["question"].split()), pair["sql"].strip()))
    return found


def unusable_pairs(text: str) -> str | None:
    """Why `text` holds no pairs, or None: the `accept` of a gathering of written questions."""
    return reason_of(parse_written, text)


def written_items(plan: Sequence[Planned], texts: Sequence[str | None]) -> list[Item]:
    """Rows from the replies to `plan`, in its order. Missing and unusable replies give none; more pairs than were
    asked for are cut, so that the levels keep their proportions.

    An id is the hash of tables, question and SQL: the same row has the same id in every run. A row that was written
    twice gets a number behind its id and is left to the rule on duplicates.
    """
    items: list[Item] = []
    taken: dict[str, int] = {}
    for planned, text in zip(plan, texts, strict=True):
        if text is None or unusable_pairs(text) is not None:
            continue
        for question, sql in parse_written(text)[: planned.count]:
            name = _name(planned.context, question, sql)
            taken[name] = taken.get(name, 0) + 1
            again = f"-{taken[name]}" if taken[name] > 1 else ""
            items.append(
                Item(
                    id=name + again,
                    db_id=planned.context.db_id,
                    context=planned.context.ddl,
                    question=question,
                    answer=sql,
                    database=planned.context.database,
                    extra={"level": planned.level, "topic": planned.topic, "variation": planned.variation},
                )
            )
    return items


def _name(context: Context, question: str, sql: str) -> str:
    content = json.dumps([context.db_id, context.ddl, question, sql], ensure_ascii=True)
    return "written-" + hashlib.sha256(content.encode()).hexdigest()[:12]


def _shuffled(values: Sequence[Thing], seed: int, *names: str) -> list[Thing]:
    key = json.dumps([seed, *names], ensure_ascii=True)
    order = list(values)
    random.Random(hashlib.sha256(key.encode()).hexdigest()).shuffle(order)
    return order
