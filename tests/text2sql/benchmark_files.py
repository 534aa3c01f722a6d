"""Files of published benchmarks in miniature, for the tests of the adapters."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONCERTS = """
CREATE TABLE singer (Singer_ID INTEGER PRIMARY KEY, Name TEXT, Age INT);
CREATE TABLE concert (concert_ID INTEGER PRIMARY KEY, Singer_ID INT REFERENCES singer(Singer_ID));
INSERT INTO singer VALUES (1, 'Joe Sharp', 52), (2, 'Timbaland', 32);
INSERT INTO concert VALUES (1, 2);
"""


def make_database(path: Path, script: str = CONCERTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
