"""Text2SQL rows: `{db_id, context (DDL), question, answer (SQL)}` and what may stand beside them.

The columns are those of the book's `shangrilar/ko_text2sql`. `database` names a SQLite file (relative to
the JSONL file) that gold and prediction run on, `alternatives` are other accepted queries, `dialect` is what
the golds are written in (sqlite, mysql, postgres, …; unknown when left out), `evidence` is what one must know to
understand the question (BIRD's external knowledge; every prompt shows it), `id` defaults to the row's number. Of
several rows with one id the first keeps it, the next are called `<id>#2`, `<id>#3`; `id_notes` says so.
The bundled training rows leave `context` out; it is filled from their domain's DDL.

Sources: `ko_text2sql:test|dev|train` (bundled), a path or bundled name as in `quantlab.paths.find_source`,
`hf:owner/name[/config]:split` through the datasets library, or a published benchmark on disk, as in
`quantlab.text2sql.data.benchmarks` (`spider:/data/spider:dev`). The book's data on the hub are read by their adapter,
with or without its name in front. Every complaint names the file and the line or row.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from quantlab.errors import DataError
from quantlab.paths import DATA, find_source, nearest
from quantlab.text2sql.data import benchmarks
from quantlab.text2sql.data.hub import hub_rows, parse_hub
from quantlab.text2sql.data.item import BadRow, Item, _id_of, parse_row
from quantlab.textfile import json_lines

KO_TEXT2SQL = "ko_text2sql"  # the bundled rows, and the adapter of those that they are modelled on:
BOOK = "shangrilar/ko_text2sql"  # on the hub

Raw = TypeVar("Raw")


def load_items(source: str, limit: int | None = None, bad: list[BadRow] | None = None) -> list[Item]:
    """The rows of `source`; DataError for a row that lacks or garbles something, unless `bad` collects such rows.

    A `limit` takes that many rows at even distances, not the first ones: files are often sorted by database.
    """
    benchmark, rest = _benchmark(source)
    if benchmark:
        from quantlab.text2sql.data.benchmarks.schemas import Schemas

        with Schemas() as schemas:
            found = benchmarks.load(benchmark, rest, schemas)
            raw = [(row.where, row) for row in found.rows]
            names = [found.id_of(row) for row in found.rows]
            return _collect(raw, names, lambda where, row: found.read(row), found.name, limit, bad)
    if source.startswith("hf:"):
        rows, name, folder = hub_rows(source), source, None
    else:
        path = find_source(_bundled_name(source))
        rows = [(f"{path}:{number}", row) for number, row in json_lines(path)]
        name, folder = str(path), path.parent
    names = [_id_of(row, where) for where, row in rows]
    return _collect(rows, names, lambda where, row: parse_row(row, where, folder), name, limit, bad)


def _collect(
    rows: list[tuple[str, Raw]],
    names: list[str],
    read: Callable[[str, Raw], Item],
    name: str,
    limit: int | None,
    bad: list[BadRow] | None,
) -> list[Item]:
    """The items of `rows`, whose ids are `names`; these are made distinct before the limit, which changes none."""
    chosen: Sequence[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = [i * len(rows) // limit for i in range(limit)]
    distinct, times = distinct_ids(names), Counter(names)
    items = []
    for number in chosen:
        where, row = rows[number]
        try:
            shared = names[number] if times[names[number]] > 1 else ""
            items.append(replace(read(where, row), id=distinct[number], shared_id=shared))
        except DataError as error:
            if bad is None:
                raise
            bad.append(BadRow(where, str(error)))
    if not items:
        raise DataError(
            f"{name}: no rows", hint=f"{len(bad)} rows cannot be read; {bad[0].reason}" if bad else ""
        )
    return items


def distinct_ids(names: Sequence[str]) -> list[str]:
    """The ids of rows, each once: the n-th row called `x` is `x#n` from the second on, with more of the signs where
    some row is called that already. They depend on all the names and their order, and on nothing else."""
    taken, seen = set(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        new, sign = name, "#"
        while seen[name] > 1 and new in taken:
            new, sign = f"{name}{sign}{seen[name]}", sign + "#"
        taken.add(new)
        found.append(new)
    return found


def id_notes(items: Sequence[Item], name: str) -> list[str]:
    """A sentence for people where rows of the data `name` share an id, else nothing."""
    later = [item for item in items if item.shared_id not in ("", item.id)]
    if not later:
        return []
    shared = list(dict.fromkeys(item.shared_id for item in later))
    return [
        f"{name} gives {len(shared)} {'id' if len(shared) == 1 else 'ids'} ({_some(shared)}) to several rows: "
        f"the later ones are called {_some([item.id for item in later])}"
    ]


def digest(items: Iterable[Item]) -> str:
    """16 hexadecimal characters naming the questions, contexts, golds and databases, in this order."""
    state = hashlib.sha256()
    for item in items:
        fields = [item.id, item.context, item.question, *item.golds, _database_digest(item.database)]
        # What most data do not have is named only where it is: their digests stay as they were.
        fields += [item.dialect] if item.dialect else []
        fields += [f"evidence {item.evidence}"] if item.evidence else []
        fields += [f"note {note.table} {note.line}" for note in item.notes]
        state.update(json.dumps(fields, ensure_ascii=True).encode() + b"\n")
    return state.hexdigest()[:16]


def on_the_hub(source: str) -> bool:
    """Whether a source is fetched from the hub, which planning must not do."""
    return source.removeprefix(f"{KO_TEXT2SQL}:").startswith("hf:")


def _benchmark(source: str) -> tuple[str, str]:
    """The published benchmark that a source names and what follows, or ("", ""): what is bundled is no benchmark."""
    if source.startswith("hf:"):
        return (KO_TEXT2SQL, source) if parse_hub(source)[0] == BOOK else ("", "")
    name, colon, rest = source.partition(":")
    if not colon or (DATA / _bundled_name(source)).is_file():
        return "", ""
    if name in benchmarks.ADAPTERS:
        return name, rest
    near = nearest(name, benchmarks.ADAPTERS)
    if near and "/" not in name and not Path(source).exists():
        raise DataError(f"no benchmark {name!r}: {source}", hint=f"did you mean {near}:{rest}?")
    return "", ""


def _bundled_name(source: str) -> str:
    """`ko_text2sql:test` is short for the bundled `ko_text2sql/test.jsonl`."""
    name, colon, split = source.partition(":")
    return f"{name}/{split}.jsonl" if name == KO_TEXT2SQL and colon else source


@functools.lru_cache(maxsize=256)
def _database_digest(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
