"""A fixed clock for SQLite queries: every way to ask for the present time is written as one stated moment.

`date('now')`, `date()`, `strftime('%Y')` (which means now where the time is left out), CURRENT_DATE, CURRENT_TIME and
CURRENT_TIMESTAMP. The text is changed in these places alone; a query without any of them comes back as it is, and is
not even read. The modifiers 'localtime' and 'utc' after a replaced 'now' do nothing: the clock has no time zone.

Not covered: 'now' that the query computes or reads from a table; 'localtime' after other times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.tokens import Token, TokenType

CLOCK = "2024-07-01 12:00:00"

_MAY_ASK = re.compile(
    r"\bnow\b|\bcurrent_(?:date|time|timestamp)\b|\bstrftime\s*\("
    r"|\b(?:date|time|datetime|julianday|unixepoch)\s*\(\s*(?:\)|/\*|--)",
    re.IGNORECASE,
)
_FUNCTIONS = frozenset({"DATE", "TIME", "DATETIME", "JULIANDAY", "UNIXEPOCH", "STRFTIME", "TIMEDIFF"})
# Functions that may hand 'now' on to a date function around them.
_PASSING = frozenset({"", "COALESCE", "IFNULL", "IIF", "NULLIF", "MIN", "MAX"})
_QUOTED = frozenset({TokenType.STRING, TokenType.IDENTIFIER})
# After these a keyword is a name: of a table, a column, an alias.
_NAME_FOLLOWS = frozenset({"AS", "FROM", "JOIN", "INTO", "UPDATE", "TABLE", "."})
_OPERAND_ENDS = frozenset({")", "]", "END", "NULL"})
_OPERATORS = frozenset({"GLOB", "MATCH", "REGEXP"})  # which sqlglot's tokenizer has for names


def fix_clock(sql: str, clock: str = CLOCK) -> str:
    """`sql` with the present time written out; unchanged where it asks for none, or cannot be split into words."""
    if _MAY_ASK.search(sql) is None:
        return sql
    try:
        tokens = sqlglot.tokenize(sql, read="sqlite")
    except (SqlglotError, ValueError, IndexError, RecursionError):
        return sql
    pieces, at = [], 0
    for start, end, new in sorted(_edits(tokens, clock)):
        pieces += [sql[at:start], new]
        at = end
    return "".join([*pieces, sql[at:]])


def _edits(tokens: Sequence[Token], clock: str) -> list[tuple[int, int, str]]:
    """(start, end, new text) of each place to change."""
    words = {
        "CURRENT_DATE": f"'{clock[:10]}'",
        "CURRENT_TIME": f"'{clock[11:]}'",
        "CURRENT_TIMESTAMP": f"'{clock}'",
    }
    edits: list[tuple[int, int, str]] = []
    calls: list[_Call] = []
    for index, token in enumerate(tokens):
        name = token.text.upper()
        if token.token_type == TokenType.L_PAREN:
            if calls:
                calls[-1].seen(token)
            calls.append(_Call(_function_before(tokens, index)))
            continue
        if token.token_type == TokenType.R_PAREN and calls:
            edits += calls.pop().closed(token, clock)
            continue
        call = _date_call(calls)
        if calls:
            calls[-1].seen(token)
        if token.token_type in _QUOTED:
            if call is not None and _is_argument(tokens, index):
                edits += call.quoted(token, clock)
        elif name in words and _is_keyword(tokens, index):
            edits.append((token.start, token.end + 1, words[name]))
    return edits


class _Call:
    """Parentheses that are open, and the name of the function before them ("" for none)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commas = 0
        self.empty = True
        self.fixed = False

    def seen(self, token: Token) -> None:
        self.empty = False
        self.commas += token.token_type == TokenType.COMMA

    def quoted(self, token: Token, clock: str) -> list[tuple[int, int, str]]:
        """What becomes of a string among a date function's arguments."""
        word = token.text.lower()
        if word == "now" and not (self.name == "STRFTIME" and self.commas == 0):
            self.fixed = True
            return [(token.start, token.end + 1, f"'{clock}'")]
        if self.fixed and word in ("localtime", "utc"):
            return [(token.start, token.end + 1, "'+0 days'")]
        return []

    def closed(self, token: Token, clock: str) -> list[tuple[int, int, str]]:
        """What is put before the closing parenthesis: the time that was left out."""
        if self.name == "STRFTIME" and self.commas == 0 and not self.empty:
            return [(token.start, token.start, f", '{clock}'")]
        if self.name in _FUNCTIONS - {"STRFTIME", "TIMEDIFF"} and self.empty:
            return [(token.start, token.start, f"'{clock}'")]
        return []


def _date_call(calls: Sequence[_Call]) -> _Call | None:
    """The date function whose argument stands here, through parentheses and functions that hand values on."""
    for call in reversed(calls):
        if call.name in _FUNCTIONS:
            return call
        if call.name not in _PASSING:
            return None
    return None


def _is_argument(tokens: Sequence[Token], index: int) -> bool:
    """Whether the string at `index` is a whole argument, or a whole value of a CASE."""
    after = tokens[index + 1].text.upper() if index + 1 < len(tokens) else ""
    return tokens[index - 1].text.upper() in ("(", ",", "THEN", "ELSE") and after in (
        ")",
        ",",
        "WHEN",
        "ELSE",
        "END",
    )


def _function_before(tokens: Sequence[Token], index: int) -> str:
    """The name that makes the parenthesis at `index` a call; "" where there is none."""
    if index == 0:
        return ""
    before = tokens[index - 1]
    if before.token_type == TokenType.STRING or not re.fullmatch(r"\w+", before.text):
        return ""
    name = before.text.upper()
    is_column = index > 1 and tokens[index - 2].token_type == TokenType.DOT
    return "" if is_column else name


def _is_keyword(tokens: Sequence[Token], index: int) -> bool:
    """Whether CURRENT_DATE at `index` is a value and not the name of a table, a column or an alias."""
    if index == 0:
        return False
    before = tokens[index - 1]
    after = [token.text.upper() for token in tokens[index + 1 : index + 3]]
    if after[:1] in (["."], ["("]) or after == ["AS", "("]:
        return False  # of a column, no function of SQLite's, a common table expression
    if before.token_type in _QUOTED or before.token_type == TokenType.NUMBER:
        return False  # an alias without AS
    word = before.text.upper()
    if (before.token_type == TokenType.VAR and word not in _OPERATORS) or word in _OPERAND_ENDS:
        return False
    return word not in _NAME_FOLLOWS
