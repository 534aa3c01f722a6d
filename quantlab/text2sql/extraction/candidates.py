"""Where a statement starts in what a model wrote.

Reasoning in `<think>` tags is passed over. Then the first place that reads like SQL is taken, in this order: a
statement that starts a line (behind a label, a bullet, a quote) and is complete before the first code fence with one;
the fences; other lines; the value of a JSON key such as "sql"; inside a line, upper case before lower case, as prose
says "select" too. What only might be SQL ("SELECT players") is taken when nothing better comes, a sentence
("Select the players.") never. A statement inside a comment is none.

Not covered: reasoning without tags, whose first statement is taken; SQL in the strings of a program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from quantlab.text2sql.extraction.statement import KEYWORD, START_MARKERS, End, cut_out, scan

MAX_TEXT = 200_000  # characters; a statement starts before that or not at all
MAX_PLACES = (
    16  # each is read to its end: text made to look like thousands of statements must not take minutes
)

_MARKER = "|".join(re.escape(marker) for marker in START_MARKERS)
_LABEL = (
    r"(?:SQL(?:ite)?|MySQL|Query|Answer|Output|Result|쿼리|정답|답변|답|출력|결과)"
    r"(?:[ \t]*(?:쿼리|문|query|statement))?[ \t]*\**[ \t]*[:：]"
)
# What may stand on a line before a statement that starts it. Possessive, so that a thousand "<s>" are read once.
_LEAD = (
    rf"(?:{_MARKER}|{_LABEL}|[ \t\u00a0\u3000(（>`*\"'“‘「『\ufeff]|[-•][ \t]|\d{{1,2}}[.)][ \t]|<[a-z_]{{1,20}}>"
    r"|\[/?[A-Z_]+\]|<\|\w+\|>|(?:sqlite|mysql|\w{1,20}=[#>])>?[ \t])*+"
)
_AT_LINE_START = re.compile(rf"^{_LEAD}(?={KEYWORD})", re.IGNORECASE | re.MULTILINE)
_UPPER_ANYWHERE = re.compile(rf"(?<![\w가-힣])(?={KEYWORD})")
_ANYWHERE = re.compile(rf"(?<![\w가-힣])(?={KEYWORD})", re.IGNORECASE)
_FENCE = re.compile(
    r"(?P<mark>(?<!`)`{3,}+|(?:^|(?<=\n))[ \t>]*~{3,})[ \t]*"
    rf"(?:(?!{KEYWORD})[^\s`]*[^\n`]*?(?:\n|\Z|(?=[ \t]{KEYWORD}))|(?={KEYWORD}))",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"/\*.*?(?P<close>\*/|\Z)", re.DOTALL)
_THINK = re.compile(r"<(?P<close>/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_KEY = re.compile(
    r"\"[^\"\n]{0,20}(?:sql|query|statement|answer|쿼리|정답|답)[^\"\n]{0,20}\"\s*:\s*\"", re.IGNORECASE
)
_VALUE_END = re.compile(r"(?<!\\)(?:\\\\)*(?P<quote>\")(?=\s*(?:[,}\]]|\Z))")
_SET_OPERATION = re.compile(r"\s*\)\s*(?:UNION|INTERSECT|EXCEPT|ORDER\s+BY|LIMIT)\b", re.IGNORECASE)

# How sentences speak of SELECT, and start with it.
_WORD = r"[^\W\d]\w*"
_NO_NAME = (
    r"(?:FROM|AS|WHERE|CASE|AND|OR|NOT|IS|IN|LIKE|BETWEEN|UNION|ORDER|GROUP|LIMIT|COLLATE|OVER|ON|JOIN|INNER"
    r"|LEFT)\b"
)
_THREE_WORDS = re.compile(
    rf"\s*(?:(?:DISTINCT|ALL)\s+)?(?:(?!{_NO_NAME}){_WORD}[ \t]+){{2}}(?!{_NO_NAME}){_WORD}", re.IGNORECASE
)
_OF_SENTENCES = re.compile(
    r"\s+(?:the|an|your|this|that|these|those|following|문[을은이]?|문으로|절[을은이]?|구문[을은이]?|쿼리[를은]?)\s",
    re.IGNORECASE,
)
_COLON = re.compile(r"[^'\"]*\w:(?:\s|$)")  # in front of any quotes: a literal may hold what it likes
_FROM = re.compile(r"\bFROM\s+", re.IGNORECASE)

Grade = Literal["sql", "perhaps", "prose"]


@dataclass(frozen=True)
class Place:
    """A statement: its first word's offset, its end; `value` is the JSON string it stands in, escaped."""

    start: int
    end: End
    starts_line: bool = True
    value: tuple[int, int] | None = None


def find(text: str, whole: bool = True, values: bool = True) -> Place | None:
    """The statement to take; with `whole` False more text is to come, and what is open may still be closed.

    `values` False: not in JSON strings.
    """
    for low, high in _spoken(text[:MAX_TEXT]):
        perhaps = None
        for place in islice(_places(text, low, high, whole, values), MAX_PLACES):
            written = cut_out(text, place.start, place.end)[0]
            grade = "sql" if place.value is not None else grade_of(written)
            if grade == "sql":
                return place
            if grade == "perhaps" and perhaps is None:
                perhaps = place
        if perhaps is not None:
            return perhaps
    return None


def grade_of(statement: str) -> Grade:
    """How much a candidate reads like SQL. SELECT alone is also a word that sentences start with."""
    match = re.match(r"[(\s]*(\w+)", statement)
    if match is None or match.group(1).upper() != "SELECT":
        return "sql"
    verb, rest = match.group(1), statement[match.end() :]
    if re.match(r"\s*(?:[,.:!?)\]};]|$)|[\"'`]\s", rest) or _OF_SENTENCES.match(rest):
        return "prose"
    if verb.istitle() and statement[-1] in ".:?!":
        return "prose"
    source = _FROM.search(rest)
    wordy = _THREE_WORDS.match(rest) or _COLON.match(rest)
    if not verb.isupper() and (wordy or (source is not None and _THREE_WORDS.match(rest, source.end()))):
        return "prose"
    names_nothing = re.match(rf"\s+{_WORD}", rest) is not None
    return "perhaps" if source is None and (wordy or names_nothing) else "sql"


def unescape(raw: str) -> str:
    """What a JSON string says; line breaks may stand in it as they are, and where it breaks the rules it stays raw."""
    try:
        return str(json.loads(f'"{raw}"', strict=False))
    except ValueError:
        return raw


def _spoken(text: str) -> Iterator[tuple[int, int]]:
    """The stretches outside of reasoning. A closing tag alone ends reasoning that the prompt opened."""
    at, opened = 0, False
    for tag in _THINK.finditer(text):
        closes = bool(tag.group("close"))
        if not closes and not opened:
            yield at, tag.start()
        opened, at = not closes, tag.end()
    if not opened:
        yield at, len(text)


def _places(text: str, low: int, high: int, whole: bool, values: bool) -> Iterator[Place]:
    """Statements that may be meant, the likeliest first."""
    hidden = [
        match.span()
        for match in _COMMENT.finditer(text, low, high)
        if match.group("close") or not whole  # while text is coming, an open comment may be closed yet
    ]

    def starts(pattern: re.Pattern[str], begin: int, end: int) -> Iterator[int]:
        for match in pattern.finditer(text[begin:end]):
            at = begin + match.end()
            if not any(a < at < b for a, b in hidden):
                yield at

    if values and text[low:high].lstrip().startswith(("{", "[{")):
        yield from _values(text, low, high)
    opening = _AT_LINE_START.match(text[low:high])
    if opening is not None:  # from the first word to the last, whatever its literals look like
        place = _read(text, low + opening.end(), high)
        if not place.end.open and not text[place.end.stop : high].strip():
            yield place
    fences = list(_fences(text, low, high))
    holding = (fence for fence in fences if next(starts(_AT_LINE_START, *fence[1:]), None) is not None)
    first = next(holding, None)
    if first is not None:
        for at in starts(_AT_LINE_START, low, first[0]):
            place = _read(text, at, high)
            if place.end.complete:
                yield place
        for _, begin, end in fences:
            for at in starts(_AT_LINE_START, begin, end):
                yield _read(text, at, end)
    for at in starts(_AT_LINE_START, low, high):
        yield _read(text, at, high)
    if values:
        yield from _values(text, low, high)
    for pattern in (_UPPER_ANYWHERE, _ANYWHERE):
        for at in starts(pattern, low, high):
            if not text[text.rfind("\n", 0, at) + 1 : at].lstrip().startswith("--"):
                yield replace(_read(text, at, high), starts_line=False)


def _read(text: str, start: int, limit: int) -> Place:
    end = scan(text, start, limit)
    if not text[:start].endswith("("):
        return Place(start, end)
    # (SELECT …) UNION (SELECT …): the parenthesis belongs to it
    if _SET_OPERATION.match(text, end.stop, limit):
        return Place(start - 1, scan(text, start - 1, limit))
    return Place(start, replace(end, pending=re.fullmatch(r"[)\s]*\w*", text[end.stop :]) is not None))


def _fences(text: str, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """(start of the fence, start and end of what it holds); an unclosed one holds the rest."""
    at = low
    while match := _FENCE.search(text, at, high):
        mark = match.group("mark").strip(" \t>")[:3]
        begin = match.end()
        if mark == "~~~":  # closes at a line start only, ~ being an operator
            mark, begin = "\n~~~", begin - 1
        close = text.find(mark, begin, high)
        yield match.start(), match.end(), max(close if close >= 0 else high, match.end())
        at = max(close + len(mark), match.end()) if close >= 0 else high


def _values(text: str, low: int, high: int) -> Iterator[Place]:
    """JSON strings under a telling key that hold a statement."""
    for key in islice(_KEY.finditer(text, low, high), MAX_PLACES):
        close = _VALUE_END.search(text, key.end(), high)
        stop = close.start("quote") if close is not None else high
        if find(unescape(text[key.end() : stop]), values=False) is not None:
            yield Place(key.end(), End(stop, False, pending=close is None), True, (key.end(), stop))
