"""First, last, top n, and whole tables in order."""

from __future__ import annotations

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.facts import TableFacts
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.single import select
from tools.ko_text2sql.grammar.words import counted, listed

_LATEST = (
    "<가장> 최근에 {verb}",
    "<가장> 최근에 {verb}",
    "{c:이/가} <가장> 최근인",
    "{c:이/가} <가장> 늦은",
    "<가장> [나중에|늦게] {verb}",
)
_EARLIEST = (
    "<가장> 먼저 {verb}",
    "<가장> [오래전에|일찍] {verb}",
    "{c:이/가} <가장> 빠른",
    "{c:이/가} <가장> 이른",
    "{c:이/가} <가장> 오래된",
)
_MOST = (
    "{c:이/가} <가장> {adj}",
    "{c:이/가} <가장> {adj}",
    "<가장> {c:이/가} {adj}",
    "{c:이/가} [최고로|제일] {adj}",
)


def sortable(table: TableFacts) -> list[Column]:
    return table.numbers + table.dates


def adjective(column: Column, descending: bool) -> str:
    """높은, 낮은: how the column calls its large and small values."""
    if column.role == "date":
        return "최근인" if descending else "오래된"
    return (column.high or "높은") if descending else (column.low or "낮은")


def superlative(m: Maker, column: Column, descending: bool) -> str:
    """ "가격이 가장 비싼"."""
    if column.role == "date":
        forms: tuple[str, ...] = _LATEST if descending else _EARLIEST
        if not column.verb:
            forms = tuple(form for form in forms if "{verb}" not in form)
        return m.say(forms, c=column.ko, verb=column.verb or "")
    return m.say(_MOST[: 3 if m.chance(0.8) else 4], c=column.ko, adj=adjective(column, descending))


def order_by(column: Column, descending: bool, alias: str = "") -> str:
    return f"ORDER BY {alias}{column.name} {'DESC' if descending else 'ASC'}"


def _conditions(
    m: Maker, table: TableFacts, column: Column, descending: bool, share: float
) -> tuple[str, list[str]]:
    """A modifier and its SQL, plus what keeps NULL out of the first places of an ascending order."""
    adnominal, conditions = "", []
    if m.chance(share):
        predicate = predicates.any_of(m, table, column)
        if predicate:
            adnominal, conditions = predicate.ko, [predicate.sql()]
    if not descending and column.nullable:
        conditions.append(f"{column.name} IS NOT NULL")
    return adnominal, conditions


def _pick(m: Maker) -> tuple[TableFacts, Column] | None:
    fitting = [table for table in m.facts.tables if table.label and sortable(table)]
    if not fitting:
        return None
    table = m.pick(fitting)
    return table, m.pick(sortable(table))


def top_one(m: Maker) -> Question | None:
    """The row with the largest or smallest value."""
    chosen = _pick(m)
    if chosen is None:
        return None
    table, column = chosen
    descending = m.chance(0.6)
    columns = [table.label] if table.label and m.chance(0.65) else m.shown(table, known=column)
    adnominal, conditions = _conditions(m, table, column, descending, 0.35)
    most = superlative(m, column, descending)
    names = listed(m.rng, [c.ko for c in columns])
    slots = {"a": adnominal, "s": most, "t": table.ko, "thing": "사람" if table.person else "것"}
    only_label = columns == [table.label]
    forms: tuple[str, ...] = ("{a} {t} [중|중에서|가운데] {s} {thing}", "{a} {t} [중|중에서|가운데] {s} {t}")
    if not adnominal:
        forms = (
            "{s} {t}",
            "{s} {t}",
            "{s} {t}",
            "{s} {t} [한 {u}|하나]",
            "{t} [중|중에서|가운데] {s} {thing}",
            "{t} 중 {s} {t}",
        )
    who = m.say(forms, u=table.counter, **slots)
    if only_label and m.chance(0.4):
        ends: tuple[str, ...] = (
            "{w:은/는} <무엇>",
            "{w:이/가} <무엇>",
            "{w:을/를} [하나만|] <보여>",
            "{w:은/는} 어떤 {t}<인가>",
            "{w:은/는}?",
        )
        if table.person:
            ends = (
                "{w:은/는} <누구>",
                "{w:이/가} <누구>",
                "{w:을/를} <보여>",
                "{w:은/는} 어떤 사람<인가>",
                "{w:은/는}?",
            )
        question = m.say(ends, w=who, t=table.ko)
    else:
        question = m.value(m.say("{w}의 {c}", w=who, c=names), "other")
    sql = select(columns, table, *conditions, tail=f"{order_by(column, descending)} LIMIT 1")
    return m.done(m.lead(question, table), sql, table.name)


def nth(m: Maker) -> Question | None:
    """The second, third, ... row of an order."""
    chosen = _pick(m)
    if chosen is None or chosen[0].label is None:
        return None
    table, column = chosen
    descending = m.chance(0.7)
    place = m.pick((2, 2, 2, 3, 3, 4, 5))
    columns = m.shown(table, 1, known=column)
    _, conditions = _conditions(m, table, column, descending, 0.0)
    forms = ["{c:이/가} {k} 번째로 {adj}", "{k} 번째로 {c:이/가} {adj}"]
    if column.role == "date":
        forms = ["{c:이/가} {k} 번째로 {adj}"]
        forms += [f"{{k}} 번째로 {'최근에' if descending else '먼저'} {{verb}}"] if column.verb else []
    word = adjective(column, descending) if column.role == "number" else "늦은" if descending else "빠른"
    who = m.say(forms, c=column.ko, k=("두", "세", "네", "다섯")[place - 2], adj=word, verb=column.verb)
    question = m.value(f"{who} {m.of(table, columns[0].ko)}", "other")
    tail = f"{order_by(column, descending)} LIMIT 1 OFFSET {place - 1}"
    return m.done(m.lead(question, table), select(columns, table, *conditions, tail=tail), table.name)


def top_n(m: Maker) -> Question | None:
    """The first n rows of an order."""
    chosen = _pick(m)
    if chosen is None:
        return None
    table, column = chosen
    descending = m.chance(0.62)
    count = m.pick((2, 3, 3, 3, 4, 5, 5, 5, 7, 10))
    columns = m.shown(table, 1 if m.chance(0.7) else 2, known=column)
    adnominal, conditions = _conditions(m, table, column, descending, 0.25)
    slots = {
        "a": adnominal,
        "s": superlative(m, column, descending),
        "t": table.ko,
        "n": counted(m.rng, count, table.counter),
        "c": listed(m.rng, [c.ko for c in columns]),
        "o": column.ko,
        "adj": adjective(column, descending),
        "way": "내림차순" if descending else "오름차순",
        "side": "상위" if descending else "하위",
        "num": str(count),
    }
    forms = [
        "{a} {t} 중 {s} {n}의 {c:을/를} <보여>",
        "{a} {t} [중에서|가운데] {s} {t} {n}의 {c:을/를} <보여>",
        "{a} {t:을/를} {o:이/가} {adj} 순[으로|서대로] {n}만 [골라|뽑아] {c:을/를} <보여>",
        "{a} {t:을/를} {o} {way}으로 정렬했을 때 처음 {n}의 {c:을/를} <보여>",
        "{a} {t} {c:을/를} {o:이/가} {adj} 순으로 {n}만 <보여>",
        "{a} {t} 중 {s} {n}의 {c:은/는} <무엇>",
    ]
    if not adnominal:
        forms += [
            "{s} {t} {n}의 {c:을/를} <보여>",
            "{s} {t} {n}의 {c:은/는} <무엇>",
            "{s} {n}의 {t} {c}",
            "{s} {t} {num}{u}의 {c:이/가} <궁금>.",
            "{o:이/가} {adj} 순으로 {t} {n}의 {c:을/를} <보여>",
            "{o:이/가} {adj} {t} TOP {num}의 {c}",
        ]
        if column.role == "number":
            forms += ["{o} 기준 {side} {n}의 {t} {c:을/를} <보여>", "{o} {side} {n} {t}의 {c:은/는} <무엇>"]
    question = m.say(forms, u=table.counter, **slots)
    sql = select(columns, table, *conditions, tail=f"{order_by(column, descending)} LIMIT {count}")
    return m.done(m.lead(question, table), sql, table.name)


def ordered(m: Maker) -> Question | None:
    """All rows (or those of a filter) in order."""
    chosen = _pick(m)
    if chosen is None:
        return None
    table, column = chosen
    descending = bool(column.nullable) or m.chance(0.55)  # NULL comes last when descending
    columns = m.shown(table)
    adnominal, conditions = _conditions(m, table, column, True, 0.35)
    slots = {
        "a": adnominal,
        "t": table.ko,
        "c": listed(m.rng, [c.ko for c in columns]),
        "o": column.ko,
        "adj": adjective(column, descending),
        "way": "내림차순" if descending else "오름차순",
        "thing": "사람" if table.person else "것",
    }
    forms = [
        "{a} {t}의 {c:을/를} {o:이/가} {adj} 순[으로|서대로] <보여>",
        "{a} {t}의 {c:을/를} {o} {way}으로 <보여>",
        "{a} {t}의 {c:을/를} {o} 기준 {way}으로 [정렬해|정렬하여|] <보여>",
        "{o:이/가} {adj} [{thing}부터|순서대로|순으로] {a} {t}의 {c:을/를} <보여>",
        "{a} {t:을/를} {o:이/가} {adj} 순으로 [정렬하고|정렬해서|나열할 때] {c:을/를} <보여>",
        "{a} {t} {c} 목록을 {o} {way}으로 <보여>",
        "{o} {way}으로 정렬한 {a} {t}의 {c}",
        "{a} {t:을/를} {o:이/가} {adj} {thing}부터 [차례대로|순서대로] {c:을/를} <보여>",
    ]
    if column.role == "date":
        words = "[최신순|최근 순]" if descending else "[오래된 순|날짜순|이른 순]"
        forms += [f"{{a}} {{t}}의 {{c:을/를}} {{o}} {words}으로 <보여>"] * 2
    return m.done(
        m.lead(m.say(forms, **slots), table),
        select(columns, table, *conditions, tail=order_by(column, descending)),
        table.name,
    )
