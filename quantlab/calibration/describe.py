"""What calibration rows look like: in which scripts they are, how much is code or SQL, how much special tokens.

Told from characters and lines alone, so that it costs nothing and works for any model: a script is not a language, and
lines that look like code may be prose about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

SCRIPTS: Mapping[str, Sequence[tuple[int, int]]] = {
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)),
    "Kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Han": ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F),
              (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
}  # fmt: skip
_TYPES = (
    r"(?:TINY|SMALL|BIG)?INT(?:EGER)?|TEXT|(?:VAR)?CHAR|REAL|DOUBLE|NUMERIC|DECIMAL|DATE(?:TIME)?|TIMESTAMP|"
    r"BOOL(?:EAN)?"
)
_SQL = re.compile(
    r"\s*(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|DROP|WITH|FROM|WHERE|(?:\w+ )?JOIN|GROUP BY|ORDER BY|"
    r"HAVING|LIMIT|VALUES|UNION|PRIMARY KEY|FOREIGN KEY)\b|[Ss]elect\b.*\b[Ff]rom\b|"
    rf"\s*[\"`\[]?\w+[\"`\]]?\s+(?:{_TYPES})\b"
)
_CODE = re.compile(
    r"\s*(?:def |class |import |from \S+ import |return\b|for \(|if \(|while \(|#include|//|/\*|elif |except|try:|"
    r"else:|(?:const|let|var|fn|func|function|public|private|static|use|package|struct|enum|impl) )|"
    r".*(?:[{};]|\):|=>|->)\s*$"
)


def scripts(text: str) -> dict[str, float]:
    """Shares of the characters that are not white space: by script, digits, other letters, signs."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if not character.isspace():
            counts[_script(character)] += count
    total = max(sum(counts.values()), 1)
    return {name: counts[name] / total for name in (*SCRIPTS, "digits", "other letters", "signs")}


def code_like(text: str) -> dict[str, float]:
    """Shares of the characters that stand in lines that look like SQL, or like code in some other language."""
    sizes = Counter({"SQL": 0, "code": 0})
    lines = text.split("\n")
    for line in lines:
        if _SQL.match(line[:400]):
            sizes["SQL"] += len(line)
        elif _CODE.match(line[:400]):
            sizes["code"] += len(line)
    total = max(sum(map(len, lines)), 1)
    return {name: size / total for name, size in sizes.items()}


def _script(character: str) -> str:
    number = ord(character)
    for name, ranges in SCRIPTS.items():
        if any(first <= number <= last for first, last in ranges):
            return name
    return "digits" if character.isdigit() else "other letters" if character.isalpha() else "signs"
