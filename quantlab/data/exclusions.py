"""What must not be seen in training: the questions and queries of the test and development sets.

Two rules. By hash: a tenth of all questions and a tenth of all (database, query) pairs are set
aside; development pairs come only from there, and training text only from the rest, whatever the
development set happens to hold. By list: nothing that stands in `test.jsonl` or `dev.jsonl` is let
through, compared after taking away case, spacing and punctuation.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantlab.paths import DATA
from quantlab.textfile import json_objects

SHARE = 10  # one in so many is set aside
_NOISE = re.compile(r"[\s.,?!~\"'`:;()]+")
_SPACE = re.compile(r"\s+")


def normal_question(question: str) -> str:
    return _NOISE.sub("", question).lower()


def normal_sql(sql: str) -> str:
    """The query on one line, lower case, without the final semicolon. Literals stay."""
    return _SPACE.sub(" ", sql).strip().rstrip("; ").lower()


def _aside(text: str) -> bool:
    return zlib.crc32(text.encode()) % SHARE == 0


def question_aside(question: str) -> bool:
    return _aside("question " + normal_question(question))


def query_aside(db: str, sql: str) -> bool:
    return _aside(f"query {db} {normal_sql(sql)}")


class Exclusions:
    """The questions and queries of some rows, and whether a pair meets them."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.questions: set[str] = set()
        self.queries: set[tuple[str, str]] = set()
        for row in rows:
            self.add(row["db"], row["question"], row["answer"])

    def add(self, db: str, question: str, sql: str) -> None:
        self.questions.add(normal_question(question))
        self.queries.add((db, normal_sql(sql)))

    def meets(self, db: str, question: str, sql: str) -> bool:
        return normal_question(question) in self.questions or (db, normal_sql(sql)) in self.queries

    def allows_training(self, db: str, question: str, sql: str) -> bool:
        """Whether a pair may be trained on: not listed, and not set aside by hash."""
        return not (question_aside(question) or query_aside(db, sql) or self.meets(db, question, sql))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file. DataError names the file and the line that is not a JSON object."""
    return [row for _, row in json_objects(path)]


@cache
def evaluation_rows() -> Exclusions:
    """The test and development sets as far as they have been written."""
    paths = [DATA / "ko_text2sql" / name for name in ("test.jsonl", "dev.jsonl")]
    return Exclusions(row for path in paths if path.exists() for row in read_rows(path))
