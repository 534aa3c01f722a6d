"""Rows of one table: projections, look-ups, filters, distinct values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.facts import TableFacts, sample_value
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.predicates import Predicate
from tools.ko_text2sql.grammar.words import listed, quoted, sql_text


def select(
    columns: Sequence[Column],
    table: TableFacts,
    *conditions: str,
    joint: str = "AND",
    tail: str = "",
    distinct: bool = False,
) -> str:
    """SELECT [DISTINCT] columns FROM table [WHERE ...] [tail]."""
    names = ("DISTINCT " if distinct else "") + ", ".join(column.name for column in columns)
    where = f" WHERE {f' {joint} '.join(conditions)}" if conditions else ""
    return f"SELECT {names} FROM {table.name}{where}{' ' + tail if tail else ''}"


def _with(m: Maker, has: Callable[[TableFacts], object]) -> TableFacts | None:
    fitting = [table for table in m.facts.tables if table.shown and has(table)]
    return m.pick(fitting) if fitting else None


def project(m: Maker) -> Question | None:
    """Columns of all rows."""
    table = _with(m, lambda table: True)
    if table is None:
        return None
    columns = m.shown(table)
    names = listed(m.rng, [column.ko for column in columns])
    every = m.say(
        (
            "모든 {t}",
            "모든 {t}",
            "전체 {t}",
            "{t}",
            "등록된 [모든 |]{t}",
            "[각 |]{t}",
            "[DB에 |]있는 모든 {t}",
        ),
        t=table.ko,
    )
    whole = m.say("{e}[의 |의 | |들의 ]{c}", e=every, c=names)
    if m.chance(0.25):
        forms = (
            "{t} 테이블에서 {c:을/를} <모두> <보여>",
            "{t} 테이블의 {c} [컬럼을|열을|값을] <모두> <보여>",
            "{t}들의 {c:이/가} [필요해|필요합니다|필요해요]. <모두> <보여>",
            "{t}에는 어떤 {c:이/가} <있나>" if len(columns) == 1 else "{t}마다 {c:을/를} <보여>",
            "{t}마다 {c:을/를} <보여>",
        )
        return m.done(m.say(forms, t=table.ko, c=names), select(columns, table), table.name)
    return m.done(m.list_of(whole), select(columns, table), table.name)


def _filtered(m: Maker, table: TableFacts, predicate: Predicate) -> Question:
    columns = m.shown(table)
    if len(columns) == 1 and columns[0] is predicate.column and len(table.shown) > 1:
        columns = [m.pick([column for column in table.shown if column is not predicate.column])]
    columns = [c for c in columns if c is not predicate.column or c is table.label] or columns
    return m.done(m.rows(predicate.ko, table, columns), select(columns, table, predicate.sql()), table.name)


def filter_category(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.categories)
    return _filtered(m, table, predicates.category(m, m.pick(table.categories))) if table else None


def filter_number(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.numbers)
    return _filtered(m, table, predicates.number(m, m.pick(table.numbers))) if table else None


def filter_date(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.dates)
    return _filtered(m, table, predicates.date(m, m.pick(table.dates))) if table else None


def filter_flag(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.flags)
    return _filtered(m, table, predicates.flag(m, m.pick(table.flags))) if table else None


def filter_null(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.nullable)
    return _filtered(m, table, predicates.null(m, m.pick(table.nullable))) if table else None


def filter_like(m: Maker) -> Question | None:
    table = _with(m, lambda table: table.label)
    return _filtered(m, table, predicates.like(m, table.label)) if table and table.label else None


def value_kind(column: Column) -> str:
    """How Maker.value asks for a stored value: 얼마, 언제 or 무엇."""
    return {"number": "stored", "date": "date"}.get(column.role, "other")


def lookup(m: Maker) -> Question | None:
    """A column of the row with a given label."""
    table = _with(m, lambda table: table.label and len(table.shown) > 1)
    if table is None or table.label is None:
        return None
    label, value = table.label, sample_value(m.facts, m.rng, table.label)
    count = 1 if m.chance(0.85) else 2
    columns = m.some([column for column in table.shown if column is not label], count)
    names = listed(m.rng, [column.ko for column in columns])
    forms = (
        "{q}의 {c}",
        "{q}의 {c}",
        "{t} {q}의 {c}",
        "{q} {t}의 {c}",
        "{l:이/가} {q}인 {t}의 {c}",
        "{l:이/가} {q}인 {t}의 {c}",
        "{q:이라는/라는} {t}의 {c}",
    )
    noun = m.say(forms, q=quoted(m.rng, value), t=table.ko, l=label.ko, c=names)
    kind = value_kind(columns[0]) if len(columns) == 1 else "other"
    question = m.value(noun, kind, columns[0].unit)
    verb = columns[0].verb
    if kind == "date" and verb and verb[-1] in "된한" and m.chance(0.3):
        past = "되었" if verb[-1] == "된" else "했"
        said = (
            f"{{q:은/는}} 언제 {{v}}{past}[나요?|어?|습니까?|지?|는지 알려줘]",
            f"{{t}} {{q:은/는}} 언제 {{v}}{past}[나요?|어?|습니까?|는지 알려주세요]",
        )
        question = m.say(said, q=quoted(m.rng, value), v=verb[:-1], t=table.ko)
    return m.done(question, select(columns, table, f"{label.name} = {sql_text(value)}"), table.name)


def _joined(m: Maker, table: TableFacts, first: Predicate, second: Predicate, joint: str) -> str:
    """Both conditions as one modifier."""
    slots = {
        "a": first.ko,
        "b": second.ko,
        "t": table.ko,
        "h": first.linked("고" if joint == "AND" else "거나"),
    }
    if joint == "OR":
        return m.say(("{h} {b}", "{h} {b}", "{h} 또는 {b}", "{h}, {b}", "{a} {t} 또는 {b}"), **slots)
    if m.chance(0.25):
        return m.say(("{a} {t} [중|중에서|가운데] {b}", "{a}, 그리고 {b}", "{h} 그러면서 {b}"), **slots)
    return m.say(("{h} {b}", "{h} {b}", "{h}, {b}", "{h} 동시에 {b}", "{h} 또한 {b}"), **slots)


def _filter_two(m: Maker, joint: str) -> Question | None:
    table = _with(m, lambda table: len(table.shown) + len(table.flags) > 2)
    pair = predicates.both(m, table) if table else None
    if table is None or pair is None:
        return None
    first, second = pair
    columns = m.shown(table)
    columns = [column for column in columns if column not in (first.column, second.column)] or [
        table.label or columns[0]
    ]
    sql = select(columns, table, first.sql(), second.sql(), joint=joint)
    return m.done(m.rows(_joined(m, table, first, second, joint), table, columns), sql, table.name)


def filter_and(m: Maker) -> Question | None:
    return _filter_two(m, "AND")


def filter_or(m: Maker) -> Question | None:
    return _filter_two(m, "OR")


def joined_predicates(
    m: Maker, table: TableFacts, joint: str, avoid: Column | None = None
) -> tuple[str, str] | None:
    """Two conditions as (Korean modifier, SQL)."""
    pair = predicates.both(m, table, avoid)
    if pair is None:
        return None
    first, second = pair
    return _joined(m, table, first, second, joint), f"{first.sql()} {joint} {second.sql()}"


def distinct(m: Maker) -> Question | None:
    """The different values of a column."""
    table = _with(m, lambda table: table.groups)
    if table is None:
        return None
    column = m.pick(table.groups)
    predicate = predicates.any_of(m, table, column) if m.chance(0.25) else None
    adnominal = predicate.ko if predicate else ""
    forms = (
        "{a} {t}의 {c} 종류를 <모두> <보여>",
        "{a} {t}의 {c:을/를} 중복 없이 <모두> <보여>",
        "{a} {t}의 {c:을/를} 중복 없이 <보여>",
        "{a} {t}에는 어떤 {c:이/가} <있나>",
        "{a} {t}의 {c:은/는} 어떤 종류가 <있나>",
        "{a} {t}의 서로 다른 {c:을/를} <모두> <보여>",
        "{a} {t}의 서로 다른 {c:은/는} <무엇>",
        "{a} {t} {c}의 종류",
        "{a} {t}의 {c} 목록을 중복을 제거해서 <보여>",
        "{a} {t}에 어떤 {c:이/가} 있는지 [한 번씩만|중복 없이] <보여>",
    )
    question = m.lead(m.say(forms, a=adnominal, t=table.ko, c=column.ko), table)
    conditions = [predicate.sql()] if predicate else []
    return m.done(question, select([column], table, *conditions, distinct=True), table.name)
