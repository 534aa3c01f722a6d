"""What a foreign key says about the parents: counts per parent, the one with the most, those with many or none."""

from __future__ import annotations

from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.edges import ACTIONS, join, label_noun, label_phrase, parent_name, pick_edge
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.nouns import (
    aggregate_of,
    aggregate_of_table,
    compared_count,
    count_noun,
    extremes,
    group_question,
)
from tools.ko_text2sql.grammar.words import counted


def per_parent(m: Maker) -> Question | None:
    """Children, or an aggregate over them, per parent or per category of the parent."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label = edge.parent.label
    assert label is not None
    group, name = label, parent_name(m, edge) if m.chance(0.7) else label_phrase(m, edge)
    if edge.parent.groups and m.chance(0.35):
        group = m.pick(edge.parent.groups)
        name = m.say(("{r}의 {c}", "{r} {c}", "{r} {c}"), r=parent_name(m, edge), c=group.ko)
    own = predicates.any_of(m, edge.child) if m.chance(0.2) else None
    if edge.child.numbers and m.chance(0.4):
        function, column = aggregate_of(m, edge.child)
        noun: str | None = aggregate_of_table(m, edge.child, function, column, own is not None)
        projection = f"{function}(T1.{column.name})"
    else:
        noun, projection = None, "COUNT(*)"
    question = group_question(
        m, name, own.ko if own else "", edge.child, noun, edge.parent.person and group is label
    )
    where = f" WHERE {own.sql('T1.')}" if own else ""
    sql = f"SELECT T2.{group.name}, {projection} {join(edge)}{where} GROUP BY T2.{group.name}"
    if noun is None and m.chance(0.2):
        slots = {"g": name, "n": f"{own.ko if own else ''} {count_noun(m, edge.child)}".strip()}
        forms = (
            "{g}별 {n:을/를} 많은 순으로 <보여>",
            "{g:과/와} {n:을/를} {n:이/가} 많은 순으로 <보여>",
            "{g}별 {n:을/를} 내림차순으로 <보여>",
        )
        question = m.say(forms, **slots).replace("별별", "별")
        sql += " ORDER BY COUNT(*) DESC"
    return m.done(question, sql, edge.child.name, edge.parent.name)


def top_parent(m: Maker) -> Question | None:
    """The parents with the most children or the largest aggregate over them."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label, parent, child = edge.parent.label, edge.parent, edge.child
    assert label is not None
    descending = True  # parents without children would have the fewest, but a join does not see them
    if child.numbers and m.chance(0.4):
        function, column = aggregate_of(m, child, ("AVG", "AVG", "SUM", "SUM", "MAX"))
        descending = function != "AVG" or m.chance(0.7)
        noun, expression = aggregate_of_table(m, child, function, column), f"{function}(T1.{column.name})"
        high, low = extremes(function, column)
        forms = ["{n:이/가} <가장> {adj} {p}"]
    else:
        noun, expression, high, low = count_noun(m, child), "COUNT(*)", "많은", "적은"
        forms = [
            "{n:이/가} <가장> {adj} {p}",
            "{t:이/가} <가장> {adj} {p}",
            "{t:이/가} <가장> 많이 있는 {p}",
            "{t:이/가} <가장> {adj} {p}",
        ]
        if not child.event:
            forms += ["{t:을/를} <가장> 많이 [가진|보유한] {p}"]
    count = 1 if m.chance(0.7) else m.pick((2, 3, 5, 10))
    who = m.say(forms, n=noun, adj=high if descending else low, p=parent_name(m, edge), t=child.ko)
    if count > 1:
        who = f"{who} {counted(m.rng, count, parent.counter)}"
    if count == 1 and m.chance(0.35):
        ends: tuple[str, ...] = (
            ("{w:은/는} <누구>", "{w:이/가} <누구>", "{w:은/는}?")
            if parent.person
            else ("{w:은/는} <무엇>", "{w:을/를} <보여>", "{w:은/는}?")
        )
        question = m.say(ends, w=who)
    else:
        noun_phrase = f"{who}의 {label_noun(parent)}"
        question = m.list_of(noun_phrase) if count > 1 else m.value(noun_phrase, "other")
    sql = (
        f"SELECT T2.{label.name} {join(edge)} GROUP BY T2.{label.name} "
        f"ORDER BY {expression} {'DESC' if descending else 'ASC'} LIMIT {count}"
    )
    return m.done(question, sql, child.name, parent.name)


def parents_having(m: Maker) -> Question | None:
    """The parents with at least (more than, at most, ...) so many children."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label, parent, child = edge.parent.label, edge.parent, edge.child
    assert label is not None
    operator, number, word = compared_count(
        m, 1.4 * child.table.rows / max(1, parent.table.rows), upwards=True
    )
    value = counted(m.rng, number, child.counter)
    forms = [
        "{n:이/가} {v} {w}인",
        "{t:이/가} {v} {w}인",
        "{t:이/가} {v} {w} 있는",
        "{t:이/가} {v} {w} 있는",
    ]
    if not child.event:
        forms += ["{t:을/를} {v} {w} [가진|보유한]"]
    elif child.ko in ACTIONS and parent.person:
        forms += ["{t:을/를} {v} {w} 한", "{v} {w} {t}한"] * 2
    if operator == ">":
        forms += ["{t:이/가} {v}보다 많은", "{t:이/가} {v:을/를} 넘는"]
    adnominal = m.say(forms, n=count_noun(m, child), v=value, w=word, t=child.ko)
    with_number = m.chance(0.3)
    if with_number:
        noun = m.say(
            ("{a} {p}의 {l:과/와} {n}", "{a} {p} {l:과/와} 그 {n}"),
            a=adnominal,
            p=parent.ko,
            l=label_noun(parent),
            n=count_noun(m, child),
        )
        question = m.list_of(noun)
    else:
        question = m.rows(adnominal, parent, [label])
    projection = f"T2.{label.name}, COUNT(*)" if with_number else f"T2.{label.name}"
    sql = f"SELECT {projection} {join(edge)} GROUP BY T2.{label.name} HAVING COUNT(*) {operator} {number}"
    return m.done(question, sql, child.name, parent.name)


def parents_without(m: Maker) -> Question | None:
    """The parents with no child: 하나도/한 권도 없는 as a LEFT JOIN, plain 없는 as NOT IN."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label, parent, child = edge.parent.label, edge.parent, edge.child
    assert label is not None
    slots = {"t": child.ko, "u": child.counter}
    outer = m.chance(0.5)
    if outer:
        forms: tuple[str, ...] = ("{t:이/가} 하나도 없는", "{t:이/가} 한 {u}도 없는", "{t:이/가} 전혀 없는")
        if child.ko in ACTIONS and parent.person:
            forms += ("한 번도 {t}하지 않은", "한 번도 {t:을/를} 하지 않은", "{t}한 적이 한 번도 없는")
    else:
        forms = ("{t:이/가} 없는", "{t:이/가} 없는", "{t:을/를} 갖고 있지 않은", "{t}에 나오지 않는")
        if child.event:
            forms = ("{t:이/가} 없는", "{t} [기록|내역|이력]이 없는", "{t} [기록|내역]에 나오지 않는")
            if child.ko in ACTIONS and parent.person:
                forms += ("{t}한 적이 없는", "{t:을/를} 하지 않은", "{t}하지 않은")
    adnominal = m.say(forms, **slots)
    count = m.chance(0.2)
    question = m.count(adnominal, parent) if count else m.rows(adnominal, parent, [label])
    if outer:
        what = "COUNT(*)" if count else f"T1.{label.name}"
        ref = edge.column.name
        sql = (
            f"SELECT {what} FROM {parent.name} AS T1 LEFT JOIN {child.name} AS T2 ON T1.{edge.key} = T2.{ref} "
            f"WHERE T2.{ref} IS NULL"
        )
    else:
        what = "COUNT(*)" if count else label.name
        known = f" WHERE {edge.column.name} IS NOT NULL" if edge.column.nullable else ""
        taken = f"SELECT {edge.column.name} FROM {child.name}{known}"
        sql = f"SELECT {what} FROM {parent.name} WHERE {edge.key} NOT IN ({taken})"
    return m.done(question, sql, child.name, parent.name)


def parents_with(m: Maker) -> Question | None:
    """The parents with any child at all, by name or how many they are."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label, parent, child = edge.parent.label, edge.parent, edge.child
    assert label is not None
    forms = ["{t:이/가} 한 {u:이라도/라도} 있는", "{t:이/가} 있는", "{t:이/가} 하나 이상 있는"]
    if child.event:
        forms = [
            "{t:이/가} 한 {u:이라도/라도} 있는",
            "{t} [기록|내역|이력]이 있는",
            "{t} [기록|내역]에 나오는",
        ]
    elif child.person:
        forms = forms[:2]
    if child.ko in ACTIONS and parent.person:
        forms = [
            "{t}한 적이 있는",
            "{t}한 적이 한 번이라도 있는",
            "한 번이라도 {t}한",
            "{t} [기록|내역|이력]이 있는",
        ]
    adnominal = m.say(forms, t=child.ko, u=child.counter)
    ref = edge.column.name
    if m.chance(0.45):
        return m.done(
            m.count(adnominal, parent), f"SELECT COUNT(DISTINCT {ref}) FROM {child.name}", child.name
        )
    sql = f"SELECT {label.name} FROM {parent.name} WHERE {edge.key} IN (SELECT {ref} FROM {child.name})"
    return m.done(m.rows(adnominal, parent, [label]), sql, child.name, parent.name)
