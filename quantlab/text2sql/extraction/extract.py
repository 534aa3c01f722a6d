"""Taking the first complete SQL statement out of what a model wrote.

A model asked for SQL writes SQL, or a code fence, or JSON, or Korean or English prose around it, or goes on with the
next question. `places` finds where a statement starts, `statement` reads to where it ends. What was cut on both
sides is reported, so that "learned SQL" and "learned to stop" can be told apart.

The statement is the text as it stands, with three exceptions: what `statement` reports as gaps is taken out, blanks
that SQLite does not know become plain ones, and a JSON string is unescaped. Nothing is repaired. Extracting from the
extracted statement gives the same statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from quantlab.text2sql.extraction.candidates import find, unescape
from quantlab.text2sql.extraction.statement import END_MARKERS, START_MARKERS, WRAPPERS, cut_out

_CLOSERS = " \t\r\n\\`~\"'*]}；" + "".join(WRAPPERS.values())


@dataclass(frozen=True)
class Extraction:
    """`statement` keeps its semicolon, and is empty when there was none. `complete`: a semicolon ended it.

    `inside` is what was cut out of the middle: (offset in `statement`, text). Put back, `before`, `statement` and
    `after` make up the text but for blanks (and but for the escapes of a JSON string).
    """

    statement: str
    before: str = ""
    after: str = ""
    complete: bool = False
    inside: tuple[tuple[int, str], ...] = ()


def extract(text: str) -> Extraction:
    """The first complete statement of `text`, and what was cut before and after it."""
    return _extract(text, values=True)


def _extract(text: str, values: bool) -> Extraction:
    stop = _marker(text)
    body, tail = text[:stop], text[stop:]
    found = find(body, values=values)
    if found is None:
        return Extraction("", before=body, after=tail)
    if found.value is not None:
        start, end = found.value
        inner = _extract(unescape(body[start:end]), values=False)
        return replace(inner, before=body[:start] + inner.before, after=inner.after + body[end:] + tail)
    statement, inside = cut_out(body, found.start, found.end)
    after = body[found.end.stop :] + tail
    return Extraction(statement, body[: found.start], after, found.end.complete, inside)


def statement_end(text: str) -> int | None:
    """Offset where the first statement certainly ends, or None while more text could still belong to it.

    The test of whether generation may stop: a semicolon, or a heading, fence or prose after the statement.
    """
    found = find(text[: _marker(text)], whole=False)
    if found is None or found.end.pending:
        return None
    if found.end.complete:
        return found.end.stop
    # a keyword inside prose may be no statement yet: wait for more
    return found.end.stop if found.end.stop < len(text) and found.starts_line else None


def rest_is_nothing(after: str) -> bool:
    """Whether what follows a statement is only blanks, an end marker or the closing of what it was put into."""
    for marker in END_MARKERS + START_MARKERS:
        after = after.replace(marker, "")
    return re.sub(r"</\w{1,20}>", "", after).strip(_CLOSERS) == ""


def _marker(text: str) -> int:
    """Offset of the first end-of-sequence marker, else the end of the text."""
    return min((at for marker in END_MARKERS if (at := text.find(marker)) >= 0), default=len(text))
