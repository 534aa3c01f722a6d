"""What every kind of question is made with: random choices, and the sentences that ask for rows, values or counts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from quantlab.data.schema import Column
from tools.ko_text2sql.grammar.facts import Facts, TableFacts, tables_in_order
from tools.ko_text2sql.grammar.phrases import say
from tools.ko_text2sql.grammar.words import listed

T = TypeVar("T")

_ROWS_NOUN = (  # {np}: "가격이 10000원 이상인 도서의 제목"
    "{np:을/를} <모두> <보여>",
    "{np:을/를} <모두> <보여>",
    "{np} <모두> <보여>",
    "{np} [목록을|리스트를|목록] <보여>",
    "{np:은/는} <무엇>",
    "{np:이/가} <무엇>",
    "{np:은/는} [무엇이|어떤 것이|뭐가] <있나>",
    "{np:을/를} <모두> <싶다>.",
    "{np:이/가} <궁금>.",
    "{np}",
    "{np}[ 목록| 조회| 전체| 리스트|?|]",
)
_ROWS_SPLIT = (  # {adn} {t} and {c} apart
    "{adn} {t:을/를} <모두> [찾아|찾아서|골라|골라서|조회하여|조회해서|뽑아서|검색해] {c:을/를} <보여>",
    "{adn} {t:을/를} <모두> [찾아|찾아서|골라|골라서|조회해서|뽑아서] {c}만 <보여>",
    "{t} <중> {adn} {thing}의 {c:을/를} <보여>",
    "{t} <중> {adn} {thing}의 {c:은/는} <무엇>",
    "{adn} {t:이/가} [있으면|있다면] {c:을/를} <보여>",
    "{adn} {t:은/는} [뭐가|어떤 {thing:이/가}] <있나> {c:으로/로} [알려줘|답해줘|보여줘|알려주세요].",
    "{t}의 {c} <중> {adn} {t}의 것만 <보여>",
    "{adn} {t}에 대해 {c:을/를} <보여>",
    "{adn} {t}들의 {c:을/를} <모두> <보여>",
    "[모든 |]{t} <중>, {adn} {thing}의 {c}",
)
_ROWS_WHICH = (
    "{adn} {t:은/는} <무엇>",
    "{adn} {t:은/는} [어떤 것이|무엇이|뭐가] <있나>",
    "어떤 {t:이/가} {adn} {t}<인가>",
    "{adn} {t:을/를} <모두> <보여>",
    "{t} <중> {adn} {thing:은/는} <무엇>",
)
_PERSON_WHICH = (
    "{adn} {t:은/는} <누구>",
    "{adn} {t:은/는} [누가|어떤 사람이] <있나>",
    "{adn} {t:을/를} <모두> <보여>",
    "{t} <중> {adn} 사람은 <누구>",
)
_VALUE = {
    "number": ("{np:은/는} <얼마>", "{np:은/는} <얼마>", "{np:은/는} 몇 {unit}<인가>"),
    "stored": ("{np:은/는} <얼마>", "{np:은/는} 몇 {unit}<인가>"),
    "date": ("{np:은/는} <언제>",),
    "figure": ("{np:은/는} <얼마>", "{np:은/는} 어떻게 [되나요?|돼?|됩니까?]"),
    "other": ("{np:은/는} <무엇>", "{np:이/가} <무엇>", "{np:은/는} 어떻게 [되나요?|돼?|됩니까?]"),
}
_VALUE_FIGURE = ("{np:을/를} <구해>", "{np:을/를} <구해>", "{np} <구해>")
_VALUE_ANY = (
    "{np:을/를} <보여>",
    "{np:을/를} <보여>",
    "{np:을/를} <싶다>.",
    "{np:이/가} <궁금>.",
    "{np}",
    "{np:은/는}?",
    "{np} <보여>",
)
_COUNT = (
    "{adn} {t:은/는} [모두|총|전부|] 몇 {u}<인가>",
    "{adn} {t:은/는} [모두|총|전부|] 몇 {u:이야/야}?",
    "{adn} {t:은/는} [모두|총|다 해서|] 몇 {u} <있나>",
    "{adn} {t:이/가} [모두|총|] 몇 {u} <있나>",
    "{adn} {t:이/가} [모두|총|] 몇 {u}인지 [알려줘|알려주세요|구해줘|세어줘|세어 주세요|계산해줘|구하시오].",
    "{adn} {t}의 {n:을/를} <구해>",
    "{adn} {t:이/가} 몇 {u:이나/나} [되나요?|돼?|있나요?|있어?]",
    "{adn} {t} {n:을/를} <구해>",
    "{adn} {t}[ | 총 ]{n}",
    "{adn} {t:은/는} [총|모두|] 몇 {u}?",
    "{adn} {t}[ |의 ]{n:은/는} <얼마>",
    "{adn} {t:을/를} [세어 줘|세어줘|모두 세어 주세요|세어 보면 몇 {u}<인가>]",
    "{adn} {t:은/는} [총|모두|] 몇 {u:이나/나} 되는지 [알려줘|알려주세요|궁금해].",
)
_LEAD = (
    "{t} 테이블에서",
    "{t} 정보에서",
    "{t} 데이터에서",
    "{t} 목록에서",
    "데이터베이스에서",
    "DB에서",
    "{t} 자료를 보고",
    "혹시",
    "저기,",
    "{t} 기록에서",
    "{t} 테이블을 조회해서",
)


_SENTENCE_ENDS = ("줘", "요", "오", "다", "라", "해", "어")


class Question(NamedTuple):
    """What a kind makes: the Korean question, the query, and the tables it reads."""

    question: str
    sql: str
    tables: tuple[str, ...]


def without_echo(question: str, table: TableFacts) -> str:
    """학생의 학생 이름 → 학생의 이름, 지점 지점명 → 지점명."""
    ko = table.ko
    for between in ("의 ", "들의 ", " "):
        question = question.replace(f"{ko}{between}{ko} ", f"{ko}{between}")
    return question.replace(f"{ko} {ko}명", f"{ko}명")


class Maker:
    """Random choices and phrases over one domain."""

    def __init__(self, facts: Facts, rng: random.Random) -> None:
        self.facts = facts
        self.rng = rng

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in their original order."""
        chosen = sorted(self.rng.sample(range(len(items)), min(count, len(items))))
        return [items[at] for at in chosen]

    def say(self, templates: str | Sequence[str], **slots: str) -> str:
        return say(self.rng, templates, slots)

    def done(self, question: str, sql: str, *tables: str) -> Question:
        """The finished pair; requests get a full stop now and then."""
        bare = question.rstrip(".")
        if bare.endswith(_SENTENCE_ENDS):
            question = bare + "." if self.rng.random() < 0.4 else bare
        for word in ("기록", "내역", "정보"):
            question = question.replace(f"{word} {word}", word)
        if len(tables) == 1:
            question = without_echo(question, self.facts.tables[self.facts.order[tables[0]]])
        return Question(question, sql + ";", tables_in_order(self.facts, tables))

    def lead(self, question: str, table: TableFacts) -> str:
        """`question`, one time in eight with an opening such as "도서 테이블에서"."""
        if self.chance(0.125) and not question.startswith((f"{table.ko} 중", f"{table.ko} 가운데", "DB")):
            return f"{self.say(_LEAD, t=table.ko)} {question}"
        return question

    # --- the sentences -------------------------------------------------------------------------------------------

    def shown(self, table: TableFacts, count: int = 0, known: Column | None = None) -> list[Column]:
        """Columns to ask for: mostly the label, sometimes others, but not just `known`, which the question is about."""
        pool = table.shown or list(table.table.columns)
        if count == 0:
            roll = self.rng.random()
            count = 1 if roll < 0.72 else 2 if roll < 0.95 else 3
        if table.label and self.chance(0.65):
            others = [column for column in pool if column is not table.label]
            return [table.label, *self.some(others, count - 1)]
        chosen = self.some(pool, count)
        if len(chosen) == 1 and chosen[0] is known and len(pool) > 1:
            chosen = [table.label] if table.label and table.label is not known else [pool[pool[0] is known]]
        return chosen

    def rows(self, adnominal: str, table: TableFacts, columns: Sequence[Column]) -> str:
        """Asks for `columns` of the rows of `table` that `adnominal` describes ("" for all of them)."""
        names = listed(self.rng, [column.ko for column in columns])
        only_label = len(columns) == 1 and columns[0] is table.label
        roll = self.rng.random()
        bound = adnominal.endswith(("의", "속한", "대한"))  # 출판사의 것 would be something else
        thing = table.ko if bound else "사람" if table.person else "것"
        slots = {"adn": adnominal, "t": table.ko, "c": names, "thing": thing}
        if adnominal and only_label and roll < 0.16:
            question = self.say(_PERSON_WHICH if table.person else _ROWS_WHICH, **slots)
        elif adnominal and roll < 0.45:
            question = self.say(_ROWS_SPLIT, **slots)
        else:
            question = self.list_of(f"{adnominal} {self.of(table, names)}")
        return self.lead(without_echo(question, table), table)

    def of(self, table: TableFacts, column: str) -> str:
        """ "도서의 제목", "도서 제목", or just "도서명", "도서 번호" where the column's name says it all."""
        if column.startswith((table.ko + " ", table.ko + "명")):
            return column
        return f"{table.ko}{self.pick(('의 ', '의 ', ' ', '들의 ' if table.person else '의 '))}{column}"

    def list_of(self, noun_phrase: str) -> str:
        return self.say(_ROWS_NOUN, np=noun_phrase.strip())

    def value(self, noun_phrase: str, kind: str = "number", unit: str = "") -> str:
        """Asks for one value; `kind` is number or stored (with a unit), figure (without), date or other."""
        noun_phrase = noun_phrase.strip()
        if self.chance(0.45):
            templates = _VALUE[kind]
            if kind in ("number", "stored") and not unit:
                templates = templates[:1]
            return self.say(templates, np=noun_phrase, unit=unit)
        figure = kind in ("number", "figure") and self.chance(0.5)
        return self.say(_VALUE_FIGURE if figure else _VALUE_ANY, np=noun_phrase)

    def count(self, adnominal: str, table: TableFacts) -> str:
        """Asks how many rows of `table` there are that `adnominal` describes."""
        noun = self.pick(table.count_words)
        return self.lead(self.say(_COUNT, adn=adnominal, t=table.ko, u=table.counter, n=noun), table)
