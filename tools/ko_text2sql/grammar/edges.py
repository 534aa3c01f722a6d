"""How two tables that a foreign key connects are spoken of, and joined. The child is T1 and its parent T2."""

from __future__ import annotations

from tools.ko_text2sql.grammar.facts import Edge, TableFacts
from tools.ko_text2sql.grammar.maker import Maker
from tools.ko_text2sql.grammar.predicates import Predicate


def join(edge: Edge, kind: str = "JOIN") -> str:
    """FROM child AS T1 JOIN parent AS T2 ON ..."""
    return f"FROM {edge.child.name} AS T1 {kind} {edge.parent.name} AS T2 ON T1.{edge.column.name} = T2.{edge.key}"


# tables named after something people do: 회원이 대출한 도서
_ACTIONS = (
    "대출 대여 구매 구입 예약 주문 예매 수강 관람 시청 구독 신청 처방 판매 집필 출연 평가 방문 이용 사용 조회 찜 추천 "
    "제작 수리 반납 교환 결제 배송 투표 관리 담당 참가 획득 완료 수행 진행 작성 번역 납품 검사 훈련 촬영 전시 후원 "
    "기부 대관 참여 등록"
)
ACTIONS = frozenset(_ACTIONS.split())


def label_noun(table: TableFacts) -> str:
    """What a row's name is called without repeating the table: 의사 이름 → 이름, 지점명 → 이름, 제목 → 제목."""
    label = table.label.ko if table.label else ""
    rest = label.removeprefix(table.ko).strip()
    return "이름" if rest in ("명", "") else rest


def parent_name(m: Maker, edge: Edge) -> str:
    """The parent as the child calls it, or by its own name where only one column can be meant."""
    return edge.parent.ko if edge.alone and m.chance(0.7) else edge.role


def label_phrase(m: Maker, edge: Edge) -> str:
    """The parent's name from the child's side: "출판사 이름", "담당 의사 이름", "담당 의사의 이름"."""
    return m.say(("{r} {l}", "{r}의 {l}", "{r} {l}"), r=edge.role, l=label_noun(edge.parent))


def pick_edge(
    m: Maker, labelled_parent: bool = True, labelled_child: bool = False, numbers: bool = False
) -> Edge | None:
    """A foreign key between two different tables that offer what is needed."""
    fitting = [
        edge
        for edge in m.facts.edges
        if (edge.parent.label or not labelled_parent)
        and (edge.child.label or not labelled_child)
        and (edge.child.numbers or not numbers)
        and edge.child is not edge.parent
    ]
    return m.pick(fitting) if fitting else None


def of_parent(m: Maker, edge: Edge, quoted_label: str) -> str:
    """A modifier of the child: "출판사가 '한빛'인", "출판사 '한빛'의"."""
    forms = ["{r:이/가} {q}인", "{r:이/가} {q}인", "{r} {l:이/가} {q}인", "{r}의 {l:이/가} {q}인"]
    if edge.role == edge.parent.ko:
        forms += ["{r} {q}의", "{q} {r}의", "{r} {q}에 해당하는", "{q:이라는/라는} {r}의"]
    return m.say(forms, r=edge.role, q=quoted_label, l=label_noun(edge.parent))


def parent_modifier(m: Maker, edge: Edge, predicate: Predicate) -> str:
    """A condition on the parent as a modifier of the child: "소재지가 서울인 출판사의", "출판사의 소재지가 서울인"."""
    if predicate.ko.startswith(predicate.column.ko) and m.chance(0.5):
        return m.say("{r}[의 |의 | ]{p}", r=edge.role, p=predicate.ko)
    about = "{p} {r}에 대한" if edge.child.event else "{p} {r}에 속한"
    return m.say(("{p} {r}의", "{p} {r}의", "{p} {r}의", about), p=predicate.ko, r=edge.role)
