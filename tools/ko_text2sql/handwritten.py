"""The test set: handwritten questions become rows with the DDL that a model gets to see.

`test_questions.yaml` holds what a person wrote: level, kind, question, answer. A row adds the context: the
tables of the answer and one or two others of the domain, drawn by a seed, all in schema order, so that finding the
right tables is part of the task. `python -m tools.ko_text2sql.handwritten` writes `ko_text2sql/test.jsonl`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantlab.data.domains import Domain, load_domain
from quantlab.errors import DataError
from quantlab.paths import DATA, atomic_write_text

QUESTIONS = Path(__file__).with_name("test_questions.yaml")
TEST_SET = DATA / "ko_text2sql" / "test.jsonl"
LEVELS = ("easy", "medium", "hard")
_SOURCE = re.compile(r"\b(?:FROM|JOIN) ([a-z_]+)")


def used_tables(domain: Domain, sql: str) -> tuple[str, ...]:
    """The tables a query in the style of the answers reads, in schema order."""
    named = set(_SOURCE.findall(sql))
    unknown = named - {table.name for table in domain.tables}
    if unknown:
        raise DataError(f"domain {domain.name} has no table {sorted(unknown)[0]}: {sql}")
    return tuple(table.name for table in domain.tables if table.name in named)


def context_tables(domain: Domain, used: tuple[str, ...], seed: str) -> tuple[str, ...]:
    """`used` and one or two other tables (as far as there are any), in schema order; the same for the same seed."""
    rng = random.Random(seed)
    others = [table.name for table in domain.tables if table.name not in used]
    shown = set(used)
    for _ in range(1 + int(rng.random() < 0.5)):
        if others:
            shown.add(others.pop(int(rng.random() * len(others))))
    return tuple(table.name for table in domain.tables if table.name in shown)


def handwritten_rows() -> list[dict[str, Any]]:
    """The rows of test.jsonl, in the order of the YAML."""
    domain = load_domain("game")
    return [_row(domain, number, item) for number, item in enumerate(_read(QUESTIONS), 1)]


def _read(path: Path) -> list[Mapping[str, str]]:
    items = yaml.safe_load(path.read_text(encoding="utf-8"))
    for number, item in enumerate(items, 1):
        wrong = set(item) ^ {"level", "kind", "question", "answer"}
        if wrong or not all(isinstance(value, str) for value in item.values()) or item["level"] not in LEVELS:
            raise DataError(f"{path.name}: question {number} needs level, kind, question and answer as text")
    return list(items)


def _row(domain: Domain, number: int, item: Mapping[str, str]) -> dict[str, Any]:
    shown = context_tables(domain, used_tables(domain, item["answer"]), f"test/{item['question']}")
    return {
        "id": f"test-{number:03}",
        "db_id": domain.db_id,
        "db": domain.name,
        "tables": list(shown),
        "context": domain.ddl(shown),
        "question": item["question"],
        "answer": item["answer"],
        "level": item["level"],
        "kind": item["kind"],
        "database": f"databases/{domain.name}.sqlite",
    }


def main() -> None:
    rows = handwritten_rows()
    atomic_write_text(TEST_SET, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{TEST_SET.name}: {len(rows)} questions")


if __name__ == "__main__":
    main()
