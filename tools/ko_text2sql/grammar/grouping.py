"""GROUP BY on one table: counts and aggregates per category or year, HAVING, the largest group."""

from __future__ import annotations

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.facts import TableFacts, bounds, number_literal
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.nouns import (
    COMPARED,
    GROUP_NUMBER,
    aggregate_noun,
    aggregate_of,
    aggregate_of_table,
    compared_count,
    count_noun,
    extremes,
    group_question,
    year_of,
)
from tools.ko_text2sql.grammar.words import counted, number_text


def _grouped(m: Maker, numbers: bool = False) -> tuple[TableFacts, Column] | None:
    fitting = [table for table in m.facts.tables if table.groups and (table.numbers or not numbers)]
    if not fitting:
        return None
    table = m.pick(fitting)
    return table, m.pick(table.groups)


def _where(m: Maker, table: TableFacts, avoid: Column, share: float) -> tuple[str, str]:
    predicate = predicates.any_of(m, table, avoid) if m.chance(share) else None
    return (predicate.ko, f" WHERE {predicate.sql()}") if predicate else ("", "")


def group_count(m: Maker) -> Question | None:
    """Rows per category."""
    chosen = _grouped(m)
    if chosen is None:
        return None
    table, group = chosen
    adnominal, where = _where(m, table, group, 0.3)
    question = m.lead(group_question(m, group.ko, adnominal, table), table)
    return m.done(
        question, f"SELECT {group.name}, COUNT(*) FROM {table.name}{where} GROUP BY {group.name}", table.name
    )


def group_aggregate(m: Maker) -> Question | None:
    """An aggregate per category."""
    chosen = _grouped(m, numbers=True)
    if chosen is None:
        return None
    table, group = chosen
    function, column = aggregate_of(m, table)
    adnominal, where = _where(m, table, group, 0.25)
    noun = aggregate_of_table(m, table, function, column, bool(adnominal))
    if not adnominal and m.chance(0.25):
        noun = aggregate_noun(m, function, column)
        whose = m.say(("{t}의", "{t}들의", "{t} 테이블에서"), t=table.ko)
        question = f"{whose} {group_question(m, group.ko, '', table, noun)}"
    else:
        question = m.lead(group_question(m, group.ko, adnominal, table, noun), table)
    sql = f"SELECT {group.name}, {function}({column.name}) FROM {table.name}{where} GROUP BY {group.name}"
    return m.done(question, sql, table.name)


def group_year(m: Maker) -> Question | None:
    """Rows, or an aggregate, per year (or month) of a date."""
    fitting = [table for table in m.facts.tables if table.dates]
    if not fitting:
        return None
    table = m.pick(fitting)
    date = m.pick(table.dates)
    monthly = m.chance(0.2)
    year = f"strftime('{'%Y-%m' if monthly else '%Y'}', {date.name})"
    name = year_of(date).replace("연도", "연월") if monthly else year_of(date)
    adnominal, where = _where(m, table, date, 0.2)
    if date.nullable:
        where += f"{' AND' if where else ' WHERE'} {date.name} IS NOT NULL"
    if table.numbers and m.chance(0.3):
        function, column = aggregate_of(m, table)
        noun, projection = (
            aggregate_of_table(m, table, function, column, bool(adnominal)),
            f"{function}({column.name})",
        )
        question = group_question(m, name, adnominal, table, noun)
    else:
        question, projection = group_question(m, name, adnominal, table), "COUNT(*)"
    return m.done(
        question, f"SELECT {year}, {projection} FROM {table.name}{where} GROUP BY {year}", table.name
    )


def group_ordered(m: Maker) -> Question | None:
    """Rows or an aggregate per category, ordered by it."""
    chosen = _grouped(m)
    if chosen is None:
        return None
    table, group = chosen
    descending = m.chance(0.7)
    if table.numbers and m.chance(0.5):
        function, column = aggregate_of(m, table, ("AVG", "SUM", "MAX"))
        noun, expression = aggregate_of_table(m, table, function, column), f"{function}({column.name})"
        high, low = extremes(function, column)
    else:
        noun, expression, high, low = count_noun(m, table), "COUNT(*)", "많은", "적은"
    slots = {
        "g": group.ko,
        "n": noun,
        "adj": high if descending else low,
        "way": "내림차순" if descending else "오름차순",
    }
    forms = (
        "{g}별 {n:을/를} {adj} 순으로 <보여>",
        "{g}별 {n:을/를} {way}으로 [정렬해|정렬하여|] <보여>",
        "{g}별 {n:을/를} {adj} 순서대로 <보여>",
        "{g:과/와} {n:을/를} {n:이/가} {adj} 순으로 <보여>",
        "{n:이/가} {adj} 순으로 {g:과/와} {n:을/를} <보여>",
        "각 {g}의 {n:을/를} 구해서 {adj} {g}부터 <보여>",
        "{g}별로 {n:을/를} 구하고 {way}으로 [정렬하시오|정렬해 줘|정렬해 주세요|정렬해줘].",
    )
    sql = (
        f"SELECT {group.name}, {expression} FROM {table.name} GROUP BY {group.name} "
        f"ORDER BY {expression} {'DESC' if descending else 'ASC'}"
    )
    return m.done(m.lead(m.say(forms, **slots).replace("별별", "별"), table), sql, table.name)


def group_top(m: Maker) -> Question | None:
    """The category with the most rows or the largest aggregate."""
    chosen = _grouped(m)
    if chosen is None:
        return None
    table, group = chosen
    descending = m.chance(0.75)
    adnominal, where = _where(m, table, group, 0.25)
    if table.numbers and m.chance(0.45):
        function, column = aggregate_of(m, table, ("AVG", "AVG", "SUM"))
        noun, expression = (
            aggregate_of_table(m, table, function, column, bool(adnominal)),
            f"{function}({column.name})",
        )
        high, low = extremes(function, column)
        counts = False
    else:
        noun, expression, high, low, counts = count_noun(m, table), "COUNT(*)", "많은", "적은", True
    slots = {
        "g": group.ko,
        "n": f"{adnominal} {noun}".strip(),
        "adj": high if descending else low,
        "t": f"{adnominal} {table.ko}".strip(),
    }
    forms = [
        "{n:이/가} <가장> {adj} {g:은/는} <무엇>",
        "{n:이/가} <가장> {adj} {g:을/를} [하나만 |]<보여>",
        "{n:이/가} <가장> {adj} {g:이/가} <무엇>",
        "{n:이/가} <가장> {adj} {g}",
        "{g} <중> {n:이/가} <가장> {adj} 것은 <무엇>",
        "{n:이/가} <가장> {adj} {g:이/가} <궁금>.",
        "{g}별로 봤을 때 {n:이/가} <가장> {adj} {g:은/는} <무엇>",
    ]
    if counts:
        forms += [
            "{t:이/가} <가장> {adj} {g:은/는} <무엇>",
            "{t:이/가} <가장> {adj} {g:을/를} <보여>",
            "{t:이/가} <가장> {adj} {g:은/는}?",
        ]
    sql = (
        f"SELECT {group.name} FROM {table.name}{where} GROUP BY {group.name} "
        f"ORDER BY {expression} {'DESC' if descending else 'ASC'} LIMIT 1"
    )
    return m.done(m.lead(m.say(forms, **slots).replace("별별", "별"), table), sql, table.name)


def group_having(m: Maker) -> Question | None:
    """Categories whose count or aggregate passes a threshold."""
    chosen = _grouped(m)
    if chosen is None:
        return None
    table, group = chosen
    if table.numbers and m.chance(0.45):
        function, column = aggregate_of(m, table, ("AVG", "AVG", "AVG", "MAX"))
        operator = m.pick((">=", ">", "<=", "<"))
        low, high, step = bounds(column)
        share = 0.3 + 0.2 * m.rng.random() if function == "AVG" else 0.75 + 0.2 * m.rng.random()
        literal = number_literal(_rounded(low + share * (high - low), step, high - low), step)
        noun = aggregate_of_table(m, table, function, column)
        expression, value = f"{function}({column.name})", number_text(m.rng, literal, column.unit)
        forms = ["{n:이/가} {v} {w}인 {g}", "{n:이/가} {v} {w}인 {g}", "{n} {v} {w}인 {g}"]
        if operator in "<>":
            adjective = extremes(function, column)[operator == "<"]
            forms += [f"{{n:이/가}} {{v}}보다 {adjective} {{g}}", f"{{n:이/가}} {{v}}보다 {adjective} {{g}}"]
        word = COMPARED[operator]
    else:
        values = max(1, len(m.facts.pools[id(group)]))
        operator, number, word = compared_count(m, table.table.rows / values)
        literal, expression, noun = str(number), "COUNT(*)", count_noun(m, table)
        value = counted(m.rng, number, table.counter)
        forms = [
            "{n:이/가} {v} {w}인 {g}",
            "{t:이/가} {v} {w}인 {g}",
            "{t:이/가} {v} {w} 있는 {g}",
            "{t:이/가} {v} {w} 속한 {g}",
        ]
        if operator == ">":
            forms += ["{t:이/가} {v}보다 많은 {g}", "{t:이/가} {v:을/를} 넘는 {g}"]
        if operator == "<":
            forms += ["{t:이/가} {v}보다 적은 {g}"]
    who = m.say(forms, n=noun, v=value, w=word, g=group.ko, t=table.ko)
    with_number = m.chance(0.3)
    if with_number:
        ends: tuple[str, ...] = (
            "{w:과/와} 그 {n:을/를} [함께|같이|] <보여>",
            "{w:과/와} {n:을/를} <보여>",
            "{w:과/와} {n:은/는} <무엇>",
        )
    else:
        ends = (
            "{w:을/를} <모두> <보여>",
            "{w:은/는} <무엇>",
            "{w}",
            "{w:을/를} <모두> <싶다>.",
            "{w:은/는} [무엇이|어떤 것이] <있나>",
            "{w:만/만} <보여>",
        )
    question = m.lead(m.say(ends, w=who, n=noun), table)
    projection = f"{group.name}, {expression}" if with_number else group.name
    sql = f"SELECT {projection} FROM {table.name} GROUP BY {group.name} HAVING {expression} {operator} {literal}"
    return m.done(question, sql, table.name)


def _rounded(value: float, step: float, span: float) -> float:
    """To about two digits of the span."""
    nice = step
    while nice * 10 <= span / 20:
        nice *= 10
    return round(value / nice) * nice


def group_two(m: Maker) -> Question | None:
    """Rows per pair of categories."""
    fitting = [table for table in m.facts.tables if len(table.groups) > 1]
    if not fitting:
        return None
    table = m.pick(fitting)
    first, second = m.some(table.groups, 2)
    group = m.say(("{a:과/와} {b}", "{a}, {b}", "{a} 및 {b}"), a=first.ko, b=second.ko)
    noun = count_noun(m, table)
    forms = GROUP_NUMBER[:7] + ("{g}별로 {n:이/가} 어떻게 되는지 <보여>", "{g} 조합별 {n:을/를} <구해>")
    names = f"{first.name}, {second.name}"
    question = m.lead(m.say(forms, g=group, n=noun).replace("별별", "별"), table)
    return m.done(question, f"SELECT {names}, COUNT(*) FROM {table.name} GROUP BY {names}", table.name)
