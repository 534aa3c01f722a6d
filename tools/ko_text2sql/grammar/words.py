"""Korean word forms: connective endings, counting words, numbers, dates and lists as people write them."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence

from tools.ko_text2sql.josa import josa

_NATIVE = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열")
_IRREGULAR = {"긴": "길", "먼": "멀", "단": "달", "가는": "가늘", "둥근": "둥글", "힘든": "힘들"}
_PAST = {
    "된": "되었",
    "한": "했",
    "난": "났",
    "온": "왔",
    "간": "갔",
    "진": "졌",
    "린": "렸",
    "긴": "겼",
    "친": "쳤",
    "운": "웠",
}


def _without_final(syllable: str) -> str:
    code = ord(syllable) - 0xAC00
    return chr(0xAC00 + code - code % 28)


def _with_final_bieup(syllable: str) -> str:
    return chr(ord(_without_final(syllable)) + 17)


def _has_final(syllable: str, final: int) -> bool:
    return "가" <= syllable <= "힣" and (ord(syllable) - 0xAC00) % 28 == final


def connective(adnominal: str, ending: str, past: bool = False) -> str:
    """The connective form of a modifier: ("가격이 비싼", "고") → "가격이 비싸고", ("소설인", "거나") → "소설이거나".

    `past` marks verbs that tell of an event: 출간된 → 출간되었고.
    """
    head, last = adnominal[:-1], adnominal[-1]
    word = adnominal.rsplit(" ", 1)[-1]
    if past and word in ("연", "간", "온"):
        return head + {"연": "열었", "간": "갔", "온": "왔"}[word] + ending
    if past and last in _PAST and len(word) > 1:
        return head + _PAST[last] + ending
    if last in "인의":
        return head + "이" + ending
    if word in _IRREGULAR:
        return adnominal[: -len(word)] + _IRREGULAR[word] + ending
    if last in "은는" and head:
        return head + ending
    if last == "운" and head and _has_final(head[-1], 0):  # 무거운 → 무겁고
        return head[:-1] + _with_final_bieup(head[-1]) + ending
    if _has_final(last, 4):
        return head + _without_final(last) + ending
    return adnominal + ending


def counted(rng: random.Random, count: int, counter: str) -> str:
    """`3권`, `세 권` or `3 권`."""
    roll = rng.random()
    if count <= 10 and roll < 0.3:
        return f"{_NATIVE[count]} {counter}"
    return f"{count} {counter}" if roll > 0.93 else f"{count}{counter}"


def number_text(rng: random.Random, literal: str, unit: str) -> str:
    """A number as it is written in a question: mostly the plain digits, sometimes 10,000 or 1만."""
    unit = unit or ""
    roll = rng.random()
    if len(literal) > 3 and literal.isdigit() and unit != "년":
        value = int(literal)
        if roll < 0.10 and value >= 10000 and value % 1000 == 0 and unit and unit[0] != "만":
            man, rest = divmod(value, 10000)
            text = f"{man}만" + (f" {rest // 1000}천" if rest else "")
            return f"{text}{' ' if rng.random() < 0.5 else ''}{unit}"
        if 0.10 <= roll < 0.25 and unit:
            return f"{value:,}{unit}"
    return f"{literal} {unit}" if unit and roll > 0.96 else f"{literal}{unit}"


def date_text(date: datetime.date, written: bool) -> str:
    """A day: 2020년 3월 1일 if `written` out, or 2020-03-01."""
    if written:
        return f"{date.year}년 {date.month}월 {date.day}일"
    return date.isoformat()


def listed(rng: random.Random, words: Sequence[str]) -> str:
    """제목과 가격 / 제목, 가격 / 제목 및 가격 / 제목, 가격, 평점."""
    if len(words) == 1:
        return words[0]
    roll = rng.random()
    last = words[-1]
    head = ", ".join(words[:-1])
    if roll < 0.55:
        return f"{josa(head, '과/와')} {last}"
    if roll < 0.70:
        return f"{head} 및 {last}"
    if roll < 0.80:
        return f"{head} 그리고 {last}" if len(words) == 2 else f"{head}, 그리고 {last}"
    return f"{head}, {last}"


def quoted(rng: random.Random, value: str | int) -> str:
    """A value in the quotes that people use around names, or bare."""
    if isinstance(value, int):
        return str(value)
    roll = rng.random()
    return f"'{value}'" if roll < 0.55 else f'"{value}"' if roll < 0.65 else value


def sql_text(value: str | int) -> str:
    """A value as an SQL literal."""
    if isinstance(value, int):
        return str(value)
    return "'" + value.replace("'", "''") + "'"
