"""The pretraining corpus: seeded, varied, without the evaluation prompt, the held-out domain, test and dev."""

from __future__ import annotations

import itertools
import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from quantlab.data.domains import load_domain
from quantlab.data.exclusions import (
    Exclusions,
    evaluation_rows,
    normal_question,
    normal_sql,
    query_aside,
    question_aside,
)
from tools.ko_text2sql.corpus import documents, kinds_and_documents, random_domain, training_domains
from tools.ko_text2sql.corpus.layouts import (
    broken,
    create_table,
    ddl_style,
    lower_keywords,
    schema_text,
    sql_style,
)
from tools.ko_text2sql.corpus.pairs import PairSource, few_pairs, remark, templates
from tools.ko_text2sql.corpus.rows import inserts
from tools.ko_text2sql.corpus.wording import fill
from tools.ko_text2sql.grammar import generate

HEADINGS = ("### DDL", "### Question", "### SQL")


@pytest.fixture(scope="module")
def sample() -> list[tuple[str, str]]:
    """About 2 MB of the stream, with the kind of each document."""
    found: list[tuple[str, str]] = []
    size = 0
    for kind, document in kinds_and_documents(11):
        found.append((kind, document))
        size += len(document.encode())
        if size > 2_000_000:
            return found
    raise AssertionError


def take(stream: Iterator[str], count: int) -> list[str]:
    return list(itertools.islice(stream, count))


def test_the_same_seed_gives_the_same_documents() -> None:
    assert take(documents(3), 40) == take(documents(3), 40)
    assert take(documents(3), 40) != take(documents(4), 40)


def test_the_evaluation_prompt_never_occurs(sample: list[tuple[str, str]]) -> None:
    for _, document in sample:
        assert not any(heading.lower() in document.lower() for heading in HEADINGS)
        assert "###" not in document


def test_the_held_out_domain_never_occurs(sample: list[tuple[str, str]]) -> None:
    game = load_domain("game")
    assert "game" not in {domain.name for domain in training_domains()}
    own = {table.name for table in game.tables} - {t.name for d in training_domains() for t in d.tables}
    assert {"characters", "guilds", "quests"} <= own
    pattern = re.compile(r"CREATE TABLE (?:IF NOT EXISTS )?[\"`]?(\w+)", re.IGNORECASE)
    for _, document in sample:
        assert not own & set(pattern.findall(document))


def test_most_of_the_text_is_questions_with_queries(sample: list[tuple[str, str]]) -> None:
    size = Counter[str]()
    for kind, document in sample:
        size[kind] += len(document.encode())
    total = sum(size.values())
    pairs = (size["domain_pairs"] + size["random_pairs"] + size["english_pairs"]) / total
    assert 0.6 < pairs < 0.8
    assert 1.6 < size["domain_pairs"] / size["random_pairs"] < 2.6
    prose = (size["korean"] + size["english"]) / total
    assert prose > 0.08


def test_documents_hardly_repeat(sample: list[tuple[str, str]]) -> None:
    texts = [document for _, document in sample]
    assert len(set(texts)) > 0.999 * len(texts)
    assert all(
        text.strip() and not re.search(r"\{\w+(?::[^}]*)?\}", text.replace('{"', "")) for text in texts
    )


def test_training_and_held_out_streams_share_no_document() -> None:
    held_out = set(take(documents(1, held_out=True), 60))
    assert not held_out & set(take(documents(1), 3000))


def test_the_stream_is_fast_enough() -> None:
    stream = documents(5)
    next(stream)
    start, size = time.perf_counter(), 0
    for document in stream:
        size += len(document.encode())
        if size > 1_000_000:
            break
    assert size / (time.perf_counter() - start) > 250_000  # bytes a second; about 2.5 MB/s on one idle core


def test_pairs_avoid_what_is_set_aside() -> None:
    domain = load_domain("library")
    source = PairSource(domain, random.Random(1), evaluation_rows(), stock=80)
    for _ in range(30):
        tables, pairs = source.take(4)
        for pair in pairs:
            assert set(pair.tables) <= set(tables)
            assert not question_aside(pair.question)
            assert not query_aside("library", pair.sql)
            assert not evaluation_rows().meets("library", pair.question, pair.sql)


def test_exclusions_see_through_case_spaces_and_punctuation() -> None:
    rows = [{"db": "cafe", "question": "제일 비싼 음료는?", "answer": "SELECT name FROM drinks  LIMIT 1;"}]
    listed = Exclusions(rows)
    assert listed.meets("shop", "제일  비싼 음료는", "SELECT 1")
    assert listed.meets("cafe", "다른 질문", "select NAME from drinks limit 1")
    assert not listed.meets("shop", "다른 질문", "select NAME from drinks limit 1")
    assert normal_sql("SELECT  1 ;") == "select 1"
    assert normal_question("몇 명? ") == "몇명"


def test_about_a_tenth_is_set_aside() -> None:
    domain, rng = load_domain("cafe"), random.Random(2)
    pairs = [generate(domain, rng) for _ in range(2000)]
    assert 0.06 < sum(question_aside(pair.question) for pair in pairs) / len(pairs) < 0.14
    assert 0.06 < sum(query_aside("cafe", pair.sql) for pair in pairs) / len(pairs) < 0.14


def test_random_domains_are_sound_and_their_pairs_run() -> None:
    rng = random.Random(7)
    for _ in range(40):
        domain = random_domain(rng)
        assert 2 <= len(domain.tables) <= 5
        names = [table.name for table in domain.tables]
        linked = {names[0]}
        for _ in names:
            for key in domain.foreign_keys():
                if linked & {key.table, key.parent}:
                    linked |= {key.table, key.parent}
        assert linked == set(names), "the foreign keys do not connect all tables"
        with sqlite3.connect(":memory:") as database:
            database.executescript(domain.ddl())
            for table in domain.tables:
                database.execute(f"SELECT * FROM {table.name}")
            for pair in few_pairs(domain, rng, evaluation_rows(), 8):
                assert set(pair.tables) <= set(names)
                database.execute(pair.sql)


def test_schemas_in_every_style_are_valid_sql() -> None:
    rng = random.Random(8)
    domain = load_domain("hospital")
    names = [table.name for table in domain.tables]
    styles = [ddl_style(rng, canonical=0.2) for _ in range(60)]
    assert len(set(styles)) > 30
    for style in styles:
        with sqlite3.connect(":memory:") as database:
            database.executescript(schema_text(domain, names, style))
            for table in domain.tables:
                found = database.execute(f"SELECT * FROM pragma_table_info('{table.name}')").fetchall()
                assert [row[1] for row in found] == [column.name for column in table.columns]
                assert table.name in create_table(table, style)


def test_query_styles_keep_strings_and_meaning() -> None:
    query = "SELECT name FROM t WHERE name = ' FROM AND SELECT ' AND id IN (SELECT id FROM t WHERE id > 1) LIMIT 1;"
    assert "' FROM AND SELECT '" in lower_keywords(query)
    assert lower_keywords(query).startswith("select name from t where name = ")
    assert broken(query).count("\n") == 3
    assert " ".join(broken(query).split("\n")) == query
    rng = random.Random(9)
    with sqlite3.connect(":memory:") as database:
        database.executescript("CREATE TABLE t (id INTEGER, name TEXT);")
        for _ in range(50):
            database.execute(sql_style(rng)(query))


def test_inserted_rows_fit_their_table() -> None:
    rng = random.Random(10)
    domain = load_domain("shop")
    for table in domain.tables:
        with sqlite3.connect(":memory:") as database:
            database.executescript(table.ddl())
            database.executescript(inserts(table, rng))
            assert database.execute(f"SELECT COUNT(*) FROM {table.name}").fetchone()[0] >= 3


def test_every_arrangement_shows_question_and_query() -> None:
    assert len(templates("pairs")) >= 8
    for template in templates("pairs"):
        text = template.format(q="질문입니다", s="SELECT 1;", n=2)
        assert "질문입니다" in text
        assert "SELECT 1;" in text


def test_no_question_is_asked_and_answered(sample: list[tuple[str, str]]) -> None:
    """A question is a comment beside its query: whoever answers a prompt has learned it elsewhere."""
    comment = re.compile(r"-- |/\* |# ")
    assert all(comment.search(template) for template in templates("pairs"))
    asked = re.compile(r"^\W*(질문|문제|물음|요청|question|q|task|사용자|user)\s*\d*\W*[:.)>\]]", re.I | re.M)
    for _, document in sample:
        assert not asked.search(document), document


def test_english_arrangements_hold_no_korean() -> None:
    for kind in ("pairs", "openings", "bridges"):
        assert len(templates(kind, "en")) >= 2
        assert all(template.isascii() for template in templates(kind, "en"))


def test_every_query_gets_a_remark_that_fits() -> None:
    rng = random.Random(12)
    plain = {remark("SELECT a FROM t;", language, rng) for language in ("ko", "en") for _ in range(40)}
    counted = {
        remark("SELECT COUNT(*) FROM t;", language, rng) for language in ("ko", "en") for _ in range(40)
    }
    assert plain and counted and not plain & counted


def test_fill_agrees_particles_and_nests() -> None:
    pools = {"a": ["책"], "b": ["{a:은/는} 좋다"]}
    assert fill("{a:을/를} {b}", random.Random(1), pools) == "책을 책은 좋다"
    assert fill("{a}", random.Random(1), pools, {"a": "눈"}) == "눈"
    with pytest.raises(KeyError):
        fill("{missing}", random.Random(1), pools)


def test_written_domains_are_not_the_synthetic_ones() -> None:
    names = {random_domain(random.Random(seed)).name for seed in range(200)}
    assert not names & {domain.name for domain in training_domains()}
    assert "game" not in names
