"""What the adapters share: the files of a benchmark as rows, each with the place it stands at.

Everything here was downloaded from somewhere, so it is read as data that may be broken or hostile: files, fields
and nesting are bounded, and a row that is not what it should be is a DataError that names it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from quantlab import textfile
from quantlab.errors import DataError, MachineError
from quantlab.paths import nearest
from quantlab.text2sql.data.benchmarks.base import RawRow

MAX_FILE_BYTES = 256 * 2**20  # the largest published question file has a tenth of that
MAX_FIELD = 100_000  # characters of a question, a query or a hint; the sandbox takes no longer query either
MAX_ROWS = 1_000_000


def split_source(rest: str, splits: Iterable[str], form: str) -> tuple[Path, str]:
    """`PATH[:SPLIT]` → (path, split or ""). A path that exists as it stands is never cut."""
    whole = Path(rest).expanduser()
    if rest and whole.exists():
        return whole, ""
    head, colon, split = rest.rpartition(":")
    path = Path(head).expanduser()
    known = tuple(splits)
    if colon and head and path.exists():
        if split in known:
            return path, split
        near = nearest(split, known)
        words = f"did you mean {near}?" if near else f"one of: {', '.join(known)}"
        raise DataError(f"{head} has no split {split!r}", hint=words)
    missing = head if split in known else rest
    raise DataError(f"no such file or folder: {missing or 'the path is empty'}", hint=f"form: {form}")


def first_existing(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_rows(path: Path, first: int = 1) -> list[RawRow]:
    """The rows of a .json (a list), .jsonl, .csv or .parquet file; ids are counted from `first`."""
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'this kind of'} files", hint=" ".join(readers))
    return reader(path, first)


def json_rows(path: Path, first: int = 1) -> list[RawRow]:
    """A file that holds one list of objects. Rows are named by their number, since JSON has no lines of its own."""
    value = textfile.parse_document(read_text(path), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of questions, found {_kind(value)}")
    return [
        RawRow(f"{path}:row {number}", str(number - 1 + first), row)
        for number, row in enumerate(value, start=1)
    ]


def jsonl_rows(path: Path, first: int = 1) -> list[RawRow]:
    """The rows of a JSON lines file, their ids counted from `first`."""
    lines = textfile.parse_json_lines(read_text(path), str(path))
    return [RawRow(f"{path}:{number}", str(at), row) for at, (number, row) in enumerate(lines, start=first)]


def csv_rows(path: Path, first: int = 1) -> list[RawRow]:
    """Rows of a CSV file with a header, as mappings; `where` names the line that a row starts on."""
    rows: list[RawRow] = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if not header:
            raise DataError(f"{path}:1: expected a header with the names of the columns")
        line = reader.line_num + 1
        for values in islice(reader, MAX_ROWS):
            where, line = f"{path}:{line}", reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(f"{where}: {len(values)} fields where the header names {len(header)}")
            rows.append(RawRow(where, str(len(rows) + first), dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error
    return rows


def parquet_rows(path: Path, first: int = 1) -> list[RawRow]:
    """Rows of a parquet file; MachineError without pyarrow."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MachineError(f"{path} needs pyarrow", hint="pip install pyarrow") from error
    _check_size(path)
    try:
        table = parquet.ParquetFile(path)
        if table.metadata.num_rows > MAX_ROWS:
            raise DataError(f"{path}: more than {MAX_ROWS} rows")
        values = table.read().to_pylist()
    except (
        OSError,
        ValueError,
        MemoryError,
        NotImplementedError,
    ) as error:  # pyarrow's own errors are of these kinds
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from error
    return [
        RawRow(f"{path}:row {number}", str(number - 1 + first), row)
        for number, row in enumerate(values, start=1)
    ]


def gold_lines(path: Path) -> list[str]:
    """The queries of a gold file, a line each: the query, then a tab and the database's name."""
    return [line.partition("\t")[0].strip() for line in read_text(path).split("\n") if line.strip()]


def read_text(path: Path) -> str:
    """A text file of bounded size; DataError for one that is no UTF-8, or a pointer to a file that was not fetched."""
    _check_size(path)
    text = textfile.read_text(path)
    if is_pointer(text[:64]):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    return text


def is_pointer(head: str) -> bool:
    return head.startswith("version https://git-lfs")


def take_mapping(row: RawRow) -> Mapping[str, Any]:
    if not isinstance(row.value, Mapping):
        raise DataError(f"{row.where}: expected an object, found {_kind(row.value)}")
    return row.value


def take_text(row: RawRow, name: str, *, empty: bool = False) -> str:
    """A column that must be text, of bounded length; `empty` lets a missing or null one through as ""."""
    values = take_mapping(row)
    if name not in values and not empty:
        columns = ", ".join(str(column) for column in values) or "none"
        raise DataError(f"{row.where}: no {name!r}", hint=f"the columns are {columns[:500]}")
    value = values.get(name)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {name!r} must be text, found {_kind(value)}")
    if len(value) > MAX_FIELD:
        raise DataError(f"{row.where}: {name!r} has {len(value)} characters, more than {MAX_FIELD}")
    if not value.strip() and not empty:
        raise DataError(f"{row.where}: {name!r} must be text that is not empty")
    return value


def tried(paths: Sequence[Path]) -> str:
    return "tried " + ", ".join(str(path) for path in paths)


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if size > MAX_FILE_BYTES:
        raise DataError(f"{path} has {size} bytes, more than the {MAX_FILE_BYTES} that are read")


def _kind(value: Any) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "nothing"}
    return names.get(type(value).__name__, type(value).__name__)
