"""Text2SQL rows: `{db_id, context (DDL), question, answer (SQL)}` and what may stand beside them.

The columns are those of the book's `shangrilar/ko_text2sql`. `database` names a SQLite file (relative to
the JSONL file) that gold and prediction run on, `alternatives` are other accepted queries, `dialect` is what
the golds are written in (sqlite, mysql, postgres, …; unknown when left out), `evidence` is what one must know to
understand the question (BIRD's external knowledge; every prompt shows it), `id` defaults to the row's number. Of
several rows with one id the first keeps it, the next are called `<id>#2`, `<id>#3`; `id_notes` says so.
The bundled training rows leave `context` out; it is filled from their domain's DDL.

Sources: `ko_text2sql:test|dev|train` (bundled), a path or bundled name as in `quantlab.paths.find_source`,
`hf:owner/name[/config]:split` through the datasets library, or a published benchmark on disk, as in
`quantlab.sql.adapters` (`spider:/data/spider:dev`). The book's data on the hub are read by their adapter, with or
without its name in front. Every complaint names the file and the line or row.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from quantlab.errors import DataError, MachineError
from quantlab.paths import DATA, find_source, nearest
from quantlab.sql import adapters
from quantlab.textfile import json_lines

_REQUIRED = ("db_id", "question", "answer")
_KNOWN = frozenset({*_REQUIRED, "id", "context", "database", "alternatives", "dialect"})
KO_TEXT2SQL = "ko_text2sql"  # the bundled rows, and the adapter of those that they are modelled on:
BOOK = "shangrilar/ko_text2sql"  # on the hub
_ALIASES = {"postgresql": "postgres", "mariadb": "mysql", "sqlite3": "sqlite"}

Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Item:
    """One question. `extra` holds the row's other columns (db, tables, level, kind, …)."""

    id: str
    db_id: str
    context: str
    question: str
    answer: str
    database: Path | None = None
    alternatives: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""  # of the golds, "" when unknown
    shared_id: str = ""  # the id that the data give to this row and to others, "" where it is the row's alone

    @property
    def golds(self) -> tuple[str, ...]:
        return (self.answer, *self.alternatives)

    @property
    def evidence(self) -> str:
        """What one must know to understand the question, without surrounding blanks; "" where there is nothing."""
        found = self.extra.get("evidence")
        return found.strip() if isinstance(found, str) else ""


@dataclass(frozen=True)
class BadRow:
    """A row that is no Item; `where` is "file:line"."""

    where: str
    reason: str


def load_items(source: str, limit: int | None = None, bad: list[BadRow] | None = None) -> list[Item]:
    """The rows of `source`; DataError for a row that lacks or garbles something, unless `bad` collects such rows.

    A `limit` takes that many rows at even distances, not the first ones: files are often sorted by database.
    """
    benchmark, rest = _benchmark(source)
    if benchmark:
        from quantlab.sql.adapters.schemas import Schemas

        with Schemas() as schemas:
            found = adapters.load(benchmark, rest, schemas)
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
        state.update(json.dumps(fields, ensure_ascii=True).encode() + b"\n")
    return state.hexdigest()[:16]


def parse_row(row: Any, where: str, folder: Path | None = None) -> Item:
    """One row as an Item; `where` ("file:line") opens every complaint."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    for name in _REQUIRED:
        if name not in row:
            raise DataError(f"{where}: no {name!r}", hint=f"the columns are {', '.join(row) or 'none'}")
    for name in ("question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where}: {name!r} must be text that is not empty")
    if not isinstance(row["db_id"], int | str):
        raise DataError(f"{where}: 'db_id' must be a number or a name")
    alternatives = row.get("alternatives") or ()
    if not isinstance(alternatives, list | tuple) or not all(isinstance(sql, str) for sql in alternatives):
        raise DataError(f"{where}: 'alternatives' must be a list of queries")
    check_evidence(row.get("evidence"), where)
    dialect = row.get("dialect") or ""
    if not isinstance(dialect, str):
        raise DataError(f"{where}: 'dialect' must be a name such as sqlite, mysql or postgres")
    return Item(
        id=_id_of(row, where),
        db_id=str(row["db_id"]),
        context=_context(row, where),
        question=row["question"],
        answer=row["answer"],
        database=_database(row, where, folder),
        alternatives=tuple(alternatives),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
        dialect=_ALIASES.get(dialect.strip().lower(), dialect.strip().lower()),
    )


def _id_of(row: Any, where: str) -> str:
    """A row's id: the one it has, else the number it stands at."""
    named = row.get("id") if isinstance(row, Mapping) else None
    return str(named) if named is not None else where.rpartition(":")[2]


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
    if name in adapters.ADAPTERS:
        return name, rest
    near = nearest(name, adapters.ADAPTERS)
    if near and "/" not in name and not Path(source).exists():
        raise DataError(f"no benchmark {name!r}: {source}", hint=f"did you mean {near}:{rest}?")
    return "", ""


def _bundled_name(source: str) -> str:
    """`ko_text2sql:test` is short for the bundled `ko_text2sql/test.jsonl`."""
    name, colon, split = source.partition(":")
    return f"{name}/{split}.jsonl" if name == KO_TEXT2SQL and colon else source


def check_evidence(found: Any, where: str) -> None:
    """It is text, blank text, null, or not there."""
    if found is None or isinstance(found, str):
        return
    kinds = {list: "a list", dict: "an object", bool: "true or false"}
    raise DataError(
        f"{where}: 'evidence' must be text, found {kinds.get(type(found), 'a number')}",
        hint="it is shown to models beside the question; leave it out where there is none",
    )


def _context(row: Mapping[str, Any], where: str) -> str:
    context = row.get("context")
    if isinstance(context, str) and context.strip():
        return context
    if "db" not in row or "tables" not in row:
        raise DataError(f"{where}: no 'context' (the DDL of the tables)")
    try:
        return _domain_ddl(str(row["db"]), tuple(row["tables"]))
    except (KeyError, TypeError, ValueError, OSError, DataError) as error:
        raise DataError(
            f"{where}: no 'context', and none can be made from 'db' and 'tables': {error}"
        ) from error


@functools.lru_cache(maxsize=4096)
def _domain_ddl(name: str, tables: tuple[str, ...]) -> str:
    return str(_domain(name).ddl(list(tables)))


@functools.lru_cache(maxsize=64)
def _domain(name: str) -> Any:
    from quantlab.data.domains import load_domain

    return load_domain(name)


def _database(row: Mapping[str, Any], where: str, folder: Path | None) -> Path | None:
    name = row.get("database")
    if name is None:
        return None
    if not isinstance(name, str):
        raise DataError(f"{where}: 'database' must be the path of a SQLite file")
    path = Path(name) if folder is None else folder / name
    if not path.is_file():
        raise DataError(f"{where}: no database {path}", hint="paths are relative to the file that names them")
    return path


@functools.lru_cache(maxsize=256)
def _database_digest(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hub_rows(source: str) -> list[tuple[str, Any]]:
    """Rows of a Hugging Face dataset, from the hub or its local cache."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MachineError(f"{source} needs the datasets library", hint="pip install datasets") from error
    name, config, split = parse_hub(source)
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises from half a dozen libraries
        raise DataError(
            f"cannot load {source}: {error}", hint="form: hf:owner/name[/config]:split"
        ) from error
    return [(f"{source}:{number}", row) for number, row in enumerate(dataset, start=1)]


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """`hf:owner/name/config:split` → (owner/name, config or None, split, "train" when left out)."""
    path, _, split = source.removeprefix("hf:").partition(":")
    parts = path.split("/")
    if not path or len(parts) > 3 or not all(parts):
        raise DataError(f"not a dataset name: {source}", hint="form: hf:owner/name[/config]:split")
    return "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None), split or "train"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
