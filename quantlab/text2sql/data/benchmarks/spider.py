"""Spider (Yu et al. 2018): 166 training and 20 development databases, one question a row.

As it is unpacked: `train_spider.json` + `train_others.json`, `dev.json`, `test.json` (lists of objects with
`db_id`, `question`, `query`), gold files of a line each (`dev_gold.sql`: query, tab, db_id), and
`database/<db_id>/<db_id>.sqlite`, often with a `schema.sql` beside it; the test split's are in
`test_database/`. Where the folder of a database holds more SQLite files, as in the distilled test suites, all are
in `extra["databases"]`. `tables.json` is not needed: the databases say the same.

    spider:/data/spider[:dev|train|test], dev when left out; a file instead of the folder is read alone.
"""

from __future__ import annotations

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
from quantlab.text2sql.data.benchmarks.schemas import Schemas, beside, find_database, safe_name
from quantlab.text2sql.data.item import Item, parse_row

SPLITS = {
    "dev": ("dev.json",),
    "train": ("train_spider.json", "train_others.json", "train.json"),
    "test": ("test.json",),
}
DATABASES = {"test": ("test_database", "database"), "dev": ("database",), "train": ("database",)}
FORM = "spider:/path/to/spider[:dev|train|test]"


def load(rest: str, schemas: Schemas) -> Benchmark:
    """The rows of a split. DataError where a file is missing or is not what the layout says."""
    path, split = split_source(rest, SPLITS, FORM)
    if path.is_file():
        files, folder = [path], path.parent
        split = next((name for name, names in SPLITS.items() if path.name in names), path.stem)
    else:
        folder, split = path, split or "dev"
        files = [folder / name for name in SPLITS[split] if (folder / name).is_file()]
        if len(files) > 1:
            # which would be the two others again
            files = [file for file in files if file.name != "train.json"]
        if not files:
            raise DataError(
                f"no {split} questions: {tried([folder / name for name in SPLITS[split]])}",
                hint=f"form: {FORM}",
            )
    rows: list[RawRow] = []
    for file in files:
        rows += read_rows(file, first=len(rows) + 1)
    golds = first_existing(folder, [f"{split}_gold.sql"])
    databases = [folder / name for name in DATABASES.get(split, ("database", "test_database"))]
    return Benchmark(str(path), rows, _Reader(split, databases, golds, schemas).read)


class _Reader:
    def __init__(self, split: str, databases: list[Path], golds: Path | None, schemas: Schemas) -> None:
        self.split, self.databases, self.schemas = split, databases, schemas
        self.golds = gold_lines(golds) if golds is not None else []
        self._suites: dict[str, tuple[str, ...]] = {}

    def read(self, row: RawRow) -> Item:
        values = take_mapping(row)
        name = safe_name(values.get("db_id"), row)
        database = find_database(self.databases, name, row)
        item: dict[str, Any] = {
            "id": row.id,
            "db_id": name,
            "context": self.schemas.ddl(database, database.with_name("schema.sql")),
            "question": take_text(row, "question"),
            "answer": self._gold(row),
            "database": str(database),
            "dialect": "sqlite",
            "benchmark": "spider",
            "split": self.split,
        }
        if name not in self._suites:
            self._suites[name] = beside(database, name)
        suite = self._suites[name]
        return parse_row(item | ({"databases": suite} if suite else {}), row.where)

    def _gold(self, row: RawRow) -> str:
        """The row's query; a row without one is looked up in the gold file by its number."""
        if take_mapping(row).get("query") is None and int(row.id) <= len(self.golds):
            return self.golds[int(row.id) - 1]
        return take_text(row, "query")
