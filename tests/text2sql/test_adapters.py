"""Spider and BIRD in the layout they are unpacked in, in miniature, whole and broken; what all adapters share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import make_database, write_json, write_jsonl

from quantlab.errors import DataError
from quantlab.text2sql.data.benchmarks import ADAPTERS
from quantlab.text2sql.data.benchmarks.schemas import Schemas, create_statements, table_name
from quantlab.text2sql.data.dataset import digest, load_items
from quantlab.text2sql.data.item import BadRow, Item, parse_row
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.scoring.execution import judge

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def test_the_table_names_files_that_are_there() -> None:
    folder = Path(__file__).parents[2] / "quantlab" / "text2sql" / "data" / "benchmarks"
    for target in ADAPTERS.values():
        module, _, function = target.partition(":")
        assert function == "load" and (folder / f"{module.rpartition('.')[2]}.py").is_file()


# Spider


def spider_row(
    query: str, question: str = "How many singers are there?", db: str = "concert_singer"
) -> dict[str, Any]:
    return {
        "db_id": db,
        "query": query,
        "query_toks": query.split(),
        "query_toks_no_value": query.lower().split(),
        "question": question,
        "question_toks": question.split(),
        "sql": {
            "except": None,
            "from": {"conds": [], "table_units": [["table_unit", 1]]},
            "select": [False, []],
        },
    }


@pytest.fixture
def spider(tmp_path: Path) -> Path:
    folder = tmp_path / "spider"
    make_database(folder / "database" / "concert_singer" / "concert_singer.sqlite")
    make_database(
        folder / "database" / "pets_1" / "pets_1.sqlite", "CREATE TABLE Pets (PetID INT, PetType TEXT);"
    )
    write_json(
        folder / "tables.json", [{"db_id": "concert_singer", "table_names_original": ["singer", "concert"]}]
    )
    count = "SELECT count(*) FROM singer"
    write_json(folder / "dev.json", [spider_row(count), spider_row("SELECT Name FROM singer", "Names?")])
    (folder / "dev_gold.sql").write_text(
        f"{count}\tconcert_singer\nSELECT Name FROM singer\tconcert_singer\n\n"
    )
    write_json(folder / "train_spider.json", [spider_row("SELECT PetID FROM Pets", "Pets?", "pets_1")])
    write_json(folder / "train_others.json", [spider_row("SELECT Age FROM singer", "Ages?")])
    return folder


def test_spider(spider: Path) -> None:
    items = load_items(f"spider:{spider}")
    assert [item.id for item in items] == ["1", "2"]
    first = items[0]
    assert first.db_id == "concert_singer" and first.answer == "SELECT count(*) FROM singer"
    assert first.database == spider / "database" / "concert_singer" / "concert_singer.sqlite"
    assert first.context.startswith("CREATE TABLE singer (") and first.context.count("CREATE TABLE") == 2
    assert "INSERT" not in first.context
    assert first.dialect == "sqlite"
    assert first.extra == {"benchmark": "spider", "split": "dev"}  # no token lists, no parse
    assert load_items(f"spider:{spider}:dev") == items
    assert load_items(f"spider:{spider}/dev.json") == items


def test_spider_items_can_be_judged(spider: Path) -> None:
    with Sandbox() as sandbox:
        for item in load_items(f"spider:{spider}:dev"):
            assert item.database is not None
            assert judge(sandbox, item.database, item.golds, item.answer).verdict == "ok"


def test_spider_training_is_two_files(spider: Path) -> None:
    items = load_items(f"spider:{spider}:train")
    assert [(item.id, item.db_id) for item in items] == [("1", "pets_1"), ("2", "concert_singer")]
    write_json(spider / "train.json", [spider_row("SELECT 1", "the same again")] * 2)
    assert len(load_items(f"spider:{spider}:train")) == 2
    assert [item.id for item in load_items(f"spider:{spider}:train", limit=1)] == ["1"]


def test_spider_test_has_its_own_databases(spider: Path) -> None:
    write_json(spider / "test.json", [spider_row("SELECT 1", db="hidden")])
    path = make_database(spider / "test_database" / "hidden" / "hidden.sqlite")
    assert load_items(f"spider:{spider}:test")[0].database == path


def test_spider_prefers_the_schema_file_that_fits(spider: Path) -> None:
    written = spider / "database" / "concert_singer" / "schema.sql"
    text = (
        "PRAGMA foreign_keys = ON;\n-- CREATE TABLE old (a);\n"
        'CREATE TABLE "singer" (\n  "Singer_ID" int, -- the key; of singers\n  "Name" text DEFAULT \'a;b\'\n);\n'
        "INSERT INTO singer VALUES (1, 'CREATE TABLE x (y);');\n"
        "CREATE TABLE concert (concert_ID int);"
    )
    written.write_text(text)
    context = load_items(f"spider:{spider}")[0].context
    assert context.splitlines()[0] == 'CREATE TABLE "singer" (' and "DEFAULT 'a;b'\n);" in context
    assert context.endswith("CREATE TABLE concert (concert_ID int);") and "INSERT" not in context
    for other in (
        "CREATE TABLE singer (a int);",
        "",
        "version https://git-lfs.github.com/spec/v1\n",
        "\x00" * 50,
    ):
        written.write_text(other)
        assert "Age INT" in load_items(f"spider:{spider}")[0].context
    written.write_bytes(b"CREATE TABLE caf\xe9 (a int);")
    assert "Age INT" in load_items(f"spider:{spider}")[0].context


def test_spider_test_suites_name_all_their_databases(spider: Path) -> None:
    folder = spider / "database" / "concert_singer"
    other = make_database(folder / "concert_singer_v1.sqlite")
    items = load_items(f"spider:{spider}")
    assert items[0].extra["databases"] == (str(folder / "concert_singer.sqlite"), str(other))


def test_a_spider_row_without_a_query_is_in_the_gold_file(spider: Path) -> None:
    rows = [{key: value for key, value in spider_row("").items() if key != "query"} for _ in range(3)]
    write_json(spider / "dev.json", rows)
    bad: list[BadRow] = []
    items = load_items(f"spider:{spider}", bad=bad)
    assert [item.answer for item in items] == ["SELECT count(*) FROM singer", "SELECT Name FROM singer"]
    assert bad == [BadRow(f"{spider / 'dev.json'}:row 3", f"{spider / 'dev.json'}:row 3: no 'query'")]


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc",
        "..",
        ".",
        "",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\x00b",
        "C:x",
        ".hidden",
        "x" * 300,
        None,
        7,
        ["a"],
    ],
)
def test_a_database_name_cannot_leave_the_folder(spider: Path, name: Any) -> None:
    make_database(spider.parent / "etc" / "etc.sqlite")
    write_json(spider / "dev.json", [spider_row("SELECT 1"), {**spider_row("SELECT 1"), "db_id": name}])
    with pytest.raises(DataError, match="'db_id' must be the plain name of a database") as caught:
        load_items(f"spider:{spider}")
    assert f"{spider / 'dev.json'}:row 2:" in str(caught.value)


def test_a_missing_database_names_the_path_tried(spider: Path) -> None:
    write_json(spider / "dev.json", [spider_row("SELECT 1", db="gone")])
    with pytest.raises(DataError) as caught:
        load_items(f"spider:{spider}")
    assert str(spider / "database" / "gone" / "gone.sqlite") in str(caught.value)
    assert "dev.json:row 1:" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "dev.json:1: not JSON"),
        ("[\n{}\n,]", "dev.json:3: not JSON"),
        ("{}", "expected a list of questions, found an object"),
        ('"a"', "expected a list of questions, found text"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
        ("[" + "9" * 10_000 + "]", "not JSON that can be read"),
        ("[3]", "row 1: expected an object, found int"),
        ("[[]]", "row 1: expected an object, found a list"),
        ("[{}]", "row 1: 'db_id' must be"),
        ('[{"db_id": "concert_singer", "query": "SELECT 1"}]', "row 1: no 'question'"),
        ('[{"db_id": "concert_singer", "question": "?"}]', "row 1: no 'query'"),
        (
            '[{"db_id": "concert_singer", "question": 3, "query": "x"}]',
            "row 1: 'question' must be text, found int",
        ),
        (
            '[{"db_id": "concert_singer", "question": " ", "query": "x"}]',
            "row 1: 'question' must be text that is not",
        ),
        ("[]", "no rows"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (json.dumps([spider_row("SELECT '" + "x" * 200_000 + "'")]), "row 1: 'query' has 200009 characters"),
    ],
)
def test_a_bad_question_file_is_named(spider: Path, content: str, words: str) -> None:
    (spider / "dev_gold.sql").unlink()
    (spider / "dev.json").write_text(content)
    with pytest.raises(DataError) as caught:
        load_items(f"spider:{spider}")
    assert words in str(caught.value) and str(spider) in str(caught.value)


def test_a_file_that_is_no_database(spider: Path) -> None:
    path = spider / "database" / "concert_singer" / "concert_singer.sqlite"
    for content in (
        b"version https://git-lfs.github.com/spec/v1\n",
        b"SQLite format 3\x00" + b"\xff" * 5000,
        b"x" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no SQLite database") as caught:
            load_items(f"spider:{spider}")
        assert ("git lfs pull" in caught.value.hint) == content.startswith(b"version")
    path.unlink()
    make_database(path, "CREATE VIEW v AS SELECT 1 AS a;")
    with pytest.raises(DataError, match="has no tables"):
        load_items(f"spider:{spider}")


@pytest.mark.parametrize(
    ("source", "words", "hint"),
    [
        ("spider:{folder}:devv", "has no split 'devv'", "did you mean dev?"),
        ("spider:{folder}:xyz", "has no split 'xyz'", "one of: dev, train, test"),
        ("spider:{folder}/none:dev", "no such file or folder: {folder}/none", "form: spider:"),
        ("spider:", "the path is empty", "form: spider:"),
        ("spider:{folder}:test", "no test questions: tried {folder}/test.json", "form"),
        ("spidr:{folder}", "no benchmark 'spidr'", "did you mean spider:{folder}?"),
    ],
)
def test_a_wrong_source_says_what_was_meant(spider: Path, source: str, words: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        load_items(source.format(folder=spider))
    assert words.format(folder=spider) in str(caught.value)
    assert hint.format(folder=spider) in caught.value.hint


def test_a_colon_in_a_folder_is_no_split(spider: Path) -> None:
    moved = spider.rename(spider.with_name("my:spider"))
    assert load_items(f"spider:{moved}") == load_items(f"spider:{moved}:dev")


# BIRD


def bird_row(number: int, sql: str, evidence: str = "", difficulty: str = "simple") -> dict[str, Any]:
    return {
        "question_id": number,
        "db_id": "concerts",
        "question": "How old is the oldest singer?",
        "evidence": evidence,
        "SQL": sql,
        "difficulty": difficulty,
    }


@pytest.fixture
def bird(tmp_path: Path) -> Path:
    folder = tmp_path / "minidev"
    inner = folder / "MINIDEV"
    make_database(inner / "dev_databases" / "concerts" / "concerts.sqlite")
    description = inner / "dev_databases" / "concerts" / "database_description"
    description.mkdir()
    (description / "singer.csv").write_text("original_column_name,column_description\nAge,years\n")
    rows = [
        bird_row(1471, "SELECT MAX(Age) FROM singer", "oldest refers to MAX(Age)"),
        bird_row(1472, "SELECT Name FROM singer ORDER BY Age DESC LIMIT 1", "", "moderate"),
    ]
    write_json(inner / "mini_dev_sqlite.json", rows)
    write_json(inner / "mini_dev_mysql.json", [bird_row(1471, "SELECT MAX(`Age`) FROM `singer`")])
    return folder


def test_bird_mini_dev(bird: Path) -> None:
    items = load_items(f"bird:{bird}")
    assert [item.id for item in items] == ["1471", "1472"]
    assert items[0].extra == {
        "benchmark": "bird",
        "split": "mini_dev",
        "evidence": "oldest refers to MAX(Age)",
        "difficulty": "simple",
    }
    assert items[0].dialect == "sqlite" and items[0].answer == "SELECT MAX(Age) FROM singer"
    assert items[0].context.count("CREATE TABLE") == 2
    assert items == load_items(f"bird:{bird}:mini_dev") == load_items(f"bird:{bird}/MINIDEV")
    assert items == load_items(f"bird:{bird}/MINIDEV/mini_dev_sqlite.json")
    assert load_items(f"bird:{bird}:mini_dev_mysql")[0].dialect == "mysql"


def test_bird_as_json_lines(bird: Path) -> None:
    inner = bird / "MINIDEV"
    expected = load_items(f"bird:{bird}")
    write_jsonl(inner / "mini_dev_sqlite.jsonl", json.loads((inner / "mini_dev_sqlite.json").read_text()))
    (inner / "mini_dev_sqlite.json").unlink()
    assert load_items(f"bird:{bird}") == expected


def test_bird_train_has_no_numbers_and_no_difficulty(tmp_path: Path) -> None:
    make_database(tmp_path / "train" / "train_databases" / "concerts" / "concerts.sqlite")
    row = {"db_id": "concerts", "question": "?", "evidence": "", "SQL": "SELECT 1"}
    write_json(tmp_path / "train" / "train.json", [row, row])
    items = load_items(f"bird:{tmp_path}:train")
    assert [item.id for item in items] == ["1", "2"] and items[0].extra["difficulty"] == ""


def test_bird_rows_without_a_query(bird: Path) -> None:
    inner = bird / "MINIDEV"
    row = {key: value for key, value in bird_row(5, "").items() if key != "SQL"}
    write_json(inner / "mini_dev_sqlite.json", [row])
    with pytest.raises(DataError, match="row 1: no 'SQL'"):
        load_items(f"bird:{bird}")
    (inner / "mini_dev_sqlite_gold.sql").write_text("SELECT Name FROM singer\tconcerts\n")
    assert load_items(f"bird:{bird}")[0].answer == "SELECT Name FROM singer"


def test_bird_complaints(bird: Path, tmp_path: Path) -> None:
    inner = bird / "MINIDEV"
    with pytest.raises(DataError, match="no questions of BIRD"):
        load_items(f"bird:{bird}:dev")
    write_json(inner / "mini_dev_sqlite.json", [{**bird_row(5, "SELECT 1"), "evidence": ["x"]}])
    with pytest.raises(DataError, match="row 1: 'evidence' must be text, found a list"):
        load_items(f"bird:{bird}")


# What all share


def test_the_dialect_of_a_row() -> None:
    row = {"db_id": 1, "context": "CREATE TABLE t (a INT);", "question": "?", "answer": "SELECT a FROM t"}
    plain = parse_row(row, "f:1")
    assert plain.dialect == "" and "dialect" not in plain.extra
    assert parse_row({**row, "dialect": None}, "f:1") == plain
    assert parse_row({**row, "dialect": " PostgreSQL "}, "f:1").dialect == "postgres"
    with pytest.raises(DataError, match="f:1: 'dialect' must be a name"):
        parse_row({**row, "dialect": 3}, "f:1")
    # Data that says nothing of it keeps the digest that published numbers carry.
    assert (
        digest([plain])
        == digest([Item("1", "1", row["context"], "?", "SELECT a FROM t")])
        == "c6b0d2f224667b2b"
    )
    assert digest([parse_row({**row, "dialect": "mysql"}, "f:1")]) != digest([plain])


def test_only_the_rows_asked_for_are_made(spider: Path) -> None:
    write_json(
        spider / "dev.json", [spider_row("SELECT 1"), *(spider_row("SELECT 1", db="gone") for _ in range(99))]
    )
    assert len(load_items(f"spider:{spider}", limit=1)) == 1


def test_reading_does_not_change_the_database(spider: Path) -> None:
    path = spider / "database" / "concert_singer" / "concert_singer.sqlite"
    before = path.read_bytes(), sorted(path.parent.iterdir())
    load_items(f"spider:{spider}")
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == before


def test_the_schemas_of_a_hostile_database(tmp_path: Path) -> None:
    path = make_database(
        tmp_path / "x.sqlite", 'CREATE TABLE "a""b; DROP TABLE c" (d);\nCREATE VIEW v AS SELECT 1;'
    )
    with Schemas() as schemas:
        assert list(schemas.tables(path)) == ['a"b; DROP TABLE c']
        assert schemas.ddl(path) == 'CREATE TABLE "a""b; DROP TABLE c" (d);'


def test_create_statements_end_where_they_end() -> None:
    text = "create table if not exists [a;b] (x);CREATE TABLE `c` (y DEFAULT ';') ; insert into c values(1); "
    text += "CREATE TABLE d (z"
    statements = create_statements(text)
    assert statements == [
        "create table if not exists [a;b] (x);",
        "CREATE TABLE `c` (y DEFAULT ';');",
        "CREATE TABLE d (z;",
    ]
    assert [table_name(statement) for statement in statements] == ["a;b", "c", "d"]
    assert create_statements("'CREATE TABLE") == [] and table_name("SELECT 1") == ""
    assert len(create_statements("CREATE TABLE t (a);\n" * 5000)) == 5000


@pytest.mark.parametrize("piece", ["/*", "'", "[", "\n", " ", "-- x\n", "CREATE ", "; ", '"a""'])
def test_a_hostile_dump_is_read_in_one_pass(piece: str) -> None:
    """Looked at again from each of its pieces, a megabyte would take an hour."""
    assert len(create_statements("CREATE TABLE t (a " + piece * (1_000_000 // len(piece)))) == 1
    assert create_statements(piece * (1_000_000 // len(piece)) + "x") == []


def test_the_samples_at_hand_read_as_rows() -> None:
    """What those files say is Spider's own; here only that the databases are found to hold the tables they name."""
    folder = SHARED / "text2sql" / "spider_sample"
    if not folder.exists():
        pytest.skip("no sample here")
    with Schemas() as schemas:
        for path in sorted((folder / "database").glob("*.sqlite"))[:5]:
            assert schemas.tables(path)
