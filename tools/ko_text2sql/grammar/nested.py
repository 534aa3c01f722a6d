"""Sub-queries: above the average, equal to the extreme, as another row, EXISTS, both of two categories."""

from __future__ import annotations

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.edges import pick_edge
from tools.ko_text2sql.grammar.facts import TableFacts, sample_value
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.words import quoted, sql_text


def _numbered(m: Maker, labelled: bool = False) -> tuple[TableFacts, Column] | None:
    fitting = [
        table for table in m.facts.tables if table.numbers and table.shown and (table.label or not labelled)
    ]
    if not fitting:
        return None
    table = m.pick(fitting)
    return table, m.pick(table.numbers)


def above_average(m: Maker) -> Question | None:
    """Rows above (or below) the average of all rows."""
    chosen = _numbered(m)
    if chosen is None:
        return None
    table, column = chosen
    above = m.chance(0.7)
    slots = {
        "c": column.ko,
        "t": table.ko,
        "adj": (column.high or "높은") if above else (column.low or "낮은"),
    }
    forms = [
        "{c:이/가} 평균보다 [더 |]{adj}",
        "{c:이/가} 전체 평균보다 {adj}",
        "{c:이/가} 평균 {c}보다 {adj}",
        "{c:이/가} 전체 {t}의 평균보다 {adj}",
        "평균보다 {c:이/가} {adj}",
        "전체 {t}의 평균 {c}보다 {c:이/가} {adj}",
    ]
    forms += (
        ["{c:이/가} 평균을 [넘는|초과하는]", "평균을 넘는 {c:을/를} 가진"]
        if above
        else ["{c:이/가} 평균 미만인", "{c:이/가} 평균에 못 미치는"]
    )
    adnominal = m.say(forms, **slots)
    condition = f"{column.name} {'>' if above else '<'} (SELECT AVG({column.name}) FROM {table.name})"
    own = predicates.any_of(m, table, column) if m.chance(0.2) else None
    if own:
        adnominal = f"{own.linked('고')} {adnominal}"
        condition = f"{own.sql()} AND {condition}"
    if m.chance(0.3):
        question, projection = m.count(adnominal, table), "COUNT(*)"
    else:
        columns = m.shown(table, known=column)
        question, projection = m.rows(adnominal, table, columns), ", ".join(c.name for c in columns)
    return m.done(question, f"SELECT {projection} FROM {table.name} WHERE {condition}", table.name)


def at_extreme(m: Maker) -> Question | None:
    """All rows whose value is the largest or smallest."""
    chosen = _numbered(m)
    if chosen is None:
        return None
    table, column = chosen
    largest = m.chance(0.6)
    word, best = ("최댓값", "최고") if largest else ("최솟값", "최저")
    slots = {"c": column.ko, "w": word, "b": best, "t": table.ko}
    forms = (
        "{c:이/가} {w:과/와} 같은",
        "{c:이/가} {w}인",
        "{c:이/가} 전체 {w:과/와} 같은",
        "{c:이/가} {b} {c:과/와} 같은",
        "{c:이/가} {t} 전체의 {w}인",
        "{b} {c:을/를} 기록한",
    )
    columns = m.shown(table, known=column)
    sql = (
        f"SELECT {', '.join(c.name for c in columns)} FROM {table.name} "
        f"WHERE {column.name} = (SELECT {'MAX' if largest else 'MIN'}({column.name}) FROM {table.name})"
    )
    return m.done(m.rows(m.say(forms, **slots), table, columns), sql, table.name)


def same_as(m: Maker) -> Question | None:
    """Rows of the same category as a named row."""
    fitting = [table for table in m.facts.tables if table.label and table.categories]
    if not fitting:
        return None
    table = m.pick(fitting)
    label, column = table.label, m.pick(table.categories)
    assert label is not None
    value = sample_value(m.facts, m.rng, label)
    text = sql_text(value)
    slots = {"q": quoted(m.rng, value), "c": column.ko, "t": table.ko}
    forms = (
        "{q:과/와} {c:이/가} 같은",
        "{q:과/와} 같은 {c}의",
        "{c:이/가} {q:과/와} 같은",
        "{c:이/가} {q}의 {c:과/와} 같은",
        "{q:과/와} {c:이/가} 동일한",
        "{q:과/와} 동일한 {c:을/를} 가진",
    )
    adnominal = m.say(forms, **slots)
    condition = f"{column.name} = (SELECT {column.name} FROM {table.name} WHERE {label.name} = {text})"
    if m.chance(0.35):
        adnominal = m.say(("{a} 다른", "{a} 나머지", "{q:을/를} 제외하고 {a}"), a=adnominal, q=slots["q"])
        condition += f" AND {label.name} <> {text}"
    if m.chance(0.2):
        return m.done(
            m.count(adnominal, table), f"SELECT COUNT(*) FROM {table.name} WHERE {condition}", table.name
        )
    columns = m.shown(table, known=column)
    sql = f"SELECT {', '.join(c.name for c in columns)} FROM {table.name} WHERE {condition}"
    return m.done(m.rows(adnominal, table, columns), sql, table.name)


def more_than_named(m: Maker) -> Question | None:
    """Rows whose number or date is beyond that of a named row."""
    fitting = [table for table in m.facts.tables if table.label and (table.numbers or table.dates)]
    if not fitting:
        return None
    table = m.pick(fitting)
    label = table.label
    assert label is not None
    value = sample_value(m.facts, m.rng, label)
    more = m.chance(0.65)
    slots = {"q": quoted(m.rng, value), "t": table.ko}
    if table.dates and (not table.numbers or m.chance(0.25)):
        column = m.pick(table.dates)
        forms = ["{c:이/가} {q}보다 {adj}", "{q}보다 {c:이/가} {adj}"]
        adjective = m.pick(("늦은", "나중인")) if more else m.pick(("빠른", "이른"))
        if column.verb:
            forms += ["{q}보다 {adv} {verb}"]
        slots |= {"adv": "나중에" if more else "먼저", "verb": column.verb}
    else:
        column = m.pick(table.numbers)
        forms = [
            "{q}보다 {c:이/가} [더 |]{adj}",
            "{c:이/가} {q}보다 [더 |]{adj}",
            "{t} {q}보다 {c:이/가} {adj}",
            "{q}의 {c}보다 {c:이/가} {adj}",
        ]
        adjective = (column.high or "높은") if more else (column.low or "낮은")
    adnominal = m.say(forms, c=column.ko, adj=adjective, **slots)
    other = f"SELECT {column.name} FROM {table.name} WHERE {label.name} = {sql_text(value)}"
    condition = f"{column.name} {'>' if more else '<'} ({other})"
    if m.chance(0.25):
        return m.done(
            m.count(adnominal, table), f"SELECT COUNT(*) FROM {table.name} WHERE {condition}", table.name
        )
    columns = m.shown(table, known=column)
    sql = f"SELECT {', '.join(c.name for c in columns)} FROM {table.name} WHERE {condition}"
    return m.done(m.rows(adnominal, table, columns), sql, table.name)


def exists(m: Maker) -> Question | None:
    """Parents with at least one child satisfying a condition (EXISTS), or with none (NOT EXISTS)."""
    edge = pick_edge(m)
    predicate = predicates.any_of(m, edge.child) if edge else None
    if edge is None or predicate is None:
        return None
    parent, child, label = edge.parent, edge.child, edge.parent.label
    assert label is not None
    some = m.chance(0.55)
    if some:
        forms = [
            "{p} {t:이/가} 한 {u:이라도/라도} 있는",
            "{p} {t:이/가} 적어도 한 {u} 있는",
            "{p} {t:이/가} 최소 한 {u} 있는",
        ]
    else:
        forms = ["{p} {t:이/가} 한 {u}도 없는", "{p} {t:이/가} 전혀 없는", "{p} {t:이/가} 없는"]
    if not child.person:
        forms.append("{p} {t:이/가} 하나라도 있는" if some else "{p} {t:이/가} 하나도 없는")
    adnominal = m.say(forms, p=predicate.ko, t=child.ko, u=child.counter)
    condition = (
        f"{'' if some else 'NOT '}EXISTS (SELECT 1 FROM {child.name} AS T2 "
        f"WHERE T2.{edge.column.name} = T1.{edge.key} AND {predicate.sql('T2.')})"
    )
    if m.chance(0.2):
        question, projection = m.count(adnominal, parent), "COUNT(*)"
    else:
        question, projection = m.rows(adnominal, parent, [label]), f"T1.{label.name}"
    return m.done(
        question, f"SELECT {projection} FROM {parent.name} AS T1 WHERE {condition}", child.name, parent.name
    )


def both_kinds(m: Maker) -> Question | None:
    """Parents that have children of two categories: two IN sub-queries."""
    edge = pick_edge(m)
    if edge is None or edge.parent.label is None or not edge.child.categories:
        return None
    parent, child = edge.parent, edge.child
    column = m.pick(child.categories)
    pool = m.facts.pools[id(column)]
    if len(pool) < 2 or parent.label is None:
        return None
    first, second = m.some(pool, 2)
    without = m.chance(0.3)
    slots = {"c": column.ko, "a": str(first), "b": str(second), "t": child.ko}
    forms: tuple[str, ...] = (
        "{c:이/가} {a}인 {t:과/와} {b}인 {t:이/가} 모두 있는",
        "{c:이/가} {a}인 {t:과/와} {c:이/가} {b}인 {t:이/가} 둘 다 있는",
        "{c:이/가} {a}인 {t:도/도} 있고 {b}인 {t:도/도} 있는",
    )
    if without:
        forms = (
            "{c:이/가} {a}인 {t:은/는} 있지만 {b}인 {t:은/는} 없는",
            "{c:이/가} {a}인 {t:이/가} 있으면서 {c:이/가} {b}인 {t:은/는} 없는",
        )
    known = f" AND {edge.column.name} IS NOT NULL" if edge.column.nullable else ""
    inner = [
        f"SELECT {edge.column.name} FROM {child.name} WHERE {column.name} = {sql_text(value)}"
        for value in (first, second)
    ]
    sql = (
        f"SELECT {parent.label.name} FROM {parent.name} WHERE {edge.key} IN ({inner[0]}) "
        f"AND {edge.key} {'NOT ' if without else ''}IN ({inner[1]}{known if without else ''})"
    )
    return m.done(m.rows(m.say(forms, **slots), parent, [parent.label]), sql, child.name, parent.name)


def child_of_extreme(m: Maker) -> Question | None:
    """Children of the parent with the largest or smallest number."""
    edge = pick_edge(m)
    if edge is None or not edge.parent.numbers or not edge.child.shown:
        return None
    parent, child = edge.parent, edge.child
    column = m.pick(parent.numbers)
    largest = m.chance(0.7)
    adjective = (column.high or "높은") if largest else (column.low or "낮은")
    forms = (
        "{c:이/가} <가장> {adj} {r}의",
        "<가장> {c:이/가} {adj} {r}의",
        "{r} 중 {c:이/가} <가장> {adj} {r}의",
    )
    adnominal = m.say(forms, c=column.ko, adj=adjective, r=edge.role)
    columns = m.shown(child)
    known = f" WHERE {column.name} IS NOT NULL" if column.nullable and not largest else ""
    sql = (
        f"SELECT {', '.join(c.name for c in columns)} FROM {child.name} WHERE {edge.column.name} = "
        f"(SELECT {edge.key} FROM {parent.name}{known} ORDER BY {column.name} {'DESC' if largest else 'ASC'} LIMIT 1)"
    )
    return m.done(m.rows(adnominal, child, columns), sql, child.name, parent.name)


def above_group_average(m: Maker) -> Question | None:
    """Rows above the average of their own category (a correlated sub-query)."""
    chosen = _numbered(m)
    if chosen is None or not chosen[0].groups:
        return None
    table, column = chosen
    group = m.pick(table.groups)
    above = m.chance(0.75)
    slots = {
        "g": group.ko,
        "c": column.ko,
        "adj": (column.high or "높은") if above else (column.low or "낮은"),
        "t": table.ko,
    }
    forms = (
        "같은 {g} {t}의 평균보다 {c:이/가} {adj}",
        "{c:이/가} 같은 {g}의 평균보다 {adj}",
        "{c:이/가} 자기 {g}의 평균 {c}보다 {adj}",
        "{c:이/가} {g}별 평균보다 {adj}",
    )
    columns = m.shown(table, known=column)
    average = f"SELECT AVG(T2.{column.name}) FROM {table.name} AS T2 WHERE T2.{group.name} = T1.{group.name}"
    sql = (
        f"SELECT {', '.join('T1.' + c.name for c in columns)} FROM {table.name} AS T1 "
        f"WHERE T1.{column.name} {'>' if above else '<'} ({average})"
    )
    return m.done(m.rows(m.say(forms, **slots), table, columns), sql, table.name)


def average_of_counts(m: Maker) -> Question | None:
    """The average number of children per parent, over parents that have any."""
    edge = pick_edge(m)
    if edge is None:
        return None
    slots = {"p": edge.role, "t": edge.child.ko}
    forms = (
        "{p} [하나|한 {u}]당 평균 {t} 수",
        "{p}별 {t} 수의 평균",
        "{p}당 {t} 수 평균",
        "{t:이/가} 있는 {p}의 평균 {t} 수",
    )
    noun = m.say(forms[: 3 if edge.parent.person else 4], u=edge.parent.counter, **slots)
    known = f" WHERE {edge.column.name} IS NOT NULL" if edge.column.nullable else ""
    counts = f"SELECT COUNT(*) AS n FROM {edge.child.name}{known} GROUP BY {edge.column.name}"
    sql = f"SELECT AVG(n) FROM ({counts}) AS counts"
    return m.done(m.value(noun, "figure"), sql, edge.child.name)
