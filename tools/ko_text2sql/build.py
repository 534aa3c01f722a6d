"""Builds the bundled data: `python -m tools.ko_text2sql.build` writes it, `--check` compares it with what
is there.

In this order, since each excludes what came before: the databases of all domains; `test.jsonl`,
from the handwritten questions, and `test_book_columns.csv`, the same in the columns of the book's
data; `dev.jsonl`; `train.jsonl`, without anything of test and development; `heldout.txt`, documents
of the corpus that no training stream holds; the two calibration files; and the sizes in the data
card. Everything comes from fixed seeds, so that a second build gives the same bytes; databases are
compared by content, because SQLite writes its own version into each file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import random
import re
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.data.domains import build_database, domain_names, load_domain
from quantlab.data.schema import Domain
from quantlab.paths import DATA, atomic_write_text, bundled
from tools.ko_text2sql.corpus import kinds_and_documents, training_domains
from tools.ko_text2sql.corpus.pairs import worked_examples
from tools.ko_text2sql.corpus.prose import story
from tools.ko_text2sql.grammar import Pair
from tools.ko_text2sql.handwritten import handwritten_rows
from tools.ko_text2sql.splits import LEVELS, dev_rows, train_rows

HELD_OUT_BYTES = 300_000
CALIBRATION_ROWS = 400
CALIBRATION_PAIR_ROWS = 260  # of these, made from training pairs; the rest are other documents
PROSE_BYTES = 230_000
BOOK_COLUMNS = ("db_id", "context", "question", "answer")

Row = dict[str, Any]


def as_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def in_book_columns(rows: Iterable[Row]) -> str:
    """The rows as CSV with the columns that the book's data have, and no more: there is no database to run on."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(BOOK_COLUMNS)
    writer.writerows([row[column] for column in BOOK_COLUMNS] for row in rows)
    return stream.getvalue()


def held_out_text(target: int = HELD_OUT_BYTES) -> str:
    """Documents of the corpus's held-out part, an empty line between, of about `target` bytes."""
    documents: dict[str, None] = {}
    size = 0
    for _, document in kinds_and_documents("heldout", held_out=True):
        if document not in documents:
            documents[document] = None
            size += len(document.encode()) + 2
        if size >= target:
            return "\n\n".join(documents) + "\n"
    raise AssertionError("the stream of documents is endless")


def examples_from(rows: Sequence[Row], domain: Domain, rng: random.Random) -> Iterator[str]:
    """Documents that show training pairs of one domain beside their schema, up to three a document."""
    left = [
        Pair(row["question"], row["answer"], tuple(row["tables"]), row["kind"], row["level"]) for row in rows
    ]
    while left:
        first = left.pop(0)
        together = [first]
        for pair in left:
            if set(pair.tables) <= set(first.tables):
                together.append(pair)
            if len(together) == 3:
                break
        left = [pair for pair in left if pair not in together]
        yield worked_examples(domain, first.tables, together, rng)


def korean_calibration(train: Sequence[Row], domains: Sequence[Domain], held_out: str) -> list[Row]:
    """Schemas with pairs of the training set and other documents of the corpus, none part of `held_out`."""
    rng = random.Random("calibration")
    sources = [examples_from([row for row in train if row["db"] == d.name], d, rng) for d in domains]
    examples = (next(source) for source in itertools.cycle(sources))
    others = (text for kind, text in kinds_and_documents("calibration") if kind != "domain_pairs")
    texts: list[str] = []
    for stream, wanted in ((examples, CALIBRATION_PAIR_ROWS), (others, CALIBRATION_ROWS)):
        while len(texts) < wanted:
            text = next(stream)
            if text not in held_out and text not in texts:
                texts.append(text)
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


def english_calibration(target: int = PROSE_BYTES) -> list[Row]:
    """Short everyday English texts of about `target` bytes in all."""
    rng = random.Random("english prose")
    rows: list[Row] = []
    size = 0
    while size < target:
        rows.append({"text": story("english", rng, 8, 20)})
        size += len(rows[-1]["text"].encode())
    return rows


def data_card(card: str, sets: Mapping[str, Sequence[Row]]) -> str:
    """The data card with the line of each set in its table of sizes brought up to date."""
    for name, rows in sets.items():
        levels = Counter(row["level"] for row in rows)
        counts = [len(rows), *(levels[level] for level in LEVELS), len({row["kind"] for row in rows})]
        line = f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |"
        card, found = re.subn(rf"^\| {name} \|.*$", line, card, flags=re.MULTILINE)
        assert found == 1, f"the data card has {found} lines of sizes for {name}"
    return card


def build(data: Path, calib: Path) -> list[Path]:
    """Write everything below `data` and `calib`; the files written."""
    databases = data / "ko_text2sql" / "databases"
    written = []
    for name in domain_names():
        written.append(databases / f"{name}.sqlite")
        build_database(load_domain(name), written[-1])
    domains = training_domains()
    test = handwritten_rows()
    dev = dev_rows(domains, databases, test)
    train = train_rows(domains, databases, [*test, *dev])
    held_out = held_out_text()
    card = (DATA / "ko_text2sql" / "README.md").read_text(encoding="utf-8")
    texts = {
        data / "ko_text2sql" / "README.md": data_card(card, {"test": test, "dev": dev, "train": train}),
        data / "ko_text2sql" / "test.jsonl": as_jsonl(test),
        data / "ko_text2sql" / "test_book_columns.csv": in_book_columns(test),
        data / "ko_text2sql" / "dev.jsonl": as_jsonl(dev),
        data / "ko_text2sql" / "train.jsonl": as_jsonl(train),
        data / "heldout.txt": held_out,
        calib / "ko-text2sql.jsonl": as_jsonl(korean_calibration(train, domains, held_out)),
        calib / "en-prose.jsonl": as_jsonl(english_calibration()),
    }
    for path, text in texts.items():
        atomic_write_text(path, text)
    return [*written, *texts]


def _content(path: Path) -> object:
    """What two builds of a file must have in common."""
    if path.suffix != ".sqlite":
        return path.read_bytes()
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return list(connection.iterdump())


def differences(data: Path, calib: Path) -> list[str]:
    """What is missing or differs from a fresh build."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_data, fresh_calib = Path(folder, "data"), Path(folder, "calib")
        found = []
        for fresh in build(fresh_data, fresh_calib):
            in_data = fresh.is_relative_to(fresh_data)
            base, fresh_base = (data, fresh_data) if in_data else (calib, fresh_calib)
            path = base / fresh.relative_to(fresh_base)
            if not path.exists():
                found.append(f"{path} is missing")
            elif _content(path) != _content(fresh):
                found.append(f"{path} is not what would be built")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ko_text2sql.build", description="Build the bundled data."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if what is there differs")
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(DATA, bundled("calib"))
        for line in found:
            print(line, file=sys.stderr)
        return 1 if found else 0
    for path in build(DATA, bundled("calib")):
        print(f"{path.stat().st_size:>9,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
