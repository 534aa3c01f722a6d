"""Three tables: many-to-many relations through a link table, and chains of two foreign keys.

The table in the middle of the question is T1, the one that the condition is about T2 (or, in a chain, T3).
"""

from __future__ import annotations

from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.edges import ACTIONS, label_noun, parent_modifier
from tools.ko_text2sql.grammar.facts import Edge, Link, sample_value
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.nouns import count_noun
from tools.ko_text2sql.grammar.words import counted, quoted, sql_text


def _pick(m: Maker) -> Link | None:
    return m.pick(m.facts.links) if m.facts.links else None


def _from(link: Link) -> str:
    """FROM link AS T1 JOIN left AS T2 ... JOIN right AS T3 ..."""
    left, right = link.left, link.right
    return (
        f"FROM {left.child.name} AS T1 JOIN {left.parent.name} AS T2 ON T1.{left.column.name} = T2.{left.key} "
        f"JOIN {right.parent.name} AS T3 ON T1.{right.column.name} = T3.{right.key}"
    )


def _done(m: Maker, link: Link, question: str, sql: str) -> Question:
    return m.done(question, sql, link.left.child.name, link.left.parent.name, link.right.parent.name)


def _related(m: Maker, link: Link, who: str) -> str:
    """The right-hand things that belong to `who` on the left-hand side: "회원 김민준이 대출한 도서"."""
    left, right = link.left, link.right
    table = left.child.ko
    slots = {"w": who, "t": table, "r": right.role, "b": right.parent.ko}
    forms = [
        "{w}의 {t}에 [포함된|들어 있는|나오는] {b}",
        "{t}에서 {w:과/와} 연결된 {b}",
        "{w:과/와} {t:으로/로} [연결된|이어진] {b}",
        "{w}의 {t}에 해당하는 {b}",
    ]
    if right.role == right.parent.ko:
        forms += ["{w}의 {t} {b}"]
    if table in ACTIONS:
        if left.parent.person:
            forms = ["{w:이/가} {t}한 {b}"] * 4 + ["{w:이/가} {t}한 적이 있는 {b}", "{w}의 {t} {b}"]
        elif right.parent.person:
            forms = ["{w:을/를} {t}한 {b}"] * 4 + ["{w:을/를} {t}한 적이 있는 {b}"]
    return m.say(forms, **slots)


def _named(m: Maker, link: Link) -> tuple[str, str]:
    """Someone or something on the left-hand side: Korean and SQL condition."""
    label = link.left.parent.label
    assert label is not None
    value = sample_value(m.facts, m.rng, label)
    forms = ("{p} {q}", "{q} {p}", "{q}", "{q:이라는/라는} {p}", "{l:이/가} {q}인 {p}")
    who = m.say(forms, p=link.left.parent.ko, q=quoted(m.rng, value), l=label.ko)
    return who, f"T2.{label.name} = {sql_text(value)}"


def linked_labels(m: Maker) -> Question | None:
    """The names of what is linked with a named row, or with the rows of a condition."""
    link = _pick(m)
    if link is None or link.right.parent.label is None:
        return None
    left, right = link.left, link.right
    label = right.parent.label
    assert label is not None
    predicate = predicates.any_of(m, left.parent) if m.chance(0.35) else None
    if predicate:
        who, where = f"{predicate.ko} {left.parent.ko}", predicate.sql("T2.")
    elif m.chance(0.2):
        value = sample_value(m.facts, m.rng, left.parent.label) if left.parent.label else ""
        assert left.parent.label is not None
        slots = {
            "r": left.role,
            "q": quoted(m.rng, value),
            "t": left.child.ko,
            "b": right.role,
            "l": label_noun(right.parent),
        }
        noun = m.say(("{r:이/가} {q}인 {t}의 {b} {l}", "{r:이/가} {q}인 {t}에 나오는 {b}의 {l}"), **slots)
        sql = f"SELECT DISTINCT T3.{label.name} {_from(link)} WHERE T2.{left.parent.label.name} = {sql_text(value)}"
        return _done(m, link, m.list_of(noun), sql)
    else:
        who, where = _named(m, link)
    things = _related(m, link, who)
    columns = [label]
    if m.chance(0.2):
        columns = m.shown(right.parent, 1)
    names = columns[0].ko if columns[0] is not label else label_noun(right.parent)
    if columns[0] is label and m.chance(0.3):
        ends: tuple[str, ...] = (
            ("{b:은/는} <누구>", "{b:을/를} <모두> <보여>")
            if right.parent.person
            else ("{b:은/는} <무엇>", "{b:에는/에는} 어떤 것이 <있나>", "{b:을/를} <모두> <보여>")
        )
        question = m.say(ends, b=things)
    else:
        question = m.list_of(m.say(("{b}의 {l}", "{b} {l}", "{b}의 {l}"), b=things, l=names))
    sql = f"SELECT DISTINCT {', '.join('T3.' + c.name for c in columns)} {_from(link)} WHERE {where}"
    return _done(m, link, question, sql)


def linked_count(m: Maker) -> Question | None:
    """How many different things are linked with a named row."""
    link = _pick(m)
    if link is None:
        return None
    who, where = _named(m, link)
    right = link.right
    things = _related(m, link, who)
    slots = {"b": things, "u": right.parent.counter}
    forms = (
        "{b:은/는} 중복 없이 [모두|총] 몇 {u}<인가>",
        "{b:을/를} 중복 없이 세면 몇 {u}<인가>",
        "{b}의 수를 중복 없이 <구해>",
        "{b}의 수를 중복을 제외하고 <구해>",
        "{b:이/가} 중복을 빼고 몇 {u}인지 [알려줘|알려주세요|구하시오].",
        "{b:은/는} [모두|] 몇 종류<인가>" if not right.parent.person else "{b:은/는} [모두|] 몇 {u}<인가>",
    )
    sql = f"SELECT COUNT(DISTINCT T1.{right.column.name}) {_only_left(link)} WHERE {where}"
    return m.done(m.say(forms, **slots), sql, link.left.child.name, link.left.parent.name)


def _only_left(link: Link) -> str:
    left = link.left
    return (
        f"FROM {left.child.name} AS T1 JOIN {left.parent.name} AS T2 ON T1.{left.column.name} = T2.{left.key}"
    )


def linked_top(m: Maker) -> Question | None:
    """Per left-hand row, how many different right-hand rows; or who has the most."""
    link = _pick(m)
    if link is None:
        return None
    left, right = link.left, link.right
    label = left.parent.label
    assert label is not None
    count = f"COUNT(DISTINCT T1.{right.column.name})"
    slots = {
        "p": left.parent.ko,
        "b": right.parent.ko,
        "t": left.child.ko,
        "l": label_noun(left.parent),
        "u": right.parent.counter,
    }
    if m.chance(0.5):
        forms: tuple[str, ...] = (
            "{t} 기준으로 서로 다른 {b} 수가 <가장> 많은 {p}의 {l:은/는} <무엇>",
            "{t}에서 서로 다른 {b:과/와} <가장> 많이 연결된 {p}의 {l:을/를} <보여>",
            "{t}에 나오는 {b} 종류가 <가장> 많은 {p}의 {l:을/를} <보여>",
            "{t} 내역에서 {b} 종류 수가 <가장> 많은 {p}의 {l}",
        )
        tail, projection = f"ORDER BY {count} DESC LIMIT 1", f"T2.{label.name}"
    else:
        number = m.pick((2, 2, 3, 3, 4, 5))
        slots["v"] = counted(m.rng, number, right.parent.counter)
        forms = (
            "{t}에서 서로 다른 {b} {v} 이상과 연결된 {p}의 {l:을/를} <모두> <보여>",
            "{t} 기준으로 서로 다른 {b:이/가} {v} 이상인 {p}의 {l:은/는} <무엇>",
            "{t}에 서로 다른 {b:이/가} {v} 이상 나오는 {p}의 {l:을/를} <모두> <보여>",
            "{t} 내역에 {b:이/가} 중복 없이 {v} 이상 있는 {p}의 {l}",
        )
        tail, projection = f"HAVING {count} >= {number}", f"T2.{label.name}"
    sql = f"SELECT {projection} {_only_left(link)} GROUP BY T2.{label.name} {tail}"
    return m.done(m.say(forms, **slots), sql, left.child.name, left.parent.name)


def chain_pairs(m: Maker) -> list[tuple[Edge, Edge]]:
    return [
        (first, second)
        for first in m.facts.edges
        for second in m.facts.edges
        if first.parent is second.child
        and second.parent.label
        and len({first.child.name, first.parent.name, second.parent.name}) == 3
    ]


def chain(m: Maker) -> Question | None:
    """Columns, or the number, of rows two foreign keys away from a named row or a condition."""
    pairs = chain_pairs(m)
    if not pairs:
        return None
    first, second = m.pick(pairs)
    label = second.parent.label
    assert label is not None
    predicate = predicates.any_of(m, second.parent) if m.chance(0.4) else None
    if predicate:
        inner, where = parent_modifier(m, second, predicate), predicate.sql("T3.")
        # or a condition that modifies what follows: "감독의 국적이 한국인"
        linked = inner.endswith(("의", "속한", "대한"))
        adnominal = f"{inner} {first.role}의" if linked or m.chance(0.5) else f"{first.role}의 {inner}"
    else:
        value = sample_value(m.facts, m.rng, label)
        where = f"T3.{label.name} = {sql_text(value)}"
        forms = (
            "{a}의 {b:이/가} {q}인",
            "{a}의 {b} {l:이/가} {q}인",
            "{b:이/가} {q}인 {a}의",
            "{a} {b:이/가} {q}인",
        )
        adnominal = m.say(
            forms, a=first.role, b=second.role, q=quoted(m.rng, value), l=label_noun(second.parent)
        )
    source = (
        f"FROM {first.child.name} AS T1 JOIN {first.parent.name} AS T2 ON T1.{first.column.name} = T2.{first.key} "
        f"JOIN {second.parent.name} AS T3 ON T2.{second.column.name} = T3.{second.key}"
    )
    if m.chance(0.4) or not first.child.shown:
        question, projection = m.count(adnominal, first.child), "COUNT(*)"
    elif first.child.numbers and m.chance(0.3):
        column = m.pick(first.child.numbers)
        function, word = m.pick((("AVG", "평균"), ("SUM", "총"), ("MAX", "최대")))
        question = m.value(f"{adnominal} {first.child.ko}의 {word} {column.ko}", "number", column.unit)
        projection = f"{function}(T1.{column.name})"
    else:
        columns = m.shown(first.child)
        question = m.rows(adnominal, first.child, columns)
        projection = ", ".join("T1." + column.name for column in columns)
    sql = f"SELECT {projection} {source} WHERE {where}"
    return m.done(question, sql, first.child.name, first.parent.name, second.parent.name)


def chain_group(m: Maker) -> Question | None:
    """How many rows there are per row two foreign keys away, or the one with the most."""
    pairs = chain_pairs(m)
    if not pairs:
        return None
    first, second = m.pick(pairs)
    label = second.parent.label
    assert label is not None
    source = (
        f"FROM {first.child.name} AS T1 JOIN {first.parent.name} AS T2 ON T1.{first.column.name} = T2.{first.key} "
        f"JOIN {second.parent.name} AS T3 ON T2.{second.column.name} = T3.{second.key}"
    )
    slots = {
        "a": first.role,
        "b": second.role,
        "n": count_noun(m, first.child),
        "l": label_noun(second.parent),
    }
    if m.chance(0.5):
        forms: tuple[str, ...] = (
            "{a}의 {b}별 {n:을/를} <구해>",
            "{a} {b}별로 {n:을/를} <보여>",
            "{a}의 {b}마다 {n:이/가} 어떻게 되는지 <보여>",
            "{a}의 {b} {l}별 {n:은/는} <얼마>",
        )
        sql = f"SELECT T3.{label.name}, COUNT(*) {source} GROUP BY T3.{label.name}"
    else:
        forms = (
            "{n:이/가} <가장> 많은 {a}의 {b} {l:은/는} <무엇>",
            "{a}의 {b} <중> {n:이/가} <가장> 많은 곳의 {l:을/를} <보여>"
            if second.parent.counter == "곳"
            else "{a}의 {b} <중> {n:이/가} <가장> 많은 {b}의 {l:을/를} <보여>",
            "{a}의 {b}별로 따졌을 때 {n:이/가} <가장> 많은 {b}의 {l:은/는} <무엇>",
        )
        sql = f"SELECT T3.{label.name} {source} GROUP BY T3.{label.name} ORDER BY COUNT(*) DESC LIMIT 1"
    return m.done(m.say(forms, **slots), sql, first.child.name, first.parent.name, second.parent.name)
