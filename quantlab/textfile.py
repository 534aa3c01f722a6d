r"""Text files of other people: one way to read them, for text, JSON and JSON lines.

Files are UTF-8; byte-order marks at the start are dropped. What is not UTF-8 is refused with the encoding that it
looks like, the place of the first bad byte, and the command that converts it.

Lines of JSON end at `\n` (or `\r\n`) and nowhere else: U+2028, U+2029 and U+0085 may stand unescaped inside a JSON
string, so `str.splitlines()` would tear valid lines apart. Every complaint names the file and the line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.text_encodings import Guess, guess, guess_wide, is_damaged_utf8

PLACE = "{name}:{number}"
MARK = "\ufeff"


def read_text(path: Path, what: str = "") -> str:
    """The text of a UTF-8 file, its lines ended by newlines alone. `what` stands before the path in messages.

    Raises:
        DataError: no such file, or not UTF-8: what it looks like, where, and how to convert it.
    """
    return _decoded(path, what).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """The one JSON value that a file holds.

    Raises:
        DataError: it cannot be read, or is no JSON, naming the line.
    """
    return parse_document(_decoded(path), str(path))


def parse_document(text: str, name: str) -> Any:
    """The one JSON value that a text of several lines is. DataError naming the line for anything else."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON that can be read: {_plainly(error)}") from error


def json_lines(path: Path, place: str = PLACE) -> list[tuple[int, Any]]:
    """(line number, value) for every line of a JSON lines file that is not blank; see `parse_json_lines`."""
    text = _decoded(path)
    if "\n" not in text:  # a file of the old Mac, whose lines end at carriage returns
        text = text.replace("\r", "\n")
    return parse_json_lines(text, str(path), place)


def json_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """`json_lines` where every line is an object.

    Raises:
        DataError: it cannot be read, or a line is no JSON or no object.
    """
    rows = json_lines(path)
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}")
    return rows


def parse_json_lines(text: str, name: str, place: str = PLACE) -> list[tuple[int, Any]]:
    """(line number, value) for every line that is not blank. `place` is how messages write a name and a number.

    Raises:
        DataError: a line is not one JSON value, or is nested too deeply, or holds a number of thousands of digits.
    """
    return [
        (number, parse_json(line, place.format(name=name, number=number))) for number, line in lines_of(text)
    ]


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines between newlines, counted from 1, without blank ones and without byte-order marks at their starts,
    which stand where files with a mark were joined."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.lstrip(MARK)
        if line.strip():
            yield number, line


def parse_json(line: str, where: str) -> Any:
    """The JSON value that one line is. DataError, opened by `where`, for anything else."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}",
            hint="expected JSON lines: each line one whole JSON value",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read: {_plainly(error)}") from error


def _plainly(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    return str(error).partition("; use sys.")[0]  # which is advice for programs


def _decoded(path: Path, what: str = "") -> str:
    """The text as it stands, line ends included, without byte-order marks at its start."""
    opening = f"cannot read {what}{path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{opening}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(data, error, path, opening) from error
    if data.count(b"\x00") >= max(2, len(data) // 4):  # ASCII in UTF-16 is UTF-8, every other byte zero
        wide = guess_wide(data)
        if wide is not None:
            raise _looks_like(wide, data, data.index(b"\x00"), path, opening)
    return text.lstrip(MARK)


def _refusal(data: bytes, error: UnicodeDecodeError, path: Path, opening: str) -> DataError:
    """Why bytes are no UTF-8: cut off at the end, damaged in a few places, another encoding, or no text."""
    bad = error.start
    wide = guess_wide(data)
    if wide is not None:
        return _looks_like(wide, data, bad, path, opening)
    if error.reason == "unexpected end of data":
        other = "; if it is whole, it is in an encoding such as Windows-1252" if data[:bad].isascii() else ""
        return DataError(
            f"{opening}: it ends in the middle of a UTF-8 character ({_place(data, bad)}): a part is missing",
            hint=f"copy or download it again; head -c and split -b cut like this{other}",
        )
    if is_damaged_utf8(data, bad):
        return DataError(
            f"{opening}: it is UTF-8 but for a character that is cut, damaged or in another encoding "
            f"({_place(data, bad)})",
            hint=f"mend that line, or leave such bytes out: iconv -c -f UTF-8 -t UTF-8 {_from_to(path)}",
        )
    found = guess(data, bad)
    if found is None:
        return DataError(
            f"{opening}: not UTF-8, nor an encoding that can be told ({_place(data, bad)})",
            hint="is it a text file? expected text in UTF-8",
        )
    return _looks_like(found, data, bad, path, opening)


def _looks_like(found: Guess, data: bytes, bad: int, path: Path, opening: str) -> DataError:
    if not found.name:
        return DataError(
            f"{opening}: not text, it looks like {found.label} ({_place(data, bad)})",
            hint="expected text in UTF-8: unpack or export it first",
        )
    return DataError(
        f"{opening}: not UTF-8, it looks like {found.label} ({_place(data, bad)})",
        hint=f"convert it: iconv -f {found.name} -t UTF-8 {_from_to(path)}",
    )


def _place(data: bytes, bad: int) -> str:
    line_end = b"\n" if b"\n" in data else b"\r"
    return f"byte 0x{data[bad]:02x} at offset {bad}, line {data.count(line_end, 0, bad) + 1}"


def _from_to(path: Path) -> str:
    """The file and a new one beside it, of the same kind, as a shell takes them."""
    new = path.with_name(f"{path.stem}.utf8{path.suffix}")
    names = [f"./{file}" if str(file).startswith("-") else str(file) for file in (path, new)]
    return " > ".join(map(shlex.quote, names))
