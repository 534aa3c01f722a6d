"""WikiSQL, sql-eval and ko_text2sql in the layout they are unpacked in, written here in miniature, whole and broken."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import make_database, write_csv, write_json, write_jsonl

from quantlab.errors import DataError
from quantlab.paths import DATA
from quantlab.text2sql.data.benchmarks.sql_eval import expand
from quantlab.text2sql.data.benchmarks.wikisql import write_query
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import BadRow
from quantlab.text2sql.sandbox.pool import Sandbox

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# WikiSQL


@pytest.fixture
def wikisql(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    make_database(
        folder / "dev.db",
        "CREATE TABLE table_1_10007452_3 (col0 text, col1 text, col2 real);\n"
        "INSERT INTO table_1_10007452_3 VALUES ('1998', 'gillig', 1000.0), ('1999', 'o''neil', 7.5);",
    )
    header = ["Order year", "Manufacturer\nname", "Fleet */ numbers -- all"]
    table = {
        "id": "1-10007452-3",
        "header": header,
        "types": ["text", "text", "real"],
        "rows": [["1998", "Gillig", 1000]],
    }
    write_jsonl(folder / "dev.tables.jsonl", [table])
    queries = {
        "who made 1998?": {"sel": 1, "agg": 0, "conds": [[0, 0, "1998"]]},
        "how many?": {"sel": 0, "agg": 3, "conds": [[1, 0, "O'Neil"], [2, 2, "1,000"]]},
        "largest?": {"sel": 2, "agg": 1, "conds": []},
    }
    rows = [
        {"phase": 1, "question": question, "table_id": "1-10007452-3", "sql": query}
        for question, query in queries.items()
    ]
    write_jsonl(folder / "dev.jsonl", rows)
    return folder


def test_wikisql(wikisql: Path) -> None:
    items = load_items(f"wikisql:{wikisql}:dev")
    assert [item.answer for item in items] == [
        "SELECT col1 FROM table_1_10007452_3 WHERE col0 = '1998'",
        "SELECT COUNT(col0) FROM table_1_10007452_3 WHERE col1 = 'o''neil' AND col2 < 1000.0",
        "SELECT MAX(col2) FROM table_1_10007452_3",
    ]
    assert items[0].context.splitlines() == [
        "CREATE TABLE table_1_10007452_3 (",
        "  col0 TEXT, -- Order year",
        "  col1 TEXT, -- Manufacturer name",
        "  col2 REAL -- Fleet */ numbers -- all",
        ");",
    ]
    assert items[0].db_id == "table_1_10007452_3" and items[0].dialect == "sqlite"
    assert items == load_items(f"wikisql:{wikisql.parent}") == load_items(f"wikisql:{wikisql / 'dev.jsonl'}")
    sqlite3.connect(":memory:").executescript(items[0].context)
    with Sandbox() as sandbox:
        rows = [sandbox.run(wikisql / "dev.db", item.answer).rows for item in items]
    assert rows == [(("gillig",),), ((1,),), ((1000.0,),)]


@pytest.mark.parametrize(
    ("value", "kind", "written"),
    [
        ("Abc", "text", "'abc'"),
        ("it's", "text", "'it''s'"),
        ("1,234,567.5", "real", "1234567.5"),
        ("-3", "real", "-3.0"),
        ("about 12 km", "real", "12.0"),
        ("12,5", "real", "12.0"),  # no grouping that a number has: the first number in the text
        (5, "text", "5"),
        (5.25, "real", "5.25"),
    ],
)
def test_wikisql_values(value: Any, kind: str, written: str) -> None:
    sql = write_query({"sel": 0, "agg": 0, "conds": [[0, 1, value]]}, "table_x", [kind], "f:1")
    assert sql == f"SELECT col0 FROM table_x WHERE col0 > {written}"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (None, "'sql' must be an object"),
        ({"sel": 3, "agg": 0, "conds": []}, "sel must be a number from 0 to 2, found 3"),
        ({"sel": -1, "agg": 0, "conds": []}, "sel must be"),
        ({"sel": True, "agg": 0, "conds": []}, "sel must be"),
        ({"sel": "0); DROP TABLE x", "agg": 0, "conds": []}, "sel must be"),
        ({"sel": 0, "agg": 6, "conds": []}, "agg must be a number from 0 to 5"),
        ({"sel": 0, "agg": 0}, "'conds' must be a list"),
        ({"sel": 0, "agg": 0, "conds": [[0, 0]]}, "'conds' must be a list"),
        ({"sel": 0, "agg": 0, "conds": [[0, 3, "x"]]}, "operator of a condition"),  # OP, which no query uses
        ({"sel": 0, "agg": 0, "conds": [[0, 0, ["x"]]]}, "the value of a condition"),
        ({"sel": 0, "agg": 0, "conds": [[2, 0, "none"]]}, "holds no number"),
        ({"sel": 0, "agg": 0, "conds": [[2, 0, float("nan")]]}, "nan is no value"),
    ],
)
def test_wikisql_refuses_structures_that_are_no_query(query: Any, words: str) -> None:
    with pytest.raises(DataError, match="^f:1: ") as caught:
        write_query(query, "table_x", ["text", "text", "real"], "f:1")
    assert words in str(caught.value)


def test_wikisql_complaints(wikisql: Path) -> None:
    with pytest.raises(DataError, match="no .*train.jsonl"):
        load_items(f"wikisql:{wikisql}:train")
    good = (wikisql / "dev.jsonl").read_text()
    for row, words in (
        (
            {"table_id": "1-1-1", "question": "?", "sql": {}},
            "dev.jsonl:4: table '1-1-1' is not in the tables file",
        ),
        ({"question": "?", "sql": {}}, "dev.jsonl:4: no 'table_id'"),
        ({"table_id": 5, "question": "?", "sql": {}}, "dev.jsonl:4: 'table_id' must be text"),
    ):
        (wikisql / "dev.jsonl").write_text(good + json.dumps(row))
        with pytest.raises(DataError) as caught:
            load_items(f"wikisql:{wikisql}")
        assert words in str(caught.value)
    (wikisql / "dev.jsonl").write_text(good + "{")
    with pytest.raises(DataError, match=r"dev\.jsonl:4: not JSON"):
        load_items(f"wikisql:{wikisql}")
    (wikisql / "dev.jsonl").write_text(good)
    write_jsonl(wikisql / "dev.tables.jsonl", [{"id": "1'; DROP", "header": ["a"], "types": ["text"]}])
    with pytest.raises(DataError, match=r"dev\.tables\.jsonl:1: 'id' must be"):
        load_items(f"wikisql:{wikisql}")
    write_jsonl(
        wikisql / "dev.tables.jsonl", [{"id": "1-10007452-3", "header": ["a", "b"], "types": ["text"]}]
    )
    with pytest.raises(DataError, match="lists of the same length"):
        load_items(f"wikisql:{wikisql}")
    write_jsonl(wikisql / "dev.tables.jsonl", [{"id": "2-2-2", "header": ["a"], "types": ["text"]}])
    write_jsonl(wikisql / "dev.jsonl", [{"table_id": "2-2-2", "question": "?", "sql": {}}])
    with pytest.raises(DataError, match="no table table_2_2_2 in"):
        load_items(f"wikisql:{wikisql}")


# sql-eval


def sql_eval_row(query: str, **more: str) -> dict[str, str]:
    row = {
        "db_name": "concerts",
        "query_category": "group_by",
        "question": "What, by singer?",
        "query": query,
    }
    return {**row, "instructions": "", **more}


@pytest.fixture
def sql_eval(tmp_path: Path) -> Path:
    make_database(tmp_path / "data" / "database" / "concerts.sqlite")
    path = tmp_path / "data" / "questions_gen_postgres.csv"
    query = "SELECT {singer.Name, singer.Singer_ID}, COUNT(*) AS n FROM singer GROUP BY {} ORDER BY n DESC NULLS LAST;"
    rows = [
        sql_eval_row(query, instructions="Always filter\nnames, exactly"),
        sql_eval_row("SELECT COUNT(*) FROM singer WHERE Name = 'a;b{c}'", instructions="#NAME?"),
    ]
    write_csv(path, rows)
    return path


def test_sql_eval(sql_eval: Path) -> None:
    items = load_items(f"sql-eval:{sql_eval}")
    assert items[0].golds == (
        "SELECT singer.Name, COUNT(*) AS n FROM singer GROUP BY singer.Name ORDER BY n DESC NULLS LAST",
        "SELECT singer.Singer_ID, COUNT(*) AS n FROM singer GROUP BY singer.Singer_ID ORDER BY n DESC NULLS LAST",
        "SELECT singer.Name, singer.Singer_ID, COUNT(*) AS n FROM singer GROUP BY singer.Name, singer.Singer_ID "
        "ORDER BY n DESC NULLS LAST",
    )
    assert items[0].extra["evidence"] == "Always filter\nnames, exactly"
    assert items[0].extra["query_category"] == "group_by" and "{}" in items[0].extra["query"]
    assert items[0].dialect == items[0].extra["dialect"] == "postgres"
    assert items[1].golds == ("SELECT COUNT(*) FROM singer WHERE Name = 'a;b{c}'",)
    assert items[1].extra["evidence"] == ""
    assert items[0].database == sql_eval.parent / "database" / "concerts.sqlite"
    assert "CREATE TABLE singer" in items[0].context


def test_sql_eval_databases_elsewhere(sql_eval: Path, tmp_path: Path) -> None:
    (sql_eval.parent / "database" / "concerts.sqlite").unlink()
    with pytest.raises(DataError, match="no database for 'concerts': tried .*database/concerts.sqlite"):
        load_items(f"sql-eval:{sql_eval}")
    path = make_database(tmp_path / "elsewhere" / "concerts" / "concerts.sqlite")
    assert load_items(f"sql-eval:{sql_eval}:databases={tmp_path / 'elsewhere'}")[0].database == path
    with pytest.raises(DataError, match="no such folder"):
        load_items(f"sql-eval:{sql_eval}:databases={tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no such folder"):
        load_items(f"sql-eval:{sql_eval}:databases=")


def test_sql_eval_with_dumps_alone_has_ddl_and_no_database(sql_eval: Path, tmp_path: Path) -> None:
    dump = tmp_path / "defog_data" / "concerts" / "concerts.sql"
    dump.parent.mkdir(parents=True)
    dump.write_text(
        "SET x = 'UTF8';\nCREATE TABLE public.singer (\n    singer_id bigint NOT NULL,\n    name text\n);\n"
        "COPY public.singer (singer_id, name) FROM stdin;\n1\tO'Neil\n2\tx\\;y\n\\.\n\n"
        "ALTER TABLE ONLY public.singer ADD CONSTRAINT k PRIMARY KEY (singer_id);\n"
        "CREATE TABLE public.concert (\n    concert_id bigint -- it's a key;\n);\n"
    )
    items = load_items(f"sql-eval:{sql_eval}:databases={dump.parents[1]}")
    assert items[0].database is None
    assert items[0].context.splitlines()[0] == "CREATE TABLE public.singer ("
    assert items[0].context.count("CREATE TABLE") == 2 and "O'Neil" not in items[0].context
    dump.write_text("SELECT 1;")
    with pytest.raises(DataError, match=r"concerts\.sql: no CREATE TABLE statement"):
        load_items(f"sql-eval:{sql_eval}:databases={dump.parents[1]}")


@pytest.mark.parametrize(
    ("name", "column", "dialect"),
    [
        ("questions_gen_postgres.csv", None, "postgres"),
        ("questions_gen.csv", None, "postgres"),
        ("questions_gen_mysql.csv", None, "mysql"),
        ("questions_gen_sqlite.csv", None, "sqlite"),
        ("questions_gen_postgres.csv", "sqlite", "sqlite"),
        ("instruct_advanced_tsql.csv", None, "tsql"),
    ],
)
def test_sql_eval_dialects(sql_eval: Path, name: str, column: str | None, dialect: str) -> None:
    row = sql_eval_row("SELECT 1", **({"db_type": column} if column else {}))
    assert load_items(f"sql-eval:{write_csv(sql_eval.with_name(name), [row])}")[0].dialect == dialect


@pytest.mark.parametrize(
    ("query", "golds"),
    [
        ("SELECT 1", ["SELECT 1"]),
        (" SELECT 1 ; ; SELECT 2;", ["SELECT 1", "SELECT 2"]),
        ("SELECT 1; SELECT 1", ["SELECT 1"]),
        ("SELECT {a} FROM t", ["SELECT a FROM t"]),
        ("SELECT {a,b} FROM t", ["SELECT a FROM t", "SELECT b FROM t", "SELECT a, b FROM t"]),
        ("SELECT {a, f(b, c)} FROM t", ["SELECT a FROM t", "SELECT f(b, c) FROM t", "SELECT a, f(b, c) FROM t"]),
        ("SELECT {a, b \"p,q\"} FROM t", ["SELECT a FROM t", 'SELECT b "p,q" FROM t', 'SELECT a, b "p,q" FROM t']),
        (
            "WITH c AS (SELECT {a, b} FROM t GROUP BY {}, z) SELECT * FROM c",
            [
                "WITH c AS (SELECT a FROM t GROUP BY a, z) SELECT * FROM c",
                "WITH c AS (SELECT b FROM t GROUP BY b, z) SELECT * FROM c",
                "WITH c AS (SELECT a, b FROM t GROUP BY a, b, z) SELECT * FROM c",
            ],
        ),
        ("SELECT {a}, {b, c} FROM t", ["SELECT a, b FROM t", "SELECT a, c FROM t", "SELECT a, b, c FROM t"]),
        ("SELECT ';' -- {x;\n, {a}", ["SELECT ';' -- {x;\n, a"]),
        ("SELECT 'it''s; {x}' /* ; { */ FROM t", ["SELECT 'it''s; {x}' /* ; { */ FROM t"]),
    ],
)  # fmt: skip
def test_golds_are_expanded(query: str, golds: list[str]) -> None:
    assert expand(query) == golds


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (";;", "holds no query"),
        ("SELECT {a FROM t", "braces do not match"),
        ("SELECT a} FROM {t", "braces do not match"),
        ("SELECT {a, {b}} FROM t", "braces do not match"),
        ("SELECT a FROM t GROUP BY {}", "that no braces name"),
        (
            "SELECT {" + ", ".join(f"c{i}" for i in range(8)) + "} FROM t",
            "more than 128 accepted queries (8 optional",
        ),
        (
            "SELECT {" + ", ".join(f"c{i}" for i in range(10_000)) + "} FROM t",
            "more than 128 accepted queries",
        ),
        ("SELECT " + ", ".join("{a, b}" for _ in range(50)), "more than 128 accepted queries"),
        (";".join(f"SELECT {i}" for i in range(129)), "more than 128 accepted queries"),
    ],
)
def test_golds_that_cannot_be_expanded(query: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        expand(query, "f.csv:2")
    assert words in str(caught.value) and str(caught.value).startswith("f.csv:2: ")


def test_the_bound_is_what_it_says() -> None:
    assert len(expand("SELECT {a, b, c, d, e, f, g} FROM t")) == 127
    assert len(expand(";".join(f"SELECT {i}" for i in range(128)))) == 128


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "csv:1: expected a header"),
        ('db_name,query\n"a', "csv:2: not CSV"),
        ('db_name,query\na,b\n\n"x"y,b\n', "csv:4: not CSV"),
        ("db_name,query\na\n", "csv:2: 1 fields where the header names 2"),
        ("db_name,query\n,SELECT 1\n", "csv:2: 'db_name' must be the plain name"),
        ("db_name,query,question\n../x,SELECT 1,?\n", "csv:2: 'db_name' must be the plain name"),
        ("db_name,question\nconcerts,?\n", "csv:2: no 'query'"),
        (
            'db_name,query,question\nconcerts,"SELECT\n1",?\nconcerts,SELECT 1,\n',
            "csv:4: 'question' must be text",
        ),
        ("db_name,query\n" + "x" * 200_000 + ",b\n", "csv:2: not CSV"),
        ("\xff\xfe", "cannot read"),
    ],
)
def test_a_bad_csv_file_is_named(sql_eval: Path, content: str, words: str) -> None:
    sql_eval.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        load_items(f"sql-eval:{sql_eval}")
    assert words in str(caught.value)


def test_expansion_agrees_with_readings_made_by_others() -> None:
    """The sample of defog's data at hand was expanded elsewhere: its accepted queries come in the same order."""
    path = SHARED / "text2sql" / "defog_sample" / "questions.jsonl"
    if not path.exists():
        pytest.skip("no sample here")
    rows = {row["question"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    row = rows["Which authors are not part of any organization?"]
    assert expand("SELECT DISTINCT {name, aid} FROM author WHERE oid IS NULL") == [
        row["answer"],
        *row["alternatives"],
    ]


# shangrilar/ko_text2sql

KO = {
    "db_id": 1,
    "context": "CREATE TABLE `players` (\n  `id` INT PRIMARY KEY AUTO_INCREMENT,\n  `username` VARCHAR(255) UNIQUE\n);",
    "question": "모든 플레이어의 이름은?",
    "answer": "SELECT username FROM players;",
}


def test_ko_text2sql_files(tmp_path: Path) -> None:
    rows = [
        KO,
        {**KO, "db_id": 2, "question": "몇 명?\u2028정말?", "answer": "SELECT COUNT(*) FROM players;"},
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    write_json(tmp_path / "test.json", rows)
    write_csv(tmp_path / "test.csv", [{"": i, **row} for i, row in enumerate(rows)])
    expected = load_items(f"ko_text2sql:{tmp_path / 'test.jsonl'}")
    assert [(item.id, item.db_id, item.dialect) for item in expected] == [
        ("1", "1", "mysql"),
        ("2", "2", "mysql"),
    ]
    assert expected[0].context == KO["context"] and expected[0].database is None
    assert expected[0].extra == {"benchmark": "ko_text2sql"}
    for name in ("test.json", "test.csv"):
        assert load_items(f"ko_text2sql:{tmp_path / name}") == expected


def test_ko_text2sql_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**KO, "db_id": 1.0, "__index_level_0__": 9}, {**KO, "db_id": 2.0, "__index_level_0__": 4}]
    (tmp_path / "data").mkdir()
    for number, row in enumerate(rows):
        parquet.write_table(
            pyarrow.Table.from_pylist([row]), tmp_path / "data" / f"test-0000{number}-of-00002.parquet"
        )
    items = load_items(f"ko_text2sql:{tmp_path}:test")
    assert [(item.id, item.db_id) for item in items] == [("1", "1"), ("2", "2")]
    assert items[0].extra == {"benchmark": "ko_text2sql"}
    (tmp_path / "data" / "test-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a parquet file"):
        load_items(f"ko_text2sql:{tmp_path}:test")


def test_ko_text2sql_rows_without_an_answer(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl", [KO, {**KO, "answer": None}, {**KO, "context": ""}, {**KO, "db_id": None}]
    )
    bad: list[BadRow] = []
    assert len(load_items(f"ko_text2sql:{path}", bad=bad)) == 1
    assert [row.where for row in bad] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert "'answer' must be text, found nothing" in bad[0].reason
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        load_items(f"ko_text2sql:{path}")


def test_ko_text2sql_names_no_database(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{**KO, "database": "/etc/passwd"}])
    assert load_items(f"ko_text2sql:{path}")[0].database is None


def test_ko_text2sql_complaints(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train rows of ko_text2sql: looked for train\.parquet"):
        load_items(f"ko_text2sql:{tmp_path}:train")
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"cannot read \.pkl files"):
        load_items(f"ko_text2sql:{tmp_path / 'x.pkl'}")


def test_the_bundled_name_stays_the_bundled_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (DATA / "ko_text2sql" / "test.jsonl").exists():
        pytest.skip("not built yet")
    expected = load_items("ko_text2sql:test", limit=3)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "test", [KO])
    assert load_items("ko_text2sql:test", limit=3) == expected
    assert all("benchmark" not in item.extra for item in expected)
