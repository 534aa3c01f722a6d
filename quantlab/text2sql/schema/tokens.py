"""The words of DDL: sqlglot's tokenizers, cut into statements, behind a cursor.

sqlglot joins some keywords into one token (FOREIGN KEY, DOUBLE PRECISION) and not others; here every word stands
alone. Column lists are read from these tokens and not through sqlglot's parser, because what datasets call DDL is
looser than any dialect: commas missing between foreign keys, columns without types, clauses of a database that
nobody names. SQLite's own reader is as lenient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.tokens import TokenType

from quantlab.text2sql.schema.schema import DIALECTS, SchemaError, shorten

MAX_DDL = 200_000  # characters
MAX_DEPTH = 60  # parentheses inside parentheses; the parser of expressions works by recursion

_STRINGS = frozenset(
    {
        TokenType.STRING, TokenType.NATIONAL_STRING, TokenType.RAW_STRING, TokenType.HEREDOC_STRING,
        TokenType.BYTE_STRING, TokenType.UNICODE_STRING,
    }
)  # fmt: skip
_OTHER_LITERALS = frozenset({TokenType.BIT_STRING, TokenType.HEX_STRING})
_WORD = re.compile(r"[^\W]\w*(?:[$#]\w*)*")

# Signs of a dialect; a backtick is one too, but Spider's SQLite files are full of them.
_SIGNS = {
    "mysql": re.compile(
        r"\b(?:AUTO_INCREMENT|UNSIGNED|ZEROFILL|ENGINE\s*=|TINYINT|MEDIUMINT|(?:LONG|MEDIUM|TINY)TEXT|FULLTEXT|KEY\s+`"
        r"|(?:(?<!AS )ENUM|SET)\s*\(\s*['\"]|CHARSET\b|CHARACTER\s+SET\b|ON\s+UPDATE\s+CURRENT_TIMESTAMP|COMMENT\s+'"
        r"|YEAR\s*\()",
        re.IGNORECASE,
    ),
    "postgres": re.compile(
        r"::|\b(?:(?:BIG|SMALL)?SERIAL|WITH(?:OUT)?\s+TIME\s+ZONE|TIMESTAMPTZ|BYTEA|JSONB|UUID|CHARACTER\s+VARYING"
        r"|BOOLEAN\s+(?:NOT\s+NULL\s+)?DEFAULT\s+(?:TRUE|FALSE)|AS\s+IDENTITY|NEXTVAL\s*\(|AS\s+ENUM|CREATE\s+DOMAIN"
        r"|DOUBLE\s+PRECISION|ALTER\s+TABLE\s+ONLY|\w+\s*\[\s*\])",
        re.IGNORECASE,
    ),
    "sqlite": re.compile(r"\b(?:AUTOINCREMENT|WITHOUT\s+ROWID|PRAGMA|VARCHAR2|NUMBER\s*\()", re.IGNORECASE),
}
_QUOTED_NAME = re.compile(r"(?:[(,]\s*|\bTABLE\s+)\"[^\"]*\"", re.IGNORECASE)


def guess_dialects(ddl: str) -> tuple[str, ...]:
    """The three dialects, likeliest first, by what is written in `ddl`."""
    text = re.sub(r"'(?:[^'\\]|''|\\.)*'", "''", ddl)  # what a comment or a default says is no sign
    found = {dialect: {sign.upper() for sign in signs.findall(text)} for dialect, signs in _SIGNS.items()}
    if not any(found.values()) and "`" in text and not _QUOTED_NAME.search(text):
        found["mysql"].add("`")
    return tuple(sorted(DIALECTS, key=lambda dialect: -len(found[dialect])))


@dataclass(frozen=True, slots=True)
class Token:
    """`kind`: word, name (in quotes), string, number, literal (b'1', x'00') or sign. Offsets into the DDL.

    `upper` is for comparing with keywords and signs; empty for what is quoted.
    """

    kind: str
    text: str
    start: int
    end: int  # of the last character
    upper: str = ""


def tokenize(ddl: str, dialect: str) -> list[Token]:
    """The tokens of `ddl`; SchemaError for an unclosed quote or comment."""
    try:
        found = sqlglot.tokenize(ddl, read=dialect)
    except (SqlglotError, ValueError, IndexError) as error:
        raise SchemaError(
            f"the DDL cannot be split into words as {dialect}: {shorten(str(error))}"
        ) from error
    tokens: list[Token] = []
    for token in found:
        kind = token.token_type
        if kind == TokenType.IDENTIFIER:
            tokens.append(Token("name", token.text, token.start, token.end))
        elif kind in _STRINGS:
            tokens.append(Token("string", token.text, token.start, token.end))
        elif kind == TokenType.NUMBER:
            tokens.append(Token("number", token.text, token.start, token.end))
        elif kind in _OTHER_LITERALS:
            tokens.append(Token("literal", token.text, token.start, token.end))
        else:
            tokens += _words(ddl, token.start, token.end)
    return tokens


def _words(ddl: str, start: int, end: int) -> list[Token]:
    """The words (or the one sign) in this stretch, as written there."""
    text = ddl[start : end + 1]
    words = list(_WORD.finditer(text))
    if not words:
        return [Token("sign", text, start, end, text)]
    return [
        Token("word", word.group(), start + word.start(), start + word.end() - 1, word.group().upper())
        for word in words
    ]


def split_statements(tokens: list[Token]) -> list[list[Token]]:
    """Tokens cut at semicolons, and before a CREATE TABLE or ALTER TABLE that follows without one."""
    statements: list[list[Token]] = [[]]
    depth = 0
    for at, token in enumerate(tokens):
        sign = token.upper
        if sign == ";":
            depth = 0
            statements.append([])
            continue
        if sign in ("CREATE", "ALTER") and depth <= 0 and statements[-1] and _makes_table(tokens, at):
            depth = 0
            statements.append([])
        depth += (sign == "(") - (sign == ")")
        statements[-1].append(token)
    return [statement for statement in statements if statement]


def _makes_table(tokens: list[Token], at: int) -> bool:
    """Whether CREATE … TABLE or ALTER TABLE stands at `at`."""
    if tokens[at].upper == "ALTER":
        return at + 1 < len(tokens) and tokens[at + 1].upper == "TABLE"
    return any(token.upper == "TABLE" for token in tokens[at + 1 : at + 4])


class Cursor:
    """Walks over the tokens of one statement. `ddl` is the text that their offsets belong to."""

    def __init__(self, tokens: list[Token], ddl: str) -> None:
        self.tokens, self.ddl, self.at = tokens, ddl, 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.tokens)

    def peek(self, ahead: int = 0) -> str:
        """The upper-case word or the sign that stands `ahead`; empty for anything else and past the end."""
        at = self.at + ahead
        return self.tokens[at].upper if at < len(self.tokens) else ""

    def next(self) -> Token | None:
        if self.done:
            return None
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, *words: str) -> bool:
        """Step over `words` if exactly these follow."""
        if any(self.peek(ahead) != word for ahead, word in enumerate(words)):
            return False
        self.at += len(words)
        return True

    def take_any(self, *words: str) -> bool:
        """Step over one of `words`."""
        return any(self.take(word) for word in words)

    def name(self) -> str | None:
        """A name, its schema or database left out; None where none stands here."""
        token = self._name_token()
        while token is not None and self.peek() == ".":
            self.at += 1
            token = self._name_token() or token
        return token.text if token is not None else None

    def _name_token(self) -> Token | None:
        if self.done or self.tokens[self.at].kind not in ("word", "name", "string"):
            return None
        return self.next()

    def group(self) -> list[Token] | None:
        """The tokens inside the parentheses that open here, without them; None where none open.

        SchemaError where they do not close or are nested too deeply.
        """
        if self.peek() != "(":
            return None
        start, depth = self.at + 1, 0
        while not self.done:
            sign = self.peek()
            depth += (sign == "(") - (sign == ")")
            if depth > MAX_DEPTH:
                raise SchemaError(f"parentheses are nested more than {MAX_DEPTH} deep")
            self.at += 1
            if depth == 0:
                return self.tokens[start : self.at - 1]
        raise SchemaError("a parenthesis is not closed")

    def text(self, tokens: list[Token]) -> str:
        """The DDL from the first to the last of `tokens`."""
        return self.ddl[tokens[0].start : tokens[-1].end + 1] if tokens else ""


def split_commas(tokens: list[Token]) -> list[list[Token]]:
    """Tokens cut at the commas outside parentheses and brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        sign = token.upper
        depth += (sign in ("(", "[")) - (sign in (")", "]"))
        if sign == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
