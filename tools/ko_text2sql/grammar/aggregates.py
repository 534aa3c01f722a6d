"""One number about one table: counts, sums, averages, extremes, shares."""

from __future__ import annotations

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar import predicates
from tools.ko_text2sql.grammar.facts import TableFacts, summable
from tools.ko_text2sql.grammar.maker import Maker, Question
from tools.ko_text2sql.grammar.nouns import aggregate_noun, aggregate_of
from tools.ko_text2sql.grammar.single import joined_predicates


def _condition(m: Maker, table: TableFacts, share: float, avoid: Column | None = None) -> tuple[str, str]:
    """A modifier and its WHERE clause, or two empty strings."""
    if not m.chance(share):
        return "", ""
    if m.chance(0.15):
        pair = joined_predicates(m, table, "AND", avoid)
        return (pair[0], f" WHERE {pair[1]}") if pair else ("", "")
    predicate = predicates.any_of(m, table, avoid)
    return (predicate.ko, f" WHERE {predicate.sql()}") if predicate else ("", "")


def count_all(m: Maker) -> Question | None:
    """How many rows a table has."""
    table = m.pick(m.facts.tables)
    adnominal = m.pick(("", "", "", "모든", "전체", "등록된", "DB에 있는", "현재 등록된"))
    question = m.count(adnominal, table)
    return m.done(question, f"SELECT COUNT(*) FROM {table.name}", table.name)


def count_where(m: Maker) -> Question | None:
    """How many rows satisfy a condition."""
    table = m.pick(m.facts.tables)
    adnominal, where = _condition(m, table, 1.0)
    if not where:
        return None
    return m.done(m.count(adnominal, table), f"SELECT COUNT(*) FROM {table.name}{where}", table.name)


def count_distinct(m: Maker) -> Question | None:
    """How many different values a column has."""
    fitting = [table for table in m.facts.tables if table.categories]
    if not fitting:
        return None
    table = m.pick(fitting)
    column = m.pick(table.categories)
    adnominal, where = _condition(m, table, 0.25, column)
    forms = (
        "{a} {t}의 {c:은/는} [모두|총|] 몇 [종류|가지]<인가>",
        "{a} {t}의 {c:은/는} [모두|총|] 몇 [종류|가지]야?",
        "{a} {t}에는 서로 다른 {c:이/가} [모두|총|] 몇 [개|가지|종류] <있나>",
        "{a} {t}의 {c} 종류 수를 <구해>",
        "{a} {t}의 서로 다른 {c}의 [개수를|수를] <구해>",
        "중복을 제외한 {a} {t} {c}의 [개수를|수를] <구해>",
        "{a} {t}의 {c} 가짓수를 <구해>",
        "{a} {t}의 {c:을/를} 중복 없이 세면 몇 개<인가>",
        "{a} {t} {c} 종류의 수",
        "{a} {t}의 {c:이/가} 몇 [가지|종류]인지 [알려줘|세어줘|알려주세요].",
        "{a} {t}의 고유한 {c} 수는 <얼마>",
    )
    question = m.lead(m.say(forms, a=adnominal, t=table.ko, c=column.ko), table)
    return m.done(question, f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name}{where}", table.name)


def aggregate(m: Maker) -> Question | None:
    """MIN, MAX, AVG or SUM of a column, with or without a condition."""
    fitting = [table for table in m.facts.tables if table.numbers or table.dates]
    if not fitting:
        return None
    table = m.pick(fitting)
    dated = bool(table.dates) and (not table.numbers or m.chance(0.12))
    function, column = (m.pick(("MAX", "MIN")), m.pick(table.dates)) if dated else aggregate_of(m, table)
    adnominal, where = _condition(m, table, 0.55, column)
    noun = aggregate_noun(m, function, column)
    forms = ["{a} {t}의 {n}", "{a} {t}의 {n}", "{a} {t} {n}", "{a} {t}들의 {n}"]
    if not adnominal:
        forms += ["전체 {t}의 {n}", "모든 {t}의 {n}", "{t} 전체의 {n}"]
    question = m.value(
        m.say(forms, a=adnominal, t=table.ko, n=noun), "date" if dated else "number", column.unit
    )
    return m.done(
        m.lead(question, table), f"SELECT {function}({column.name}) FROM {table.name}{where}", table.name
    )


def aggregate_two(m: Maker) -> Question | None:
    """Two aggregates of one column, or a count and an aggregate."""
    fitting = [table for table in m.facts.tables if any(summable(column) for column in table.numbers)]
    if not fitting:
        return None
    table = m.pick(fitting)
    column = m.pick([column for column in table.numbers if summable(column)])
    adnominal, where = _condition(m, table, 0.4, column)
    roll = m.rng.random()
    slots = {"a": adnominal, "t": table.ko, "c": column.ko}
    if roll < 0.45:
        functions = m.pick((("MAX", "MIN"), ("MIN", "MAX"), ("AVG", "MAX"), ("AVG", "MIN"), ("SUM", "AVG")))
        names = {"MAX": "최댓값", "MIN": "최솟값", "AVG": "평균", "SUM": "합계"}
        slots |= {"f": names[functions[0]], "g": names[functions[1]]}
        noun = m.say(
            ("{a} {t}의 {c} {f:과/와} {g}", "{a} {t}의 {c}의 {f:과/와} {g}", "{a} {t} {c}의 {f} 및 {g}"),
            **slots,
        )
        projection = ", ".join(f"{function}({column.name})" for function in functions)
    elif roll < 0.75:
        function = m.pick(("AVG", "SUM", "MAX"))
        slots["n"] = aggregate_noun(m, function, column)
        slots["k"] = m.pick(table.count_words)
        noun = m.say(("{a} {t}의 {k:과/와} {n}", "{a} {t} {k:과/와} {n}", "{a} {t}의 {k} 및 {n}"), **slots)
        projection = f"COUNT(*), {function}({column.name})"
    else:
        forms = (
            "{a} {t}의 {c} 최댓값과 최솟값의 차이",
            "{a} {t} {c}의 최댓값과 최솟값 차이",
            "{a} {t} 중 {c:이/가} 가장 {h} {thing:과/와} 가장 {l} {thing}의 {c} 차이",
            "{a} {t}의 최고 {c:과/와} 최저 {c}의 차이",
        )
        slots |= {
            "h": column.high or "높은",
            "l": column.low or "낮은",
            "thing": "사람" if table.person else "것",
        }
        noun = m.say(forms, **slots)
        projection = f"MAX({column.name}) - MIN({column.name})"
    question = m.value(noun, "figure")
    return m.done(m.lead(question, table), f"SELECT {projection} FROM {table.name}{where}", table.name)


def share(m: Maker) -> Question | None:
    """What percentage of the rows satisfies a condition."""
    fitting = [table for table in m.facts.tables if table.categories or table.flags]
    if not fitting:
        return None
    table = m.pick(fitting)
    column = (
        m.pick(table.flags)
        if table.flags and (m.chance(0.5) or not table.categories)
        else m.pick(table.categories)
    )
    predicate = predicates.flag(m, column, True) if column.role == "flag" else predicates.category(m, column)
    forms = (
        "전체 {t} 중 {a} {t}의 비율은 몇 퍼센트<인가>",
        "{a} {t:은/는} 전체 {t}의 몇 %<인가>",
        "전체 {t}에서 {a} {t:이/가} 차지하는 비율(%)을 <구해>",
        "{a} {t}의 비율을 백분율로 <구해>",
        "{a} {t}의 비율(%)",
        "{t} 중 {a} {thing:이/가} 몇 퍼센트인지 [알려줘|계산해줘|구하시오|알려주세요].",
        "{t} 가운데 {a} {thing}의 백분율을 <구해>",
    )
    question = m.say(forms, t=table.ko, a=predicate.ko, thing="사람" if table.person else "것")
    sql = f"SELECT 100.0 * SUM(CASE WHEN {predicate.sql()} THEN 1 ELSE 0 END) / COUNT(*) FROM {table.name}"
    return m.done(question, sql, table.name)
