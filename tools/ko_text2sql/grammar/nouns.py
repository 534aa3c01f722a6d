"""What is asked of a table or a group: counts, aggregates, and the sentences that ask for them per group."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar.facts import TableFacts, summable
from tools.ko_text2sql.grammar.maker import Maker

# nouns for an aggregate over column {c}
AGGREGATES: dict[str, tuple[str, ...]] = {
    "AVG": ("평균 {c}", "{c} 평균", "{c}의 평균", "{c}의 평균값", "평균 {c}", "{c} 평균값"),
    "SUM": ("{c} 합계", "{c}의 합", "총 {c}", "{c} 총합", "{c}의 합계", "{c}의 총합", "전체 {c} 합"),
    "MAX": ("최고 {c}", "{c}의 최댓값", "최대 {c}", "{c} 최댓값", "가장 {high} {c}", "제일 {high} {c}"),
    "MIN": ("최저 {c}", "{c}의 최솟값", "최소 {c}", "{c} 최솟값", "가장 {low} {c}", "제일 {low} {c}"),
}


_DAYS: dict[str, tuple[str, ...]] = {
    "MAX": ("가장 최근 {c}", "가장 늦은 {c}", "제일 마지막 {c}", "{c} 중 가장 최근 날짜"),
    "MIN": ("가장 이른 {c}", "가장 빠른 {c}", "제일 처음 {c}", "{c} 중 가장 이른 날짜"),
}


def aggregate_of(
    m: Maker, table: TableFacts, functions: Sequence[str] = ("AVG", "AVG", "SUM", "MAX", "MIN")
) -> tuple[str, Column]:
    """An aggregate function and a column that it makes sense for."""
    column = m.pick(table.numbers)
    if not summable(column):
        functions = [function for function in functions if function in ("MAX", "MIN")] or ["MAX"]
    return m.pick(functions), column


def aggregate_noun(m: Maker, function: str, column: Column) -> str:
    if column.role == "date":
        return m.say(_DAYS[function], c=column.ko)
    return m.say(AGGREGATES[function], c=column.ko, high=column.high or "높은", low=column.low or "낮은")


def count_noun(m: Maker, table: TableFacts) -> str:
    """도서 수, 도서의 수, 도서 개수; 회원 수, 회원 인원수; 대출 건수."""
    word = m.pick(table.count_words)
    return f"{table.ko}의 {word}" if m.chance(0.15) else f"{table.ko} {word}"


def aggregate_of_table(
    m: Maker, table: TableFacts, function: str, column: Column, modified: bool = False
) -> str:
    """도서 평균 가격, 도서의 평균 가격; without the table where the column already names it (길드 레벨)."""
    noun = aggregate_noun(m, function, column)
    if column.ko.startswith(table.ko) and not modified:
        return noun
    return f"{table.ko}의 {noun}" if modified or m.chance(0.35) else f"{table.ko} {noun}"


def extremes(function: str, column: Column | None = None) -> tuple[str, str]:
    """The adjectives for large and small values of an aggregate."""
    if function == "COUNT" or (column is not None and column.high == "많은"):
        return "많은", "적은"
    if function in ("SUM", "MAX", "MIN") or column is None:
        return "큰", "작은"
    return column.high or "높은", column.low or "낮은"


# {g} the group, {n} what is wanted of each ("도서 수"), {t} the table
GROUP_NUMBER: tuple[str, ...] = (
    "{g}별 {n:을/를} <보여>",
    "{g}별 {n:을/를} <구해>",
    "{g}별로 {n:을/를} <구해>",
    "{g}마다 {n:을/를} <구해>",
    "{g}별 {n:은/는} <얼마>",
    "{g}별 {n:이/가} <궁금>.",
    "{g}별 {n}",
    "각 {g}의 {n:을/를} <보여>",
    "각 {g:과/와} {n:을/를} [함께|같이|] <보여>",
    "{g:과/와} {g}별 {n:을/를} <보여>",
    "{g:을/를} 기준으로 묶어 {n:을/를} <구해>",
    "{g}별로 나눠서 {n:을/를} <보여>",
    "{g}에 따른 {n:을/를} <보여>",
    "{g}별 {n:을/를} <싶다>.",
)


GROUP_COUNT: tuple[str, ...] = (
    "{g}별로 {a} {t:이/가} 몇 {u}씩 <있나>",
    "{g}별로 {a} {t:은/는} [각각|] 몇 {u}<인가>",
    "{g}마다 {a} {t:이/가} 몇 {u}인지 [알려줘|세어줘|보여줘|알려주세요|구하시오].",
    "각 {g}{to} {a} {t:이/가} 몇 {u} <있나>",
    "{g}별로 {a} {t:을/를} 세어 {g:과/와} 수를 <보여>",
)


def group_question(
    m: Maker, group: str, adnominal: str, table: TableFacts, noun: str | None = None, people: bool = False
) -> str:
    """Asks for a number per group: `noun` of it, or how many rows if `noun` is None. `people`: groups are people."""
    slots = {"g": group, "a": adnominal, "t": table.ko, "u": table.counter, "to": "에게" if people else "에"}
    if noun is None and m.chance(0.35):
        question = m.say(GROUP_COUNT, **slots)
    else:
        question = m.say(GROUP_NUMBER, n=f"{adnominal} {noun or count_noun(m, table)}".strip(), **slots)
    return question.replace(f"{group}별", group) if group.endswith("별") else question  # 성별별 → 성별


def year_of(column: Column) -> str:
    """How the year of a date column is called: 출간일 → 출간 연도."""
    last = column.ko.rsplit(" ", 1)[-1]
    return f"{column.ko[:-1]} 연도" if len(last) == 3 and last.endswith("일") else f"{column.ko} 기준 연도"


COMPARED = {">=": "이상", ">": "초과", "<=": "이하", "<": "미만"}


def compared_count(m: Maker, mean: float, upwards: bool = False) -> tuple[str, int, str]:
    """A comparison with a count near `mean`: operator, number, and its Korean; `upwards` leaves out 이하 and 미만."""
    number = max(2, round(mean * (0.5 + m.rng.random() * 0.9)))
    operator = m.pick((">=", ">=", ">=", ">") if upwards else (">=", ">=", ">=", ">", "<=", "<"))
    return operator, number, COMPARED[operator]
