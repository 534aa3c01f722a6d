"""Conditions on the columns of one table, as SQL and as a Korean modifier ("가격이 10000원 이상인").

이상/이하 and 이후/이전/까지 include the value that is named; 초과/미만, 넘는, 보다 and 전에 do not.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import forms
from tools.ko_text2sql.grammar.facts import (
    TableFacts,
    date_bounds,
    number_literal,
    sample_date,
    sample_number,
    sample_value,
    step_of,
)
from tools.ko_text2sql.grammar.maker import Maker
from tools.ko_text2sql.grammar.words import connective, date_text, number_text, quoted, sql_text


@dataclass(slots=True)
class Predicate:
    """`column rest` in SQL; `ko` modifies the noun; `event` when `ko` tells of something that happened."""

    column: Column
    rest: str
    ko: str
    event: bool = False

    def sql(self, alias: str = "") -> str:
        return f"{alias}{self.column.name} {self.rest}"

    def linked(self, ending: str) -> str:
        """`ko` as it stands before another modifier: 이고, 이거나."""
        return connective(self.ko, ending, self.event)


def number(m: Maker, column: Column, operator: str = "") -> Predicate:
    operator = operator or m.pick(
        (">=", ">=", ">=", "<=", "<=", ">", ">", "<", "<", "between", "between", "=")
    )
    step, unit = step_of(column), column.unit or ""
    said = forms.YEAR if column.ko.endswith("연도") else forms.NUMBER
    slots = {"c": column.ko, "high": column.high or "높은", "low": column.low or "낮은"}
    if operator == "between":
        first = number_literal(sample_number(m.rng, column, 0.05, 0.45), step)
        last = number_literal(sample_number(m.rng, column, 0.5, 0.95), step)
        if float(first) < float(last):
            texts = {"a": number_text(m.rng, first, unit), "b": number_text(m.rng, last, unit)}
            return Predicate(column, f"BETWEEN {first} AND {last}", m.say(said["between"], **slots, **texts))
        operator = ">="
    share = (0.0, 0.9) if operator == "=" else (0.05, 0.7) if operator[0] == ">" else (0.2, 0.9)
    literal = number_literal(sample_number(m.rng, column, *share), step)
    ko = m.say(said[operator], v=number_text(m.rng, literal, unit), **slots)
    return Predicate(column, f"{operator} {literal}", ko)


def category(m: Maker, column: Column) -> Predicate:
    value = sample_value(m.facts, m.rng, column)
    roll = m.rng.random()
    values = m.facts.pools[id(column)]
    if roll < 0.10 and len(values) > 2:
        return Predicate(
            column, f"<> {sql_text(value)}", m.say(forms.NOT, c=column.ko, q=quoted(m.rng, value))
        )
    if roll < 0.24 and len(values) > 2:
        first, second = m.some(values, 2)
        plain = m.chance(0.6) or isinstance(first, int)
        q, r = (f"{first}", f"{second}") if plain else (f"'{first}'", f"'{second}'")
        ko = m.say(forms.EITHER, c=column.ko, q=q, r=r, i="이")
        return Predicate(column, f"IN ({sql_text(first)}, {sql_text(second)})", ko)
    q = str(value) if m.chance(0.75) else quoted(m.rng, value)
    return Predicate(column, f"= {sql_text(value)}", m.say(forms.CATEGORY, c=column.ko, v=str(value), q=q))


def flag(m: Maker, column: Column, value: bool | None = None) -> Predicate:
    value = m.chance(0.65) if value is None else value
    if value:
        ko = column.true_ko or m.say("{c:이/가} 참인", c=column.ko)
    else:
        ko = column.false_ko or m.say("{c:이/가} 거짓인", c=column.ko)
    return Predicate(column, f"= {int(value)}", ko)


def null(m: Maker, column: Column, absent: bool | None = None) -> Predicate:
    absent = m.chance(0.65) if absent is None else absent
    ko = m.say(forms.NULL if absent else forms.NOT_NULL, c=column.ko)
    return Predicate(column, "IS NULL" if absent else "IS NOT NULL", ko)


def like(m: Maker, column: Column) -> Predicate:
    value = str(sample_value(m.facts, m.rng, column))
    words = value.split(" ")
    whole = [word for word in words if len(word) <= 3 and word != value]
    piece = m.pick(whole) if whole and m.chance(0.7) else m.pick((words[-1][:2], value[-2:], words[0][:2]))
    roll = m.rng.random()
    said: tuple[str, ...]
    if roll < 0.55:
        pattern, said = f"%{piece}%", forms.CONTAINS
    elif roll < 0.85:
        piece = words[0] if words[0] in whole and m.chance(0.4) else value[: m.pick((1, 1, 2))]
        pattern, said = f"{piece}%", forms.STARTS
    else:
        piece = value[-m.pick((1, 2)) :]
        pattern, said = f"%{piece}", forms.ENDS
    piece, pattern = piece.strip(), pattern.replace(" %", "%").replace("% ", "%")
    q = f"'{piece}'" if m.chance(0.8) else f'"{piece}"'
    return Predicate(column, f"LIKE {sql_text(pattern)}", m.say(said, c=column.ko, q=q))


def named(m: Maker, column: Column, value: str | int) -> Predicate:
    """The row whose label is `value`."""
    said = ("{c:이/가} {q}인", "{c:이/가} {q}인", "{q:이라는/라는} {c:을/를} 가진", "{c} {q}인")
    return Predicate(column, f"= {sql_text(value)}", m.say(said, c=column.ko, q=quoted(m.rng, value)))


def _last_day(year: int, month: int) -> int:
    following = datetime.date(year + month // 12, month % 12 + 1, 1)
    return (following - datetime.timedelta(days=1)).day


def date(m: Maker, column: Column, form: str = "") -> Predicate:
    form = form or m.pick(
        ("year", "year", "year", "month", "since", "since", "until", "before", "after", "between", "between")
    )
    day = sample_date(m.rng, column)
    verb = column.verb
    slots = {"c": column.ko, "y": str(day.year), "m": str(day.month), "verb": verb or ""}
    said = forms.DATE[form] if verb else tuple(text for text in forms.DATE[form] if "{verb}" not in text)
    said = said or ("{c:이/가} {d}보다 앞선",)
    chosen = m.pick(said)
    event = chosen.endswith("{verb}")
    first, last = date_bounds(column)
    by_year = m.chance(0.5) and last.year > first.year
    if form == "year":
        rest = f"BETWEEN '{day.year}-01-01' AND '{day.year}-12-31'"
    elif form == "month":
        ym = f"{day.year}-{day.month:02d}"
        rest = f"BETWEEN '{ym}-01' AND '{ym}-{_last_day(day.year, day.month):02d}'"
    elif form == "between":
        other = sample_date(m.rng, column)
        day, other = min(day, other), max(day, other)
        if by_year:
            slots |= {"d": f"{day.year}년", "e": f"{other.year}년"}
            day, other = datetime.date(day.year, 1, 1), datetime.date(other.year, 12, 31)
            if slots["d"] == slots["e"]:
                return date(m, column, "year")
        else:
            written = m.chance(0.6)
            slots |= {"d": date_text(day, written), "e": date_text(other, written)}
        rest = f"BETWEEN '{day}' AND '{other}'"
    else:
        if by_year:
            slots["d"] = f"{day.year}년"
            ends = form in ("until", "after")
            day = datetime.date(day.year, 12, 31) if ends else datetime.date(day.year, 1, 1)
        else:
            if m.chance(0.5):
                day = day.replace(day=1)
            slots["d"] = date_text(day, m.chance(0.6))
        operator = {"since": ">=", "until": "<=", "before": "<", "after": ">", "day": "="}[form]
        rest = f"{operator} '{day}'"
    return Predicate(column, rest, m.say(chosen, **slots), event)


_Maker = Callable[[Maker, Column], Predicate]


def any_of(m: Maker, table: TableFacts, *avoid: Column | None) -> Predicate | None:
    """A condition on any column of the table but those of `avoid`; None when there is nothing to ask about."""
    pools: tuple[tuple[_Maker, list[Column], float], ...] = (
        (category, table.categories, 3.0),
        (number, table.numbers, 3.0),
        (date, table.dates, 2.0),
        (flag, table.flags, 1.2),
        (null, table.nullable, 0.5),
        (like, [table.label] if table.label else [], 0.4),
    )
    live: list[tuple[_Maker, list[Column], float]] = []
    for make, columns, weight in pools:
        if left := [column for column in columns if not any(column is other for other in avoid)]:
            live.append((make, left, weight))
    if not live:
        return None
    chosen = m.rng.choices(live, weights=[weight for _, _, weight in live])[0]
    return chosen[0](m, m.pick(chosen[1]))


def both(m: Maker, table: TableFacts, avoid: Column | None = None) -> tuple[Predicate, Predicate] | None:
    """Two conditions on different columns."""
    first = any_of(m, table, avoid)
    second = any_of(m, table, avoid, first.column) if first else None
    return (first, second) if first and second else None
