"""The schema linker on the bundled questions, with and without Korean names in the DDL, and on DDL of every flavour."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import sqlglot
from hypothesis import given
from hypothesis import strategies as st
from sqlglot import exp

from quantlab.data.domains import load_domain
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.schema_linking import link

REAL = Path(__file__).parents[3] / "shared" / "data" / "text2sql"

SHOP = """-- 회원 정보
CREATE TABLE IF NOT EXISTS "public"."회원" (
  id SERIAL PRIMARY KEY, -- 회원 번호
  이름 TEXT NOT NULL, /* 성명 */
  등급 VARCHAR(10) CHECK (등급 IN ('골드', '실버'))
);  -- 가입한 사람
CREATE TABLE `orders` (
  `id` int AUTO_INCREMENT COMMENT '주문 번호',
  `member` int COMMENT '회원', `amount` int COMMENT '금액; 원',
  FOREIGN KEY (`member`) REFERENCES `회원`(`id`)
) COMMENT='주문';
COMMENT ON COLUMN public."회원".등급 IS '멤버십';
CREATE INDEX by_amount ON orders (amount);
CREATE TABLE branch (a int, b text); -- 매장
PRAGMA user_version = 1;"""

CHAIN = """CREATE TABLE student (sid INTEGER PRIMARY KEY, height REAL);
CREATE TABLE enrolment (sid INTEGER REFERENCES student, cid INTEGER REFERENCES lecture(cid));
CREATE TABLE lecture (cid INTEGER PRIMARY KEY, room TEXT);
CREATE TABLE cafeteria (dish TEXT);"""


def gold_tables(sql: str) -> set[str]:
    tree = sqlglot.parse_one(sql, read="sqlite")
    named = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    return {table.name.lower() for table in tree.find_all(exp.Table)} - named


def commented(db: str, tables: Iterable[str] | None = None) -> str:
    """The DDL of a bundled database with the Korean names of its tables and columns as comments."""
    domain = load_domain(db)
    written = []
    for table in domain.tables:
        if tables is None or table.name in tables:
            first, *lines = table.ddl().split("\n")
            names = [f"{line} -- {column.ko}" for line, column in zip(lines, table.columns, strict=False)]
            written.append("\n".join([f"{first} -- {table.ko}", *names, *lines[len(table.columns) :]]))
    return "\n".join(written)


def measure(rows: Iterable[tuple[str, Item]]) -> tuple[float, float]:
    """(share of golds all of whose tables are kept, share of tables removed)."""
    whole = count = removed = tables = 0
    for context, item in rows:
        linked = link(context, item.question)
        gone = {name.lower() for name in linked.removed}
        whole += not gone & gold_tables(item.answer)
        count += 1
        removed += len(gone)
        tables += len(gone) + len(linked.kept)
    return whole / count, removed / tables


def test_korean_questions_against_english_names_keep_everything() -> None:
    for split in ("dev", "test"):
        for item in load_items(f"ko_text2sql:{split}"):
            linked = link(item.context, item.question)
            assert (linked.context, linked.removed) == (item.context, ())
            assert list(linked.kept) == item.extra["tables"]


def test_the_numbers_of_the_docstring() -> None:
    dev, test = load_items("ko_text2sql:dev"), load_items("ko_text2sql:test")
    own = [measure((commented(i.extra["db"], i.extra["tables"]), i) for i in items) for items in (dev, test)]
    full = [measure((commented(i.extra["db"]), i) for i in items) for items in (dev, test)]
    assert own == [pytest.approx((1.0, 0.356), abs=1e-3), pytest.approx((0.984, 0.287), abs=1e-3)]
    assert full == [pytest.approx((1.0, 0.516), abs=1e-3), pytest.approx((0.992, 0.372), abs=1e-3)]


@pytest.mark.parametrize(
    ("name", "numbers"), [("spider_sample", (0.953, 0.318)), ("defog_sample", (0.972, 0.527))]
)
def test_the_numbers_on_english_questions(name: str, numbers: tuple[float, float]) -> None:
    if not REAL.is_dir():
        pytest.skip("the real questions are not at hand")
    items = load_items(str(REAL / name / "questions.jsonl"))
    assert measure((item.context, item) for item in items) == pytest.approx(numbers, abs=1e-3)


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("실버 멤버십은 몇 명이야?", ("회원", "orders")),  # alone: its neighbour comes along
        ("매장은 몇 개야?", ("branch",)),
        ("주문 금액의 합계", ("회원", "orders")),
        ("매장과 회원을 보여줘", ("회원", "branch")),
        ("가입한 사람과 매장", ("회원", "branch")),  # the comment behind the semicolon
        ("날씨가 어때?", ("회원", "orders", "branch")),  # unsure
        ("", ("회원", "orders", "branch")),
    ],
)
def test_ddl_of_every_flavour(question: str, kept: tuple[str, ...]) -> None:
    assert link(SHOP, question).kept == kept


def test_statements_go_with_their_table_and_stay_as_they_were() -> None:
    linked = link(SHOP, "매장은 몇 개야?")
    assert linked.context == "CREATE TABLE branch (a int, b text); -- 매장\nPRAGMA user_version = 1;"
    assert linked.removed == ("회원", "orders")
    linked = link(SHOP, "주문 금액의 합계")
    assert linked.context == SHOP.replace("CREATE TABLE branch (a int, b text); -- 매장\n", "")


def test_what_joins_two_kept_tables_is_kept() -> None:
    assert link(CHAIN, "height of students in each lecture").kept == ("student", "enrolment", "lecture")
    assert link(CHAIN, "which dishes are there").kept == ("cafeteria",)
    assert link(CHAIN, "the room of the cafeteria").kept == ("lecture", "cafeteria")  # nothing joins them


def test_english_stems_and_compounds() -> None:
    ddl = "CREATE TABLE Registers (x INT);\nCREATE TABLE SongID (a TEXT);\nCREATE TABLE dogs (x INT);"
    assert link(ddl, "Who registered?").kept == ("Registers",)
    assert link(ddl, "song").kept == ("SongID",)
    assert link(ddl, "Is there a dog?").kept == ("dogs",)
    korean = "CREATE TABLE a (x INT); -- 회원 등급\nCREATE TABLE b (x INT); -- 매장"
    assert link(korean, "회원등급별로 알려줘").kept == ("a",)


def test_a_table_without_korean_stays_beside_those_that_have_it() -> None:
    ddl = "CREATE TABLE a (x INT); -- 회원\nCREATE TABLE b (x INT); -- 매장\nCREATE TABLE c (y INT);"
    assert link(ddl, "회원은 몇 명?").kept == ("a", "c")


@given(st.text(max_size=200), st.text(max_size=40))
def test_any_text_is_kept_or_cut_but_never_raises(ddl: str, question: str) -> None:
    linked = link(ddl, question)
    assert linked.removed or linked.context == ddl


@given(
    st.lists(st.sampled_from(SHOP.split() + ["(", ")", ";", "--", "\n", "'", "/*"]), max_size=60),
    st.text(max_size=20),
)
def test_garbled_ddl(words: list[str], question: str) -> None:
    link(" ".join(words), question + "회원 매장")
