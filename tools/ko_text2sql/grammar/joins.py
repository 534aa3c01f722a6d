"""Two tables joined by a foreign key: conditions on one side and columns of the other.

Parents of selected children come DISTINCT, since several children may share one.
"""

from __future__ import annotations

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.edges import join, label_phrase, of_parent, parent_modifier, pick_edge
from tools.ko_text2sql.grammar.facts import Edge, sample_value
from tools.ko_text2sql.grammar.maker import Maker, Question, without_echo
from tools.ko_text2sql.grammar.nouns import aggregate_noun, aggregate_of
from tools.ko_text2sql.grammar.ordering import order_by, sortable, superlative
from tools.ko_text2sql.grammar.single import value_kind
from tools.ko_text2sql.grammar.words import counted, quoted, sql_text


def _child_columns(m: Maker, edge: Edge) -> list[Column]:
    return m.shown(edge.child) if edge.child.shown else [edge.child.table.key]


def _names(prefix: str, columns: list[Column]) -> str:
    return ", ".join(prefix + column.name for column in columns)


def child_by_parent_label(m: Maker) -> Question | None:
    """Columns of the children of a named parent, perhaps with a condition of their own."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label = edge.parent.label
    assert label is not None
    value = sample_value(m.facts, m.rng, label)
    adnominal = of_parent(m, edge, quoted(m.rng, value))
    where = f"T2.{label.name} = {sql_text(value)}"
    own = predicates.any_of(m, edge.child) if m.chance(0.15) else None
    if own:
        adnominal = m.say(
            ("{p} {t} 중 {o}", "{p} {t} 중에서 {o}", "{p} {t} 가운데 {o}"),
            p=adnominal,
            o=own.ko,
            t=edge.child.ko,
        )
        where += f" AND {own.sql('T1.')}"
    columns = _child_columns(m, edge)
    question = m.rows(adnominal, edge.child, columns)
    return m.done(
        question,
        f"SELECT {_names('T1.', columns)} {join(edge)} WHERE {where}",
        edge.child.name,
        edge.parent.name,
    )


def child_by_parent(m: Maker) -> Question | None:
    """Columns of the children whose parent satisfies a condition."""
    edge = pick_edge(m, labelled_parent=False)
    predicate = predicates.any_of(m, edge.parent) if edge else None
    if edge is None or predicate is None:
        return None
    adnominal = parent_modifier(m, edge, predicate)
    columns = _child_columns(m, edge)
    where = predicate.sql("T2.")
    own = predicates.any_of(m, edge.child) if m.chance(0.15) else None
    if own:
        adnominal = m.say(
            ("{p} {t} 중 {o}", "{p} {t} 중에서 {o}", "{p} {t} 가운데 {o}"),
            p=adnominal,
            o=own.ko,
            t=edge.child.ko,
        )
        where += f" AND {own.sql('T1.')}"
    sql = f"SELECT {_names('T1.', columns)} {join(edge)} WHERE {where}"
    return m.done(m.rows(adnominal, edge.child, columns), sql, edge.child.name, edge.parent.name)


def parent_of_child(m: Maker) -> Question | None:
    """A column of the parent of a named child."""
    edge = pick_edge(m, labelled_child=True)
    if edge is None:
        return None
    child_label = edge.child.label
    assert child_label is not None and edge.parent.label is not None
    value = sample_value(m.facts, m.rng, child_label)
    column = edge.parent.label if m.chance(0.6) else m.pick(edge.parent.shown)
    who = m.say(
        ("{t} {q}의", "{q} {t}의", "{q}의", "{l:이/가} {q}인 {t}의", "{q:이라는/라는} {t}의"),
        t=edge.child.ko,
        q=quoted(m.rng, value),
        l=child_label.ko,
    )
    if column is edge.parent.label:
        if m.chance(0.4):
            ends = (
                ("{w} {r:은/는} <누구>", "{w} {r:이/가} <누구>")
                if edge.parent.person
                else ("{w} {r:은/는} <무엇>", "{w} {r:은/는} 어디[인가요|야|입니까]?")
            )
            question = m.say(
                ends if edge.parent.person or edge.parent.counter == "곳" else ends[:1], w=who, r=edge.role
            )
        else:
            question = m.value(f"{who} {label_phrase(m, edge)}", "other")
    else:
        forms = ("{w} {c}",) if column.ko.startswith(edge.role) else ("{w} {r}의 {c}", "{w} {r} {c}")
        noun = m.say(forms, w=who, r=edge.role, c=column.ko)
        question = m.value(noun, value_kind(column), column.unit)
    sql = f"SELECT T2.{column.name} {join(edge)} WHERE T1.{child_label.name} = {sql_text(value)}"
    return m.done(question, sql, edge.child.name, edge.parent.name)


def parent_by_child(m: Maker) -> Question | None:
    """The names of the parents that have a child satisfying a condition."""
    edge = pick_edge(m)
    if edge is None:
        return None
    predicate = predicates.any_of(m, edge.child)
    if predicate is None or edge.parent.label is None:
        return None
    columns = [edge.parent.label] if m.chance(0.8) else m.shown(edge.parent)
    if m.chance(0.35):
        forms: tuple[str, ...] = (
            "{p} {t}의 {l:을/를} 중복 없이 <보여>",
            "{p} {t}의 {l:은/는} <무엇>",
            "{p} {t}의 {l}",
            "{p} {t}의 {l:을/를} <모두> <보여>",
        )
        question = m.say(forms, p=predicate.ko, t=edge.child.ko, l=label_phrase(m, edge))
        columns = [edge.parent.label]
    else:
        adnominal = m.say(
            ("{p} {t:이/가} 있는", "{p} {t:이/가} 있는", "{p} {t:을/를} 가진", "{p} {t:과/와} 연결된"),
            p=predicate.ko,
            t=edge.child.ko,
        )
        question = m.rows(adnominal, edge.parent, columns)
    sql = f"SELECT DISTINCT {_names('T2.', columns)} {join(edge)} WHERE {predicate.sql('T1.')}"
    return m.done(question, sql, edge.child.name, edge.parent.name)


def join_pairs(m: Maker) -> Question | None:
    """Each child with the name of its parent."""
    edge = pick_edge(m)
    if edge is None or not edge.child.shown:
        return None
    label = edge.parent.label
    assert label is not None
    child_column = edge.child.label if edge.child.label and m.chance(0.75) else m.pick(edge.child.shown)
    predicate = predicates.any_of(m, edge.child, child_column) if m.chance(0.45) else None
    slots = {
        "a": predicate.ko if predicate else "",
        "t": edge.child.ko,
        "c": child_column.ko,
        "r": edge.role,
        "l": label_phrase(m, edge),
    }
    forms = [
        "{a} {t}의 {c:과/와} {l:을/를} [함께|같이|] <보여>",
        "{a} {t} {c:과/와} {l:을/를} <모두> <보여>",
        "{a} {t}마다 {c:과/와} {l:을/를} <보여>",
        "{a} {t}의 {c:과/와} 그 {l:은/는} <무엇>",
        "{a} {t}의 {c}, {l}",
        "{a} {t}의 {c:과/와} 해당 {l:을/를} <싶다>.",
        "{a} {t}에 대해 {c:과/와} {l:을/를} 짝지어 <보여>",
    ]
    if not predicate:
        forms += ["모든 {t}의 {c:과/와} {l:을/를} <보여>", "각 {t}의 {c:과/와} {l:을/를} <보여>"]
    sql = f"SELECT T1.{child_column.name}, T2.{label.name} {join(edge)}"
    sql += f" WHERE {predicate.sql('T1.')}" if predicate else ""
    return m.done(m.say(forms, **slots), sql, edge.child.name, edge.parent.name)


def count_of_parent(m: Maker) -> Question | None:
    """How many children a named parent (or the parents of a condition) has."""
    edge = pick_edge(m)
    if edge is None:
        return None
    label = edge.parent.label
    assert label is not None
    predicate = predicates.any_of(m, edge.parent) if m.chance(0.35) else None
    if predicate:
        adnominal, where = parent_modifier(m, edge, predicate), predicate.sql("T2.")
    else:
        value = sample_value(m.facts, m.rng, label)
        adnominal, where = of_parent(m, edge, quoted(m.rng, value)), f"T2.{label.name} = {sql_text(value)}"
    sql = f"SELECT COUNT(*) {join(edge)} WHERE {where}"
    return m.done(m.count(adnominal, edge.child), sql, edge.child.name, edge.parent.name)


def aggregate_of_parent(m: Maker) -> Question | None:
    """An aggregate over the children of a named parent or of the parents of a condition."""
    edge = pick_edge(m, numbers=True)
    if edge is None:
        return None
    label = edge.parent.label
    assert label is not None
    function, column = aggregate_of(m, edge.child)
    predicate = predicates.any_of(m, edge.parent) if m.chance(0.45) else None
    if predicate:
        adnominal, where = parent_modifier(m, edge, predicate), predicate.sql("T2.")
    else:
        value = sample_value(m.facts, m.rng, label)
        adnominal, where = of_parent(m, edge, quoted(m.rng, value)), f"T2.{label.name} = {sql_text(value)}"
    noun = m.say(
        ("{a} {t}의 {n}", "{a} {t}의 {n}", "{a} {t} {n}", "{a} {t}들의 {n}"),
        a=adnominal,
        t=edge.child.ko,
        n=aggregate_noun(m, function, column),
    )
    sql = f"SELECT {function}(T1.{column.name}) {join(edge)} WHERE {where}"
    return m.done(m.value(noun, "number", column.unit), sql, edge.child.name, edge.parent.name)


def child_top(m: Maker) -> Question | None:
    """Among the children of a named parent, or of the parents of a condition, those that come first in an order."""
    edge = pick_edge(m)
    if edge is None or not sortable(edge.child) or not edge.child.shown:
        return None
    label, child = edge.parent.label, edge.child
    assert label is not None
    column = m.pick(sortable(child))
    columns = [child.label] if child.label and m.chance(0.7) else m.shown(child, 1, known=column)
    descending = m.chance(0.65)
    predicate = predicates.any_of(m, edge.parent) if m.chance(0.4) else None
    if predicate:
        adnominal, where = parent_modifier(m, edge, predicate), predicate.sql("T2.")
    else:
        value = sample_value(m.facts, m.rng, label)
        adnominal, where = of_parent(m, edge, quoted(m.rng, value)), f"T2.{label.name} = {sql_text(value)}"
    if not descending and column.nullable:
        where += f" AND T1.{column.name} IS NOT NULL"
    count = 1 if m.chance(0.65) else m.pick((2, 3, 5))
    slots = {
        "a": adnominal,
        "t": child.ko,
        "s": superlative(m, column, descending),
        "c": columns[0].ko,
        "x": "사람" if child.person else "것",
    }
    if count == 1:
        forms = ["{a} {t} [중|중에서|가운데] {s} {t}의 {c}", "{a} {t} [중|중에서|가운데] {s} {x}의 {c}"]
        question = m.value(without_echo(m.say(forms, **slots), child), "other")
    else:
        forms = ["{a} {t} [중|중에서|가운데] {s} {n}의 {c}", "{a} {t} [중|중에서|가운데] {s} {t} {n}의 {c}"]
        noun = m.say(forms, n=counted(m.rng, count, child.counter), **slots)
        question = m.list_of(without_echo(noun, child))
    order = order_by(column, descending, "T1.")
    sql = f"SELECT {_names('T1.', columns)} {join(edge)} WHERE {where} {order} LIMIT {count}"
    return m.done(question, sql, child.name, edge.parent.name)
