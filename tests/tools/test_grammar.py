"""The grammar: its queries run, its questions say what the queries do, and a seed gives the same pairs anywhere."""

from __future__ import annotations

import contextlib
import datetime
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlglot
from sqlglot import expressions as exp

from quantlab.data.domains import Domain, build_database, domain_names, load_domain, parse_domain
from tools.ko_text2sql.grammar import KINDS, Pair, generate
from tools.ko_text2sql.grammar.phrases import say
from tools.ko_text2sql.grammar.words import connective, counted, date_text, listed, number_text, sql_text

DOMAINS = [load_domain(name) for name in domain_names()]


def tiny(*columns: dict[str, object], rows: int = 3) -> Domain:
    """A domain of one table `things` with a key and `columns`."""
    key = {"name": "thing_id", "ko": "물건 번호", "type": "INTEGER", "role": "key"}
    table = {"name": "things", "ko": "물건", "counter": "개", "rows": rows, "columns": [key, *columns]}
    return parse_domain({"db_id": 9, "name": "tiny", "ko": "작은 것", "tables": [table]})


LABEL = {
    "name": "name",
    "ko": "이름",
    "type": "VARCHAR(20)",
    "role": "label",
    "values": ["O'Brien", "둘", "셋"],
}
NUMBER = {"name": "size", "ko": "크기", "type": "INTEGER", "role": "number", "range": [1, 9], "step": 1}
DATE = {
    "name": "made_on",
    "ko": "제작일",
    "type": "DATE",
    "role": "date",
    "range": [datetime.date(2020, 1, 1), datetime.date(2020, 2, 1)],
}
PHONE = {
    "name": "phone",
    "ko": "전화",
    "type": "VARCHAR(20)",
    "role": "text",
    "pattern": "phone",
    "nullable": 0.5,
}


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Domain, Pair]]:
    rng = random.Random(20)
    return [(domain, generate(domain, rng)) for _ in range(300) for domain in DOMAINS]


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, sqlite3.Connection]]:
    folder = tmp_path_factory.mktemp("databases")
    with contextlib.ExitStack() as stack:
        opened = {}
        for domain in DOMAINS:
            build_database(domain, folder / f"{domain.name}.sqlite")
            opened[domain.name] = stack.enter_context(
                contextlib.closing(sqlite3.connect(folder / f"{domain.name}.sqlite"))
            )
        yield opened


def test_queries_parse_run_and_name_their_tables(
    pairs: list[tuple[Domain, Pair]], databases: dict[str, sqlite3.Connection]
) -> None:
    nothing = 0
    for domain, pair in pairs:
        tree = sqlglot.parse_one(pair.sql, read="sqlite")
        named = {table.name for table in tree.find_all(exp.Table)}
        assert named == set(pair.tables), pair
        order = [table.name for table in domain.tables]
        assert list(pair.tables) == sorted(pair.tables, key=order.index)
        rows = databases[domain.name].execute(pair.sql).fetchall()
        nothing += not rows or rows == [(None,)]
    assert nothing < 0.1 * len(pairs)


def test_style_of_the_queries(pairs: list[tuple[Domain, Pair]]) -> None:
    for _, pair in pairs:
        assert pair.sql.endswith(";") and "\n" not in pair.sql
        bare = re.sub(r"'(?:[^']|'')*'", "''", pair.sql)
        assert "  " not in bare and '"' not in bare
        for word in re.findall(r"[A-Za-z_]+", bare):
            assert (
                not re.fullmatch(r"(?i)select|from|where|join|on|and|or|group|by|having|limit|in|is|as", word)
                or word.isupper()
            )
        assert (" T1" in pair.sql) == (" AS T1" in pair.sql)


def test_questions_are_finished_sentences(pairs: list[tuple[Domain, Pair]]) -> None:
    for _, pair in pairs:
        text = pair.question
        assert text == " ".join(text.split()) and 4 <= len(text) <= 160
        assert not re.search(r"[{}<>\[\]|]|None|[은을이과]\(|\([를가와는]\)", text), text
        assert re.search("[가-힣]", text)
        assert pair.level == KINDS[pair.kind].level


def _ending(syllable: str) -> int:
    return (ord(syllable) - 0xAC00) % 28


def _wrong_particles(domain: Domain) -> re.Pattern[str]:
    """Matches any name of the domain with the particle that belongs to the other kind of ending."""
    names = {table.ko for table in domain.tables}
    names |= {column.ko for table in domain.tables for column in table.columns}
    wrong = {
        name + particle
        for name in names
        if "가" <= name[-1] <= "힣"
        for particle in ("는를와" if _ending(name[-1]) else "은을과")
    }
    return re.compile(f"(?:^| )(?:{'|'.join(sorted(wrong - names))}) ")  # 진료과 is a name of its own


def test_particles_agree_with_the_names(pairs: list[tuple[Domain, Pair]]) -> None:
    wrong = {domain.name: _wrong_particles(domain) for domain in DOMAINS}
    assert wrong["library"].search("도서을 찾아줘") and not wrong["library"].search("도서를 찾아줘")
    for domain, pair in pairs:
        assert not wrong[domain.name].search(pair.question), pair


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_asked_in_many_ways(kind: str) -> None:
    rng = random.Random(4)
    skeletons: dict[str, set[str]] = defaultdict(set)
    names = {table.ko for domain in DOMAINS for table in domain.tables}
    names |= {column.ko for domain in DOMAINS for table in domain.tables for column in table.columns}
    pattern = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)))
    for _ in range(160):
        pair = generate(rng.choice(DOMAINS), rng, kind)
        if pair.kind == kind:
            text = re.sub(r"'[^']*'|\"[^\"]*\"|[\d,.]+", "0", pair.question)
            skeletons[kind].add(pattern.sub("X", text))
    assert len(skeletons[kind]) >= 60


def test_all_kinds_come_up_and_levels_are_balanced(pairs: list[tuple[Domain, Pair]]) -> None:
    assert {pair.kind for _, pair in pairs} == set(KINDS)
    for level in ("easy", "medium", "hard"):
        assert sum(pair.level == level for _, pair in pairs) > 0.2 * len(pairs)


def test_comparison_words_match_operators() -> None:
    rng = random.Random(11)
    meaning = {
        "이상": ">=|BETWEEN",
        "이하": "<=|BETWEEN",
        "초과": r"> ",
        "미만": r"< ",
        "넘는": r"> ",
        "넘지 않는": "<=",
    }
    seen = set()
    for _ in range(600):
        pair = generate(rng.choice(DOMAINS), rng, "filter_number")
        for word, operator in meaning.items():
            if word in pair.question:
                seen.add(word)
                assert re.search(operator, pair.sql), pair
    assert seen == set(meaning)


def test_dates_include_what_is_named() -> None:
    rng = random.Random(12)
    seen = set()
    for _ in range(800):
        pair = generate(rng.choice(DOMAINS), rng, "filter_date")
        if "BETWEEN" in pair.sql:
            continue
        for words, operator in (("이후", ">="), ("이전", "<="), ("전에", "<"), ("까지", "<=")):
            found = re.search(rf"(\d{{4}})년 {words}|(\d{{4}})년{words}", pair.question)
            if found:
                seen.add(words)
                year = found[1] or found[2]
                assert f"{operator} '{year}-" in pair.sql, pair
                assert pair.sql[-8:-2] in ({">=": "-01-01", "<": "-01-01", "<=": "-12-31"}[operator]), pair
    assert seen == {"이후", "이전", "전에", "까지"}


def test_what_is_selected_is_asked_for() -> None:
    rng = random.Random(13)
    for kind in (
        "project",
        "filter_category",
        "filter_number",
        "filter_date",
        "filter_and",
        "filter_or",
        "ordered",
    ):
        for _ in range(60):
            domain = rng.choice(DOMAINS)
            pair = generate(domain, rng, kind)
            if pair.kind != kind:
                continue
            table = domain.table(pair.tables[0])
            for item in re.search(r"SELECT (.*?) FROM", pair.sql)[1].split(", "):  # type: ignore[index]
                column = table.column(item)
                said = column.ko.removeprefix(table.ko).strip()
                assert said in pair.question or column is table.label, pair


def test_the_seed_decides() -> None:
    first = [generate(DOMAINS[0], random.Random(seed)) for seed in range(60)]
    generate(DOMAINS[1], random.Random(1))
    assert first == [generate(DOMAINS[0], random.Random(seed)) for seed in range(60)]
    assert len(set(first)) > 55


def test_the_seed_decides_in_another_process() -> None:
    program = (
        "import random\nfrom quantlab.data.domains import load_domain\nfrom tools.ko_text2sql.grammar import generate\n"
        "rng = random.Random(6)\nfor _ in range(50): print(*generate(load_domain('shop'), rng), sep='|')\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and runs[0].count(b"\n") == 50


@pytest.mark.parametrize(
    "columns",
    [(), (LABEL,), (NUMBER,), (PHONE,), (DATE,), (LABEL, NUMBER), (LABEL, NUMBER, PHONE), (DATE, NUMBER)],
)
def test_poor_domains_are_served(columns: tuple[dict[str, object], ...]) -> None:
    domain = tiny(*columns)
    connection = sqlite3.connect(":memory:")
    connection.executescript(domain.ddl())
    rng = random.Random(2)
    for language in ("ko", "en"):
        for _ in range(120):
            pair = generate(domain, rng, language=language)
            connection.execute(pair.sql)
            assert pair.tables == ("things",)
    for kind in KINDS:
        assert generate(domain, rng, kind).kind in (kind, "count_all")
    connection.close()


def test_quotes_in_values_are_escaped() -> None:
    domain = tiny(LABEL, NUMBER)
    rng = random.Random(3)
    asked = [generate(domain, rng, "lookup").sql for _ in range(30)]
    assert any("'O''Brien'" in sql for sql in asked)


def test_english() -> None:
    rng = random.Random(8)
    questions = [(domain, generate(domain, rng, language="en")) for domain in DOMAINS for _ in range(60)]
    for _, pair in questions:
        outside = re.sub(r"'[^']*'", "'x'", pair.question)
        assert re.fullmatch(r"[A-Z][\x20-\x7e]*", outside), pair.question
        assert not re.search(r"[{}<>\[\]]|  |None", outside), pair.question
    assert len({pair.kind for _, pair in questions}) > 30
    with pytest.raises(ValueError, match="'en'"):
        generate(DOMAINS[0], rng, language="fr")


def test_fast_enough() -> None:
    rng = random.Random(1)
    generate(DOMAINS[0], rng)
    start = time.process_time()
    for _ in range(3000):
        generate(DOMAINS[0], rng)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("modifier", "ending", "past", "expected"),
    [
        ("장르가 소설인", "고", False, "장르가 소설이고"),
        ("장르가 소설인", "거나", False, "장르가 소설이거나"),
        ("소설 장르의", "고", False, "소설 장르이고"),
        ("가격이 100원보다 비싼", "고", False, "가격이 100원보다 비싸고"),
        ("무게가 3kg보다 무거운", "거나", False, "무게가 3kg보다 무겁거나"),
        ("기간이 3일보다 긴", "고", False, "기간이 3일보다 길고"),
        ("키가 170cm보다 큰", "고", False, "키가 170cm보다 크고"),
        ("평점이 높은", "거나", False, "평점이 높거나"),
        ("값이 없는", "고", False, "값이 없고"),
        ("2020년에 출간된", "고", True, "2020년에 출간되었고"),
        ("2020년에 가입한", "거나", True, "2020년에 가입했거나"),
        ("2020년에 태어난", "고", True, "2020년에 태어났고"),
        ("2020년에 문을 연", "고", True, "2020년에 문을 열었고"),
        ("희귀본이 아닌", "고", False, "희귀본이 아니고"),
    ],
)
def test_connectives(modifier: str, ending: str, past: bool, expected: str) -> None:
    assert connective(modifier, ending, past) == expected


def test_numbers_dates_and_lists() -> None:
    rng = random.Random(0)
    assert {number_text(rng, "25000", "원") for _ in range(300)} == {
        "25000원", "25,000원", "25000 원", "2만 5천원", "2만 5천 원",
    }  # fmt: skip
    assert {number_text(rng, "1995", "년") for _ in range(200)} <= {"1995년", "1995 년"}
    assert not any(
        text.startswith("1만 만") for text in (number_text(rng, "10000", "만원") for _ in range(200))
    )
    assert {counted(rng, 3, "권") for _ in range(200)} == {"3권", "3 권", "세 권"}
    assert all(counted(rng, 12, "명").startswith("12") for _ in range(50))
    day = datetime.date(2020, 3, 1)
    assert (date_text(day, True), date_text(day, False)) == ("2020년 3월 1일", "2020-03-01")
    assert {listed(rng, ["제목", "가격"]) for _ in range(100)} == {
        "제목과 가격", "제목 및 가격", "제목 그리고 가격", "제목, 가격",
    }  # fmt: skip
    assert sql_text("O'Brien") == "'O''Brien'" and sql_text(3) == "3"


def test_templates() -> None:
    rng = random.Random(0)
    assert say(rng, "{a:은/는} [ |]{b:을/를}", {"a": "책", "b": "가위"}) in ("책은 가위를", "책은  가위를")
    assert {say(rng, "[가|나[다|라]|]", {}) for _ in range(200)} == {"가", "나다", "나라", ""}
    with pytest.raises(ValueError, match="unclosed"):
        say(rng, "[가|나", {})
    with pytest.raises(KeyError):
        say(rng, "{missing}", {})
