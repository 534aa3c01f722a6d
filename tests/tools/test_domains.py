"""Domains: what is refused and how it says so, the DDL, and databases that come out the same everywhere."""

from __future__ import annotations

import copy
import datetime
import hashlib
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.data.domains import (
    DOMAINS,
    build_database,
    domain_names,
    load_domain,
    parse_domain,
    read_domain,
    rows,
)
from quantlab.errors import DataError, MachineError

LIBRARY: dict[str, Any] = {
    "db_id": 99,
    "name": "tiny",
    "ko": "작은 도서관",
    "tables": [
        {
            "name": "members",
            "ko": "회원",
            "counter": "명",
            "rows": 20,
            "columns": [
                {"name": "member_id", "ko": "회원 번호", "type": "INTEGER", "role": "key"},
                {"name": "name", "ko": "이름", "type": "VARCHAR(20)", "role": "label", "person": True},
                {
                    "name": "joined_on",
                    "ko": "가입일",
                    "type": "DATE",
                    "role": "date",
                    "range": [datetime.date(2020, 1, 1), datetime.date(2022, 12, 31)],
                },
            ],
        },
        {
            "name": "books",
            "ko": "도서",
            "counter": "권",
            "rows": 12,
            "columns": [
                {"name": "book_id", "ko": "도서 번호", "type": "INTEGER", "role": "key"},
                {
                    "name": "title",
                    "ko": "제목",
                    "type": "VARCHAR(30)",
                    "role": "label",
                    "values": {
                        "소설": ["봄", "여름", "가을", "겨울", "밤", "낮"],
                        "시": ["강", "산", "들", "별", "달", "해"],
                    },
                },
                {
                    "name": "genre",
                    "ko": "장르",
                    "type": "VARCHAR(10)",
                    "role": "category",
                    "group_of": "title",
                },
                {
                    "name": "rating",
                    "ko": "평점",
                    "type": "DECIMAL(3,1)",
                    "role": "number",
                    "range": [1.0, 5.0],
                    "step": 0.1,
                    "nullable": 0.25,
                },
            ],
        },
        {
            "name": "loans",
            "ko": "대출",
            "counter": "건",
            "rows": 60,
            "unique": ["member_id", "book_id"],
            "columns": [
                {"name": "loan_id", "ko": "대출 번호", "type": "INTEGER", "role": "key"},
                {
                    "name": "member_id",
                    "ko": "회원",
                    "type": "INTEGER",
                    "role": "ref",
                    "ref": "members.member_id",
                },
                {"name": "book_id", "ko": "도서", "type": "INTEGER", "role": "ref", "ref": "books.book_id"},
                {
                    "name": "loaned_on",
                    "ko": "대출일",
                    "type": "DATE",
                    "role": "date",
                    "range": [datetime.date(2020, 1, 1), datetime.date(2023, 12, 31)],
                    "after": "member_id.joined_on",
                },
                {
                    "name": "returned_on",
                    "ko": "반납일",
                    "type": "DATE",
                    "role": "date",
                    "range": [datetime.date(2020, 1, 1), datetime.date(2023, 12, 31)],
                    "after": "loaned_on",
                    "within": [1, 14],
                    "nullable": 0.2,
                },
            ],
        },
    ],
}

GAME_CONTENT = "b28826a59d5c6e470f5da428ee7f5f8cfdc387690190104b387309527e346b2e"


def content(path: Path) -> str:
    """sha256 of all statements and rows: what the file holds, whichever SQLite wrote it."""
    connection = sqlite3.connect(path)
    tables = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
    ).fetchall()
    held = [(sql, connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()) for name, sql in tables]
    connection.close()
    return hashlib.sha256(repr(held).encode()).hexdigest()


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = copy.deepcopy(LIBRARY)
    change(data)
    return data


def column(data: dict[str, Any], table: int, name: str) -> dict[str, Any]:
    return next(c for c in data["tables"][table]["columns"] if c["name"] == name)


def test_game_comes_first_and_every_domain_loads() -> None:
    names = domain_names()
    assert names[0] == "game"
    assert [load_domain(name).db_id for name in names] == list(range(1, len(names) + 1))


def test_ddl_is_what_the_contract_says() -> None:
    domain = parse_domain(LIBRARY)
    assert domain.ddl(["loans", "books"]) == (
        "CREATE TABLE books (\n"
        "  book_id INTEGER PRIMARY KEY,\n"
        "  title VARCHAR(30) NOT NULL,\n"
        "  genre VARCHAR(10) NOT NULL,\n"
        "  rating DECIMAL(3,1)\n"
        ");\n"
        "CREATE TABLE loans (\n"
        "  loan_id INTEGER PRIMARY KEY,\n"
        "  member_id INTEGER NOT NULL,\n"
        "  book_id INTEGER NOT NULL,\n"
        "  loaned_on DATE NOT NULL,\n"
        "  returned_on DATE,\n"
        "  UNIQUE (member_id, book_id),\n"
        "  FOREIGN KEY (member_id) REFERENCES members(member_id),\n"
        "  FOREIGN KEY (book_id) REFERENCES books(book_id)\n"
        ");"
    )
    assert domain.ddl() == "\n".join(table.ddl() for table in domain.tables)
    with pytest.raises(DataError, match="no table author"):
        domain.ddl(["author"])


def test_rows_keep_what_the_yaml_promises() -> None:
    domain = parse_domain(LIBRARY)
    filled = rows(domain, seed=3)
    assert {name: len(cells) for name, cells in filled.items()} == {"members": 20, "books": 12, "loans": 60}
    joined = {key: day for key, _, day in filled["members"]}
    genre_of = dict(domain.table("books").column("title").groups)
    for _, title, genre, rating in filled["books"]:
        assert title in genre_of[str(genre)]
        assert rating is None or round(float(rating) * 10, 9) in range(10, 51)
    assert sum(row[3] is None for row in filled["books"]) == 3
    assert len({(member, book) for _, member, book, _, _ in filled["loans"]}) == 60
    for _, member, _, loaned, returned in filled["loans"]:
        assert joined[member] <= loaned
        if returned is not None:
            days = datetime.date.fromisoformat(str(returned)) - datetime.date.fromisoformat(str(loaned))
            assert 1 <= days.days <= 14
    assert sum(row[4] is None for row in filled["loans"]) == 12


def test_some_parents_have_no_child_and_some_have_many() -> None:
    filled = rows(load_domain("game"))
    owners = [row[2] for row in filled["characters"]]
    assert len(set(owners)) < len(filled["players"]) * 0.9
    assert max(owners.count(owner) for owner in set(owners)) >= 5


@pytest.mark.parametrize("name", domain_names())
def test_databases_are_populated_and_foreign_keys_hold(name: str, tmp_path: Path) -> None:
    domain = load_domain(name)
    path = tmp_path / "out" / f"{name}.sqlite"
    build_database(domain, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for table in domain.tables:
        count = connection.execute(f"SELECT COUNT(*) FROM {table.name}").fetchone()[0]
        assert count == table.rows
        for col in table.columns:
            nulls = connection.execute(
                f"SELECT COUNT(*) FROM {table.name} WHERE {col.name} IS NULL"
            ).fetchone()
            assert (nulls[0] > 0) == (col.nullable > 0), f"{table.name}.{col.name}"
        if table.label is not None:
            query = f"SELECT COUNT(DISTINCT {table.label.name}) FROM {table.name}"
            assert connection.execute(query).fetchone()[0] == count
    connection.close()


def test_rebuilding_gives_the_same_content_whatever_ran_before(tmp_path: Path) -> None:
    domain = load_domain("game")
    build_database(domain, tmp_path / "a.sqlite", seed=0)
    random.seed(5)
    random.random()
    build_database(read_domain(DOMAINS / "game.yaml"), tmp_path / "b.sqlite", seed=0)
    build_database(domain, tmp_path / "c.sqlite", seed=1)
    assert content(tmp_path / "a.sqlite") == content(tmp_path / "b.sqlite") != content(tmp_path / "c.sqlite")


def test_the_game_database_is_the_one_the_test_set_was_written_for(tmp_path: Path) -> None:
    build_database(load_domain("game"), tmp_path / "game.sqlite")
    assert content(tmp_path / "game.sqlite") == GAME_CONTENT


def test_a_new_column_leaves_the_other_columns_as_they_were() -> None:
    extra = {"name": "phone", "ko": "전화번호", "type": "VARCHAR(20)", "role": "text", "pattern": "phone"}
    wider = parse_domain(changed(lambda d: d["tables"][0]["columns"].insert(1, extra)))
    before, after = rows(parse_domain(LIBRARY)), rows(wider)
    assert [(row[0], *row[2:]) for row in after["members"]] == before["members"]
    assert after["loans"] == before["loans"]
    assert len({row[1] for row in after["members"]}) == 20


def test_a_database_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "file").write_text("mine")
    with pytest.raises(MachineError, match="cannot write"):
        build_database(parse_domain(LIBRARY), target)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        load_domain("gane")
    assert "game" in caught.value.hint


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda d: column(d, 1, "rating").update(stepp=2), "books.rating: unknown key 'stepp'"),
    "missing key": (lambda d: d["tables"][0].pop("counter"), "table members: counter is missing"),
    "not a mapping": (lambda d: d["tables"].append("books"), "expected keys and values"),
    "unknown role": (lambda d: column(d, 1, "rating").update(role="numbr"), "unknown role 'numbr'"),
    "key of another role": (lambda d: column(d, 1, "rating").update(verb="x"), "verb does not belong to role number"),
    "unknown type": (lambda d: column(d, 1, "rating").update(type="FLOAT8"), "unknown type 'FLOAT8'"),
    "type against role": (lambda d: column(d, 1, "rating").update(type="DATE"), "does not go with type DATE"),
    "SQL keyword": (lambda d: column(d, 1, "rating").update(name="order"), "no SQL keyword"),
    "injected name": (lambda d: column(d, 1, "rating").update(name="a); DROP"), "lower snake_case"),
    "two of a name": (lambda d: column(d, 1, "rating").update(name="genre"), "column genre appears twice"),
    "no key column": (lambda d: d["tables"][0]["columns"].pop(0), "a table has one key column, this one has 0"),
    "too few labels": (lambda d: d["tables"][1].update(rows=13), "13 rows need as many different labels, there are 12"),
    "too long a value": (lambda d: column(d, 1, "title").update(type="CHAR(1)"), "does not fit"),
    "no source of values": (lambda d: column(d, 0, "name").pop("person"), "exactly one of values"),
    "value not text": (lambda d: column(d, 1, "title").update(values=[1, 2]), "value 1 is not text"),
    "range backwards": (lambda d: column(d, 1, "rating").update(range=[5, 1]), "from the smaller to the larger"),
    "range of text": (lambda d: column(d, 1, "rating").update(range=["a", "b"]), "range needs two numbers"),
    "nullable of text": (lambda d: column(d, 1, "rating").update(nullable="half"), "nullable must be a number"),
    "group without values": (lambda d: column(d, 1, "title").update(values={"시": None}), "values must be a list"),
    "within of one": (lambda d: column(d, 2, "returned_on").update(within=3), "within must be two whole numbers"),
    "step zero": (lambda d: column(d, 1, "rating").update(step=0), "step must be a number above 0"),
    "all null": (lambda d: column(d, 1, "rating").update(nullable=1), "share of NULLs"),
    "ref to nowhere": (lambda d: column(d, 2, "book_id").update(ref="book.book_id"), "ref book.book_id is not the key"),
    "ref to a non-key": (lambda d: column(d, 2, "book_id").update(ref="books.title"), "is not the key of a table"),
    "group of nothing": (lambda d: column(d, 1, "genre").update(group_of="rating"), "no such label"),
    "after a later column": (lambda d: column(d, 2, "loaned_on").update(after="returned_on"), "stands before this one"),
    "after itself": (lambda d: column(d, 2, "loaned_on").update(after="loaned_on"), "stands before this one"),
    "unique of a non-ref": (lambda d: d["tables"][2].update(unique=["member_id", "loaned_on"]), "unique takes"),
    "apart": (lambda d: d["tables"].pop(2), "no foreign key connects books to members"),
    "no rows": (lambda d: d["tables"][0].update(rows=0), "rows must be a whole number from 1"),
    "db_id": (lambda d: d.update(db_id="1"), "db_id must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_yaml_is_refused_with_the_place(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(DataError) as caught:
        parse_domain(changed(change), "tiny.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("tiny.yaml")


def test_more_combinations_than_there_are_is_refused() -> None:
    crowded = parse_domain(changed(lambda d: d["tables"][2].update(rows=241)))  # 20 members × 12 books
    with pytest.raises(DataError, match="cannot hold 241 different combinations"):
        rows(crowded)


def test_broken_yaml_and_missing_files_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [", encoding="utf-8")
    with pytest.raises(DataError, match="not valid YAML"):
        read_domain(tmp_path / "bad.yaml")
    with pytest.raises(DataError, match="cannot read"):
        read_domain(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="expected keys and values"):
        read_domain(tmp_path / "list.yaml")
