"""Taking the first complete SQL statement out of what a model wrote.

A model asked for SQL writes SQL, or a code fence, or Korean or English prose around it, or goes on with the
next question. `extract` finds where a statement starts and where it ends, respecting quotes, comments and
parentheses, and reports what was cut on both sides, so that "learned SQL" and "learned to stop" can be told
apart.

Where it starts: inside the first code fence that holds a statement, else at the first line that starts with
a statement keyword, else at the first keyword in the text (upper case preferred, as prose says "select"
too). Where it ends: at the first semicolon outside quotes and comments; else at a code fence, a heading
(`###`), an end-of-sequence marker, a parenthesis that closes nothing, or a line that is plainly prose; else
at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What tokenizers write around a sequence, when special tokens are not skipped or were learned as text.
START_MARKERS = ("<s>", "<pad>", "<|im_start|>", "<|begin_of_text|>")
END_MARKERS = (
    "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<eos>", "<end_of_turn>",
    "[EOS]",
)  # fmt: skip

_STATEMENT = (
    r"(?:SELECT\b|VALUES\s*\(|WITH\s+(?:RECURSIVE\s+)?[\w\"`\[\]]+\s*(?:\([^()]*\)\s*)?AS\b|INSERT\s+(?:OR\s+\w+\s+)?INTO\b"
    r"|UPDATE\s+\S+\s+SET\b|DELETE\s+FROM\b|REPLACE\s+INTO\b|ALTER\s+TABLE\b|ATTACH\b|PRAGMA\b|EXPLAIN\b|VACUUM\b"
    r"|(?:CREATE|DROP)\s+(?:\w+\s+)?(?:TABLE|VIEW|INDEX|TRIGGER)\b)"
)
_MARKER = "|".join(re.escape(marker) for marker in START_MARKERS)
_AT_LINE_START = re.compile(rf"^(?:{_MARKER}|[ \t(>])*(?={_STATEMENT})", re.IGNORECASE | re.MULTILINE)
_UPPER_ANYWHERE = re.compile(rf"(?<![\w가-힣]){_STATEMENT}")
_SELECT_ANYWHERE = re.compile(rf"(?<![\w가-힣]){_STATEMENT}", re.IGNORECASE)
_FENCE = re.compile(r"```[ \t]*(?:sql|sqlite|mysql|postgresql|SQL)?[ \t]*\r?\n?")

# A line that starts with one of these goes on with the statement before it.
_CONTINUES = frozenset(
    re.findall(
        r"\w+",
        """SELECT FROM WHERE GROUP ORDER HAVING LIMIT OFFSET JOIN LEFT RIGHT INNER OUTER FULL CROSS NATURAL ON USING
        AND OR NOT UNION INTERSECT EXCEPT ALL AS WITH RECURSIVE CASE WHEN THEN ELSE END IN IS LIKE BETWEEN EXISTS
        DESC ASC VALUES SET INTO BY DISTINCT OVER PARTITION WINDOW FILTER COLLATE NULLS ROWS RANGE GLOB ESCAPE FOR""",
    )
)
# A statement cannot end with one of these, so the next line belongs to it whatever it looks like.
_WANTS_MORE = _CONTINUES - {"END", "DESC", "ASC", "ALL", "ROWS"}
_PROSE_LINE = re.compile(
    r"[ \t]*(?:[가-힣]|[-*>][ \t]|[0-9]+\.[ \t]|[A-Za-z][\w']*[:,.!]?[ \t]+[A-Za-z가-힣])"
)


@dataclass(frozen=True)
class Extraction:
    """`statement` keeps its semicolon, and is empty when there was none. `complete`: a semicolon ended it."""

    statement: str
    before: str = ""
    after: str = ""
    complete: bool = False


def extract(text: str) -> Extraction:
    """The first complete statement of `text`, and what was cut before and after it."""
    end = _marker(text)
    body, tail = text[:end], text[end:]
    start = _start(body)
    if start is None:
        return Extraction("", before=body, after=tail)
    stop, complete = scan(body, start)
    statement = body[start:stop].strip()
    return Extraction(statement, body[:start], body[stop:] + tail, complete)


def statement_end(text: str) -> int | None:
    """Offset where the first statement certainly ends, or None while more text could still belong to it.

    The test of whether generation may stop: a semicolon, or a heading, fence or prose after the statement.
    """
    end = _marker(text)
    start = _start(text[:end])
    if start is None:
        return None
    stop, complete = scan(text[:end], start)
    if complete:
        return stop
    line = _AT_LINE_START.search(text)  # a keyword inside prose may be no statement yet: wait for more
    return stop if stop < len(text) and line is not None and line.end() == start else None


def rest_is_nothing(after: str) -> bool:
    """Whether what follows a statement is only blanks, an end marker or the closing of a code fence."""
    for marker in END_MARKERS + START_MARKERS:
        after = after.replace(marker, "")
    return after.strip().strip("`").strip() == ""


def _marker(text: str) -> int:
    """Offset of the first end-of-sequence marker, else the end of the text."""
    return min((at for marker in END_MARKERS if (at := text.find(marker)) >= 0), default=len(text))


def _start(text: str) -> int | None:
    line = _AT_LINE_START.search(text)
    fence = _FENCE.search(text)
    inside = _AT_LINE_START.search(text, fence.end()) if fence is not None else None
    if fence is not None and inside is not None:
        if line is not None and line.end() < fence.start():
            stop, complete = scan(text, line.end())
            if complete and stop <= fence.start():
                return line.end()
        return inside.end()
    if line is not None:
        return line.end()
    anywhere = _UPPER_ANYWHERE.search(text) or _SELECT_ANYWHERE.search(text)
    return anywhere.start() if anywhere is not None else None


def scan(text: str, start: int) -> tuple[int, bool]:
    """(offset where the statement ends, whether a semicolon ended it); the semicolon belongs to the statement."""
    at, depth, last_word = start, 0, ""
    while at < len(text):
        char = text[at]
        if char in "'\"`":
            if text.startswith("```", at):
                return at, False
            at, last_word = _closing(text, at, char), ""
        elif char == "[":
            at, last_word = _closing(text, at, "]"), ""
        elif text.startswith("--", at):
            at = _line_end(text, at)
        elif text.startswith("/*", at):
            close = text.find("*/", at + 2)
            at = len(text) if close < 0 else close + 2
        elif char == ";":
            return at + 1, True
        elif char == "\n" and _prose_follows(text, at, depth, last_word):
            return at, False
        elif char.isalpha() or char == "_":
            word = _WORD.match(text, at)
            assert word is not None
            at, last_word = word.end(), word.group().upper()
        elif char == ")" and depth == 0:
            return at, False
        else:
            depth += (char == "(") - (char == ")")
            if not char.isspace():
                last_word = char
            at += 1
    return len(text), False


_WORD = re.compile(r"[^\W\d]\w*")


def _closing(text: str, at: int, quote: str) -> int:
    """Offset behind the quoted part that opens at `at`; a doubled quote stands for itself; unclosed: the end."""
    close = text.find(quote, at + 1)
    while close >= 0 and quote != "]" and text.startswith(quote, close + 1):
        close = text.find(quote, close + 2)
    return len(text) if close < 0 else close + 1


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _prose_follows(text: str, newline: int, depth: int, last_word: str) -> bool:
    """Whether the line behind `newline` is a heading or prose instead of more of the statement."""
    line = text[newline + 1 : _line_end(text, newline + 1)]
    if line.lstrip().startswith("#"):
        return True
    if depth > 0 or last_word in _WANTS_MORE or (last_word and last_word in ",(=<>+-*/|.%"):
        return False
    word = _WORD.match(line.lstrip())
    if word is not None and word.group().upper() in _CONTINUES:
        return False
    return _PROSE_LINE.match(line) is not None
