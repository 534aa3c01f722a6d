"""Where one SQL statement ends in a text that goes on with something else.

`scan` reads from the statement's first word and respects quotes, comments and parentheses. It stops at the first
semicolon; else at what no statement has at its top level: a code fence, a closing tag or chat marker, a bracket that
closes nothing, the quote that the statement was put into, a heading, a rule, a table row, a line that is plainly
prose; else at the end.

Two things inside a statement are no part of it and are reported as gaps: lines of Korean commentary between two
clauses, and the `>` of a quoted block. Blanks that SQLite does not know (no-break, ideographic, zero-width) are
reported too, outside quotes. Not covered: dollar quotes, backslash escapes, nested comments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KEYWORD = (
    r"(?:SELECT\b|VALUES\s*\(|WITH\s+(?:RECURSIVE\s+)?[\w\"`\[\]]+\s*(?:\([^()]*\)\s*)?AS\s*(?:(?:NOT\s+)?MATERIALIZED\s*)?\("
    r"|INSERT\s+(?:OR\s+\w+\s+)?INTO\b|UPDATE\s+\S+\s+SET\b|DELETE\s+FROM\b|REPLACE\s+INTO\b|ALTER\s+TABLE\b"
    r"|ATTACH\s+(?:DATABASE\b|['\"])|PRAGMA\s+\w|EXPLAIN\s+(?:QUERY\s+PLAN\s+)?(?:SELECT|WITH|INSERT|UPDATE|DELETE)\b"
    r"|VACUUM\s*(?:;|$|INTO\b)|(?:CREATE|DROP)\s+(?:(?!a\b|the\b)\w+\s+)?(?:TABLE|VIEW|INDEX|TRIGGER)\b)"
)

# What tokenizers write around a sequence, when special tokens are not skipped or were learned as text.
START_MARKERS = ("<s>", "<pad>", "<|im_start|>", "<|begin_of_text|>")
END_MARKERS = (
    "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<eos>", "<end_of_turn>",
    "[EOS]",
)  # fmt: skip

_WORD = re.compile(r"[^\W\d]\w*")
_RUN = re.compile(r"[ \t\r0-9,.=*+%]+")  # blanks and signs that only matter as the last one
# A line that starts with one of these goes on with the statement before it.
_CONTINUES = frozenset(
    _WORD.findall(
        """SELECT FROM WHERE GROUP ORDER HAVING LIMIT OFFSET JOIN LEFT RIGHT INNER OUTER FULL CROSS NATURAL ON USING
        AND OR NOT UNION INTERSECT EXCEPT ALL AS WITH RECURSIVE CASE WHEN THEN ELSE END IN IS LIKE BETWEEN EXISTS
        DESC ASC VALUES SET INTO BY DISTINCT OVER PARTITION WINDOW FILTER COLLATE NULLS ROWS RANGE GLOB ESCAPE FOR""",
    )
)
# A statement cannot end with one of these, so the next line belongs to it whatever it looks like.
_WANTS_MORE = _CONTINUES - {"END", "DESC", "ASC", "ALL", "ROWS"}
_CLAUSES = frozenset(
    re.findall(r"\w+", "FROM WHERE GROUP ORDER HAVING LIMIT JOIN LEFT RIGHT INNER CROSS FULL UNION AND OR")
)

_PROSE_LINE = re.compile(
    r"[ \t]*(?:[^\x00-\x7f\s]|[-*>][ \t]|[0-9]+[.)][ \t]|\*\*|[A-Za-z][\w ]*:[ \t]*\r?$"
    r"|[A-Za-z][\w']*(?:[:,.!][ \t]+[A-Za-z가-힣]|[ \t]+(?P<second>[A-Za-z가-힣]\w*)))"
)
_BOUNDARY_LINE = re.compile(r"[ \t]*(?:#|~~~|'''|\"\"\"|\|(?!\|)|\+[-=+]{2,})")
_RULE_LINE = re.compile(r"[ \t]*([-*_=])\1{2,}\s*$")
_STATEMENT_LINE = re.compile(rf"[ \t]*{KEYWORD}")
# Korean words and nothing that SQL is written with.
_COMMENTARY = re.compile(r"[ \t]*(?:[(*>-]+[ \t]*)?[가-힣][^;'\"`=<>]*$")
_QUOTED_LINE = re.compile(r"[ \t]*>[ \t]?")
_MARKUP = re.compile("|".join(["</[a-z]", r"<\|", *map(re.escape, START_MARKERS)]), re.IGNORECASE)
_ODD_BLANK = re.compile("[\u00a0\u1680\u2000-\u200d\u202f\u205f\u2060\u3000\ufeff]")
WRAPPERS = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "「": "」", "『": "』", "（": "）"}


@dataclass(frozen=True)
class End:
    """`stop` is the offset behind the statement; `complete`: a semicolon ended it, and belongs to it.

    `gaps` are (start, stop) of what stands inside without belonging to it, `blanks` the offsets of odd blanks.
    `pending`: more text could still show that the statement goes on. `open`: it ended within quotes or a comment.
    """

    stop: int
    complete: bool
    gaps: tuple[tuple[int, int], ...] = ()
    blanks: tuple[int, ...] = ()
    pending: bool = False
    open: bool = False


def scan(text: str, start: int, limit: int | None = None) -> End:
    """The end of the statement whose first word is at `start`, at most `limit`."""
    return _Scanner(text, start, len(text) if limit is None else limit).run()


def cut_out(text: str, start: int, end: End) -> tuple[str, tuple[tuple[int, str], ...]]:
    """(the statement without its gaps and with plain blanks, the gaps as (offset in the statement, text))."""
    pieces: list[str] = []
    inside: list[tuple[int, str]] = []
    at, length = start, 0
    cuts = [(low, high, "") for low, high in end.gaps] + [(at, at + 1, " ") for at in end.blanks]
    for low, high, instead in sorted(cuts):
        pieces.append(text[at:low] + instead)
        length += len(pieces[-1])
        if not instead:
            inside.append((length, text[low:high]))
        at = high
    return "".join([*pieces, text[at : end.stop]]).rstrip(), tuple(inside)


class _Scanner:
    def __init__(self, text: str, start: int, limit: int) -> None:
        self.text, self.start, self.at, self.limit = text, start, start, limit
        before = text[text.rfind("\n", 0, start) + 1 : start]
        self.in_cell = "|" in before
        self.quoted = before.lstrip().startswith(">")
        self.closer = WRAPPERS.get(before[-1:], "")
        self.depth, self.last = 0, ""  # parentheses that are open; the last word or sign, folded
        self.gaps: list[tuple[int, int]] = []
        self.blanks: list[int] = []
        self.open = False

    def run(self) -> End:
        text = self.text
        while self.at < self.limit:
            char = text[self.at]
            if self._closes(char) or self._foreign(char):
                return self._end()
            if char in "'\"`[":
                self._skip_quoted("]" if char == "[" else char)
            elif text.startswith("--", self.at):
                self.at = min(_line_end(text, self.at), self.limit)
            elif text.startswith("/*", self.at):
                close = text.find("*/", self.at + 2, self.limit)
                self.at, self.open = (self.limit, True) if close < 0 else (close + 2, False)
            elif char == ";":
                self.at += 1
                return self._end(complete=True)
            elif char == "\n":
                found = self._next_line()
                if found is not None:
                    return found
            elif word := _WORD.match(text, self.at, self.limit):
                self.at, self.last = word.end(), word.group().upper()
            elif run := _RUN.match(text, self.at, self.limit):
                self.at, self.last = run.end(), run.group().strip()[-1:] or self.last
            else:
                self._sign(char)
        return self._end()

    def _end(self, complete: bool = False, pending: bool = False) -> End:
        return End(self.at, complete, tuple(self.gaps), tuple(self.blanks), pending, self.open)

    def _sign(self, char: str) -> None:
        self.depth += (char == "(") - (char == ")")
        if _ODD_BLANK.match(char):
            self.blanks.append(self.at)
        elif not char.isspace():
            self.last = char
        self.at += 1

    def _closes(self, char: str) -> bool:
        """Whether `char` closes what the statement was put into; before a blank or sign it opens a name or literal."""
        return (
            char == self.closer and self.at > self.start and self.text[self.at - 1] not in " \t\r\n(,.=<>|+"
        )

    def _foreign(self, char: str) -> bool:
        """What no statement has at its top level."""
        if char == "；" or (self.depth == 0 and char in ")]}"):
            return True
        if char == "`" and self.text.startswith("```", self.at):
            return True
        if char == "|" and self.in_cell and self.depth == 0:
            return "||" not in (self.text[self.at : self.at + 2], self.text[self.at - 1 : self.at + 1])
        return char == "<" and _MARKUP.match(self.text, self.at, self.limit) is not None

    def _skip_quoted(self, close: str) -> None:
        """Past the quoted part; a doubled quote stands for itself; unclosed: the end."""
        found = self.text.find(close, self.at + 1, self.limit)
        doubles = close != "]" and not close == self.closer == "`"  # `SELECT a FROM `t`` in Markdown
        while found >= 0 and doubles and self.text.startswith(close, found + 1) and found + 1 < self.limit:
            found = self.text.find(close, found + 2, self.limit)
        self.at, self.open = (self.limit, True) if found < 0 else (found + 1, False)
        self.last = "'"

    def _next_line(self) -> End | None:
        """At a line break: go on behind it (and behind what is no part of the statement), or the end."""
        if self.in_cell:
            return self._end()
        begin = self.at + 1
        if self.quoted and (mark := _QUOTED_LINE.match(self.text, begin, self.limit)):
            self.gaps.append(mark.span())
            begin = mark.end()
        line = self.text[begin : min(_line_end(self.text, begin), self.limit)]
        if _BOUNDARY_LINE.match(line):
            return self._end()
        if _RULE_LINE.match(line) and not self._is_clause(begin + len(line) + 1):
            return self._end()
        if self.depth == 0 and self.last not in _WANTS_MORE:
            if self._is_next_statement(line):
                return self._end()
            if self.last not in tuple(",(=<>+-*/|.%") and _is_prose(line):
                resumes, pending = self._behind_commentary(begin)
                if resumes is None:
                    return self._end(pending=pending)
                self.gaps.append((begin, resumes))
                begin = resumes
        self.at = begin
        return None

    def _is_next_statement(self, line: str) -> bool:
        """Whether the line starts in upper case what began in lower case: "Select all names" was a sentence then."""
        first = _WORD.match(self.text, self.start)
        sentence = first is not None and first.group() in ("Select", "select")
        return sentence and _STATEMENT_LINE.match(line) is not None

    def _behind_commentary(self, begin: int) -> tuple[int | None, bool]:
        """(where the statement goes on behind up to three lines of commentary, or None; whether that is open)."""
        for _ in range(3):
            end = min(_line_end(self.text, begin), self.limit)
            line = self.text[begin:end].strip()
            coming = end == len(self.text)  # the line may not be all there yet
            if not _COMMENTARY.match(line) or (len(line.split()) < 2 and not coming):
                return None, coming and _second_word_is_open(line)
            if end >= self.limit:
                return None, coming
            begin = end + 1
            if re.fullmatch(r"[ \t]*\w*", self.text[begin:]):
                return None, True  # the word that decides may not be all there yet
            if self._is_clause(begin):
                return begin, False
        return None, False

    def _is_clause(self, begin: int) -> bool:
        """Whether a line starts like a clause: FROM and from, but not From, which starts a sentence."""
        word = _WORD.match(self.text[begin : self.limit].lstrip(" \t\r\n"))
        return word is not None and word.group().upper() in _CLAUSES and not word.group().istitle()


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _second_word_is_open(line: str) -> bool:
    """Whether a line ends within the word that tells a sentence from an alias: `p JO` may become `p JOIN`."""
    found = _PROSE_LINE.match(line)
    return found is not None and found.group("second") is not None and found.end() == len(line)


def _is_prose(line: str) -> bool:
    word = _WORD.match(line.lstrip())
    if word is not None and word.group().upper() in _CONTINUES:
        return False
    found = _PROSE_LINE.match(line)
    return found is not None and (found.group("second") or "") not in _CONTINUES
