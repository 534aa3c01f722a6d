"""BIRD (Li et al. 2023), the full sets and Mini-Dev: questions with a hint that only an expert would know.

As they are unpacked: `mini_dev_sqlite.json`, `dev.json`, `train.json`: lists of objects with `db_id`, `question`,
`evidence` (the hint, may be empty), `SQL`, and outside train `question_id` and `difficulty` (simple, moderate,
challenging); gold files of a line each; `dev_databases/<db_id>/<db_id>.sqlite`, for train `train_databases/`. The
MySQL and PostgreSQL versions of Mini-Dev ask the same of the same data: their rows carry the dialect and the same
SQLite file. The hint is in `extra["evidence"]`, for a prompt to show.

    bird:/data/minidev[:mini_dev|mini_dev_mysql|mini_dev_postgresql|dev|train]; the first that is there when left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text2sql.data.benchmarks.base import Benchmark, RawRow
from quantlab.text2sql.data.benchmarks.files import (
    first_existing,
    gold_lines,
    read_rows,
    split_source,
    take_mapping,
    take_text,
    tried,
)
from quantlab.text2sql.data.benchmarks.schemas import Schemas, find_database, safe_name
from quantlab.text2sql.data.item import Item, parse_row

SPLITS = {
    "mini_dev": ("mini_dev_sqlite.json", "mini_dev_sqlite.jsonl"),
    "dev": ("dev.json",),
    "mini_dev_mysql": ("mini_dev_mysql.json", "mini_dev_mysql.jsonl"),
    "mini_dev_postgresql": ("mini_dev_postgresql.json", "mini_dev_postgresql.jsonl"),
    "train": ("train.json",),
}
DIALECTS = {"mini_dev_mysql": "mysql", "mini_dev_postgresql": "postgres"}
# Archives unpack into folders of their own, so one that holds one of these will do as well.
INNER = (
    "",
    "MINIDEV",
    "minidev/MINIDEV",
    "mini_dev_data",
    "llm/mini_dev_data",
    "dev",
    "dev_20240627",
    "train",
)
DATABASES = ("dev_databases", "train_databases", "databases", "database")
FORM = f"bird:/path/to/bird[:{'|'.join(SPLITS)}]"


def load(rest: str, schemas: Schemas) -> Benchmark:
    """The rows of a split. DataError where a file is missing or is not what the layout says."""
    path, split = split_source(rest, SPLITS, FORM)
    if path.is_file():
        file, split = path, next((name for name, names in SPLITS.items() if path.name in names), path.stem)
    else:
        file, split = _questions(path, split)
    folder = file.parent
    golds = first_existing(folder, [f"{file.stem}_gold.sql", f"{file.stem}.sql", f"{split}_gold.sql"])
    databases = [folder / name for name in sorted(DATABASES, key=lambda name: not name.startswith(split))]
    return Benchmark(str(file), read_rows(file), _Reader(split, databases, golds, schemas).read, question_id)


def question_id(row: RawRow) -> str:
    """The id of a question, which the published Mini-Dev gives twice here and there; a row without one is numbered."""
    number = row.value.get("question_id") if isinstance(row.value, Mapping) else None
    return str(number) if isinstance(number, int) else row.id


def _questions(folder: Path, split: str) -> tuple[Path, str]:
    candidates = [
        (folder / inner / name, known)
        for known, names in SPLITS.items()
        if known == (split or known)
        for inner in INNER
        for name in names
    ]
    for path, known in candidates:
        if path.is_file():
            return path, known
    names = [folder / name for known in ([split] if split else SPLITS) for name in SPLITS[known]]
    raise DataError(f"no questions of BIRD in {folder}: {tried(names)}", hint=f"form: {FORM}")


class _Reader:
    def __init__(self, split: str, databases: list[Path], golds: Path | None, schemas: Schemas) -> None:
        self.split, self.databases, self.schemas = split, databases, schemas
        self.golds = gold_lines(golds) if golds is not None else []

    def read(self, row: RawRow) -> Item:
        values = take_mapping(row)
        name = safe_name(values.get("db_id"), row)
        database = find_database(self.databases, name, row)
        item: dict[str, Any] = {
            "id": question_id(row),
            "db_id": name,
            "context": self.schemas.ddl(database),
            "question": take_text(row, "question"),
            "answer": self._gold(row),
            "database": str(database),
            "dialect": DIALECTS.get(self.split, "sqlite"),
            "benchmark": "bird",
            "split": self.split,
            "evidence": take_text(row, "evidence", empty=True).strip(),
            "difficulty": take_text(row, "difficulty", empty=True),
        }
        return parse_row(item, row.where)

    def _gold(self, row: RawRow) -> str:
        """The row's query; a row without one is looked up in the gold file by its number."""
        if take_mapping(row).get("SQL") is None and int(row.id) <= len(self.golds):
            return self.golds[int(row.id) - 1]
        return take_text(row, "SQL")
