"""DDL of three dialects, sloppy DDL and hostile DDL as one schema, and the SQLite database made from it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.schema.schema import Column, ForeignKey, Schema, SchemaError, Table, create_database
from quantlab.text2sql.schema.tokens import guess_dialects

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text2sql"

MYSQL = """-- a dump
/*!40101 SET NAMES utf8 */;
DROP TABLE IF EXISTS `주문`;
CREATE TABLE `고객` (
  `고객_id` int(11) UNSIGNED NOT NULL AUTO_INCREMENT COMMENT '번호; (기본',
  `이름` varchar(20) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT 'x',
  `등급` ENUM('gold','sil''ver','b\\'ronze') DEFAULT 'gold',
  flags SET('a','b'),
  `created` timestamp NULL DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP,
  price decimal(10,2) CHECK (price > 0),
  PRIMARY KEY (`고객_id`),
  UNIQUE KEY `uq` (`이름`(10)),
  KEY `idx` (`등급`) USING BTREE,
  FULLTEXT KEY ft (`이름`)
) ENGINE=InnoDB AUTO_INCREMENT=5 DEFAULT CHARSET=utf8mb4 COMMENT='고객; 표';
CREATE TABLE 주문 (
  id INT AUTO_INCREMENT PRIMARY KEY,
  고객 INT UNSIGNED REFERENCES 고객,
  상태 VARCHAR(10) NOT NULL CHECK (상태 IN ('대기','완료')),
  수량 INT CHECK (수량 BETWEEN 1 AND 10 AND 수량 <> 5),
  주문일 DATE CHECK (주문일 > '2020-02-28'),
  d datetime(6), y YEAR(4), b BIT(1), t TINYINT(1), n int null,
  CONSTRAINT fk FOREIGN KEY fkidx (고객) REFERENCES shop.`고객` (`고객_id`) ON DELETE SET NULL ON UPDATE CASCADE,
  INDEX (상태), CONSTRAINT c CHECK (수량 > 0)
);
ALTER TABLE 주문 ADD COLUMN 메모 TEXT AFTER id, ADD CONSTRAINT u UNIQUE (상태, 수량);
ALTER TABLE 주문 MODIFY n bigint NOT NULL;
INSERT INTO 주문 VALUES (1, 'a;b');
INSERT INTO 주문 VALUES (2, 'a)b');
CREATE VIEW v AS SELECT 1"""

POSTGRES = """
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN public.posint AS integer CHECK (VALUE > 0);
CREATE TABLE public.users (
 id BIGSERIAL PRIMARY KEY,
 "E mail" character varying(50) NOT NULL UNIQUE,
 created timestamp(3) with time zone DEFAULT now() NOT NULL,
 seen TIMESTAMP WITHOUT TIME ZONE,
 m mood DEFAULT 'ok'::mood, p public.posint,
 price numeric(10,2) DEFAULT 0.00, ratio double precision CHECK (ratio >= 0 AND ratio < 1), whole numeric(6),
 tags text[] DEFAULT '{}'::text[], meta jsonb, u uuid DEFAULT gen_random_uuid(),
 ok boolean DEFAULT true, data bytea, t time,
 status text CHECK ((status)::text = ANY ((ARRAY['new'::character varying, 'old'::character varying])::text[])),
 code char(3) CHECK (code ~ '^[A-Z]{3}$'),
 ident integer GENERATED ALWAYS AS IDENTITY,
 full_name text GENERATED ALWAYS AS (status || code) STORED,
 born date CHECK (born <= CURRENT_DATE AND born >= '1900-01-01'::date),
 CONSTRAINT chk CHECK (char_length(status) > 2 OR status ILIKE 'x%')
);
CREATE TABLE child (a integer NOT NULL, b int, uid bigint, PRIMARY KEY (a, b), FOREIGN KEY (uid) REFERENCES users,
  EXCLUDE USING gist (a WITH =));
CREATE SEQUENCE s START 1;
ALTER TABLE ONLY public.child ADD CONSTRAINT fk FOREIGN KEY (a) REFERENCES nowhere(id) NOT VALID;
ALTER TABLE ONLY public.child ALTER COLUMN b SET DEFAULT nextval('s'::regclass);
ALTER TABLE child ALTER COLUMN uid SET NOT NULL;
ALTER TABLE users OWNER TO me;
CREATE UNIQUE INDEX ix ON public.users USING btree (ident);
CREATE UNIQUE INDEX ix2 ON public.users (lower(status));
CREATE UNIQUE INDEX ix3 ON users (price) WHERE ok;
CREATE INDEX ix4 ON users(m);
COMMENT ON TABLE users IS 'it''s';
"""


def column(schema: Schema, table: str, name: str) -> Column:
    found = schema.table(table)
    assert found is not None
    wanted = found.column(name)
    assert wanted is not None
    return wanted


def table(schema: Schema, name: str) -> Table:
    found = schema.table(name)
    assert found is not None
    return found


def made(schema: Schema) -> dict[str, list[str]]:
    """Names of tables and columns in a database made from `schema`."""
    connection = sqlite3.connect(":memory:")
    create_database(schema, connection)
    return names(connection)


def names(connection: sqlite3.Connection) -> dict[str, list[str]]:
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    ).fetchall()
    return {
        name: [row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", (name,))]
        for (name,) in tables
    }


def test_a_mysql_dump() -> None:
    schema = read_schema(MYSQL)
    assert schema.dialect == "mysql" and list(schema.tables) == ["고객", "주문"]
    number = column(schema, "고객", "고객_id")
    assert (
        number.generated
        and number.not_null
        and number.unique
        and number.low == 0
        and number.kind == "integer"
    )
    assert column(schema, "고객", "이름") == Column(
        "이름", "text", "varchar(20)", not_null=True, unique=True, length=20
    )
    assert column(schema, "고객", "등급").choices == ("gold", "sil'ver", "b'ronze")
    assert column(schema, "고객", "flags").choices == ("a", "b")
    assert column(schema, "고객", "price").low == 0.01
    assert (
        column(schema, "고객", "created").kind == "datetime"
        and not column(schema, "고객", "created").not_null
    )
    orders = table(schema, "주문")
    # twice in the DDL, once without columns
    assert orders.foreign_keys == (ForeignKey(("고객",), "고객", ("고객_id",)),)
    assert orders.uniques == (("상태", "수량"),) and orders.primary_key == ("id",)
    assert column(schema, "주문", "상태").choices == ("대기", "완료")
    assert (column(schema, "주문", "수량").low, column(schema, "주문", "수량").high) == (1, 10)
    assert column(schema, "주문", "주문일").low == "2020-02-29"
    assert column(schema, "주문", "n").declared == "bigint" and column(schema, "주문", "n").not_null
    assert [column(schema, "주문", name).kind for name in ("d", "y", "b", "t")] == [
        "datetime",
        "integer",
        "boolean",
        "integer",
    ]
    assert column(schema, "주문", "메모").declared == "TEXT"
    assert schema.notes == (
        "view v: left out",
        "DROP TABLE: left out",
        "INSERT INTO: left out (2 times)",
    )
    assert schema.views == ("v",)
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA foreign_keys = 1")
    create_database(schema, connection)
    connection.execute("INSERT INTO 고객 VALUES (1, 'a', 'gold', 'a,b', NULL, 1)")
    connection.execute("INSERT INTO 주문 (id, 고객, 상태, 수량, n) VALUES (1, 1, '대기', 1, 1)")
    for refused in (
        "INSERT INTO 고객 VALUES (2, 'b', 'tin', NULL, NULL, 1)",  # ENUM
        "INSERT INTO 고객 VALUES (-2, 'b', 'gold', NULL, NULL, 1)",  # UNSIGNED
        "INSERT INTO 고객 VALUES (2, 'a', 'gold', NULL, NULL, 1)",  # UNIQUE
        "INSERT INTO 주문 (id, 고객, 상태, 수량, n) VALUES (2, 9, '대기', 2, 1)",  # foreign key
        "INSERT INTO 주문 (id, 고객, 상태, 수량, n) VALUES (2, 1, '대기', 5, 1)",  # CHECK that no column holds
        "INSERT INTO 주문 (id, 고객, 상태, 수량) VALUES (2, 1, '완료', 2)",  # NOT NULL of the ALTER TABLE
    ):
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(refused)


def test_a_postgres_dump() -> None:
    schema = read_schema(POSTGRES)
    assert schema.dialect == "postgres" and list(schema.tables) == ["users", "child"]
    kinds = {found.name: found.kind for found in table(schema, "users").columns}
    assert kinds == {
        "id": "integer", "E mail": "text", "created": "datetime", "seen": "datetime", "m": "text", "p": "integer",
        "price": "real", "ratio": "real", "whole": "real", "tags": "text", "meta": "text", "u": "text",
        "ok": "boolean",
        "data": "blob", "t": "time", "status": "text", "code": "text", "ident": "integer", "full_name": "text",
        "born": "date",
    }  # fmt: skip
    assert column(schema, "users", "seen").declared == "TIMESTAMP WITHOUT TIME ZONE"
    assert column(schema, "users", "id").generated and column(schema, "users", "ident").generated
    assert column(schema, "users", "ident").unique  # by the index; the other two say something else
    assert table(schema, "users").uniques == (("E mail",), ("ident",))
    assert column(schema, "users", "m").choices == ("sad", "ok")
    assert column(schema, "users", "status").choices == ("new", "old")
    assert (column(schema, "users", "ratio").low, column(schema, "users", "ratio").high) == (0, 0.99)
    assert (column(schema, "users", "born").low, column(schema, "users", "born").high) == (
        "1900-01-01",
        "2024-07-01",
    )
    child = table(schema, "child")
    assert child.primary_key == ("a", "b") and not column(schema, "child", "a").unique
    assert child.foreign_keys == (ForeignKey(("uid",), "users", ("id",)),)
    assert column(schema, "child", "b").generated and column(schema, "child", "uid").not_null
    notes = "\n".join(schema.notes)
    for said in (
        "nowhere is not in the DDL",
        "full_name is computed",
        "CREATE INDEX",
        "COMMENT ON",
        "regular expression",
    ):
        assert said in notes
    assert set(made(schema)) == {"users", "child"}
    connection = sqlite3.connect(":memory:")
    create_database(schema, connection)
    connection.execute(
        "INSERT INTO users (id, [E mail], created, ident, status) VALUES (1, 'a', 'x', 1, 'new')"
    )
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(
            "INSERT INTO users (id, [E mail], created, ident, born) VALUES (2, 'b', 'x', 2, '2025-01-01')"
        )


@pytest.mark.parametrize(
    ("ddl", "dialect"),
    [
        ("CREATE TABLE t (id INT AUTO_INCREMENT PRIMARY KEY)", "mysql"), ("CREATE TABLE `t` (`id` INT)", "mysql"),
        ("CREATE TABLE t (a ENUM('x'))", "mysql"), ("CREATE TABLE t (a INT) ENGINE=MyISAM", "mysql"),
        ("CREATE TABLE t (id SERIAL)", "postgres"), ("CREATE TABLE t (a TIMESTAMP WITH TIME ZONE)", "postgres"),
        ("CREATE TABLE t (a INT DEFAULT '1'::int)", "postgres"), ("CREATE TABLE t (a BOOLEAN DEFAULT TRUE)",
         "postgres"),
        ("CREATE TABLE t (a TEXT[])", "postgres"), ("CREATE TABLE t (a INT)", "sqlite"),
        ("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)", "sqlite"),
        ("CREATE TABLE `t` (\"a\" varchar2(5), foreign key(\"a\") references `u`(\"b\"))", "sqlite"),
        ("CREATE TABLE t (note TEXT DEFAULT 'AUTO_INCREMENT :: SERIAL `x`')", "sqlite"),
    ],
)  # fmt: skip
def test_the_dialect_is_guessed(ddl: str, dialect: str) -> None:
    assert guess_dialects(ddl)[0] == dialect and read_schema(ddl).dialect == dialect


def test_another_dialect_is_tried() -> None:
    assert read_schema("CREATE TABLE t (`a` INT DEFAULT 1::int)").dialect != "postgres"  # no backticks there
    with pytest.raises(SchemaError):
        read_schema("CREATE TABLE t (`a` INT)", "postgres")
    assert read_schema("CREATE TABLE t (a INT)", "mysql").dialect == "mysql"
    with pytest.raises(SchemaError, match="no dialect 'oracle'"):
        read_schema("CREATE TABLE t (a INT)", "oracle")


@pytest.mark.parametrize(
    ("ddl", "expected"),
    [
        ("CREATE TABLE head (age, name, 'born', \"key\")", {"head": ["age", "name", "born", "key"]}),
        ("CREATE TABLE a (x INT) CREATE TABLE b (y INT)", {"a": ["x"], "b": ["y"]}),
        ("Here is the schema:\nCREATE TABLE a (x INT,\n y INT,);;", {"a": ["x", "y"]}),
        ("create table t(key varchar(20), index integer, check text, unique_id int, comment text, first int)",
         {"t": ["key", "index", "check", "unique_id", "comment", "first"]}),
        ("CREATE TEMP TABLE IF NOT EXISTS [my db].[t x] ([a]]b] int, `c``d` int)", {"t x": ["a]b", "c`d"]}),
        ("CREATE TABLE t (id int primary key not null, a int references t(id) foreign key (a) references t(id) "
         "constraint u unique (a, id))", {"t": ["id", "a"]}),
        ("CREATE TABLE t (a VARCHAR2(10 CHAR), b NUMBER(4, 0), c NUMBER, d LONG RAW, e DOUBLE PRECISION NOT NULL)",
         {"t": ["a", "b", "c", "d", "e"]}),
        ("CREATE TABLE t (a int); CREATE TABLE T (b int)", {"t": ["a"]}),
        ("CREATE TABLE u AS SELECT 1; CREATE TABLE t (a int); CREATE TABLE v LIKE t", {"t": ["a"]}),
        ("SET x = 1; USE db; CREATE TABLE t (a int, -- b int,\n /* c int, */ d int)", {"t": ["a", "d"]}),
        ("CREATE TABLE t (2fa int, a$b int, 나이 int, _x int)", {"t": ["2fa", "a$b", "나이", "_x"]}),
    ],
)  # fmt: skip
def test_sloppy_ddl(ddl: str, expected: dict[str, list[str]]) -> None:
    assert made(read_schema(ddl)) == expected


def test_keys_written_in_any_way() -> None:
    schema = read_schema(
        """
        CREATE TABLE enroll (class_code varchar(5), stu int,
          PRIMARY KEY (CLASS_CODE, stu),
          FOREIGN KEY (class_code) REFERENCES Class
          FOREIGN KEY ("stu") REFERENCES "STUDENT"("NUM"),
          FOREIGN KEY (stu) REFERENCES teacher(id),
          FOREIGN KEY (nothing) REFERENCES Class(code),
          FOREIGN KEY (stu) REFERENCES Class(nothing),
          FOREIGN KEY (stu, class_code) REFERENCES Class(code));
        CREATE TABLE Class (code varchar(5) PRIMARY KEY, room text);
        CREATE TABLE Student (num int, name text);
        CREATE TABLE nokey (c text REFERENCES Student);
        """
    )
    enroll = table(schema, "ENROLL")
    assert enroll.primary_key == ("class_code", "stu")
    assert enroll.foreign_keys == (
        ForeignKey(("class_code",), "Class", ("code",)), ForeignKey(("stu",), "Student", ("num",))
    )  # fmt: skip
    assert table(schema, "nokey").foreign_keys == ()
    notes = "\n".join(schema.notes)
    for said in (
        "teacher is not in the DDL",
        "no column nothing",
        "2 columns for 1",
        "no primary key",
        "num need not be unique",
    ):
        assert said in notes
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA foreign_keys = 1")
    create_database(schema, connection)
    connection.execute("INSERT INTO Class VALUES ('a', NULL)")
    # student(num) is no key: SQLite could not check it
    connection.execute("INSERT INTO enroll VALUES ('a', 7)")
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO enroll VALUES ('b', 7)")


@pytest.mark.parametrize(
    ("kind", "check", "low", "high", "choices"),
    [
        ("int", "a > 1", 2, None, None), ("int", "1 < a and a < 9", 2, 8, None), ("int", "a > 1.5", 2, None, None),
        ("int", "a < 1.5", None, 1, None), ("int", "NOT a > 1", None, None, None), ("int", "a > 1 OR a < -1",
         None, None, None),
        ("int", "(a >= -5)", -5, None, None), ("int", "a > b", None, None, None), ("int", "a > 'x'", None, None,
         None),
        ("int", "a IN (1, 2, 2)", None, None, (1, 2)), ("int", "a = 1 OR (a = 2)", None, None, (1, 2)),
        ("int", "a = 1 OR b = 2", None, None, None), ("int", "a NOT IN (1)", None, None, None),
        ("text", "a IN ('x', 'y') AND a <> 'y'", None, None, ("x", "y")), ("text", "a > 'b'", None, None, None),
        ("decimal(5,1)", "a > 0", 0.1, None, None), ("real", "a < 10", None, 9.99, None), ("real", "a > 1e999",
         None, None, None),
        ("date", "a > '2023-12-31'", "2024-01-01", None, None), ("date", "a < '0001-01-01'", None, None, None),
        ("date", "a BETWEEN '2020-01-01' AND '2020-12-31'", "2020-01-01", "2020-12-31", None),
        ("int", "length(a) < 5", None, None, None),
    ],
)  # fmt: skip
def test_checks_become_bounds(kind: str, check: str, low: Any, high: Any, choices: Any) -> None:
    schema = read_schema(f"CREATE TABLE t (a {kind} CHECK ({check}), b int)")
    found = column(schema, "t", "a")
    assert (found.low, found.high, found.choices) == (low, high, choices)
    assert len(table(schema, "t").checks) == 1 and schema.notes == ()


@pytest.mark.parametrize(
    "check", ["a IN (SELECT 1)", "nothing > 1", "a > ", "a; DROP TABLE t", "a FROM t", "unknown_function(a)",
    "a > 1, 2", "*"]
)  # fmt: skip
def test_checks_that_sqlite_cannot_hold_are_dropped_with_a_note(check: str) -> None:
    schema = read_schema(f'CREATE TABLE t (a int CONSTRAINT "c" CHECK ({check.replace(";", "")}) NOT NULL)')
    assert (
        table(schema, "t").checks == ()
        and "left out" in schema.notes[0]
        and column(schema, "t", "a").not_null
    )


def test_a_check_on_the_clock_has_the_fixed_clock() -> None:
    schema = read_schema("CREATE TABLE t (a date CHECK (a <= date('now')))")
    connection = sqlite3.connect(":memory:")
    create_database(schema, connection)
    connection.execute("INSERT INTO t VALUES ('2024-07-01')")
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO t VALUES ('2024-07-02')")


def test_sqlite_keeps_its_affinities() -> None:
    """A query behaves on the made database as on one that SQLite itself makes from the DDL."""
    ddl = "CREATE TABLE t (a DECIMAL(4,1), b, c CHAR(3), d DATE, e BOOLEAN, f FLOAT(8), g STRING, h CHARINT, i BLOB)"
    values = ("'7.0'", "'7.0'", "7", "'2024'", "'1'", "7", "'07'", "'7'", "'7'")
    found = []
    for make in (
        lambda connection: connection.execute(ddl),
        lambda connection: create_database(read_schema(ddl), connection),
    ):
        connection = sqlite3.connect(":memory:")
        make(connection)
        connection.execute(f"INSERT INTO t VALUES ({', '.join(values)})")
        found.append(connection.execute("SELECT *, a / 2, f / 2, d = 2024 FROM t").fetchone())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "ddl",
    [
        "", ";", "SELECT 1", "CREATE TABLE t (a int", "CREATE TABLE t ()", "CREATE TABLE t (a int, A text)",
        "CREATE TABLE",
        'CREATE TABLE "" (a int)', 'CREATE TABLE t ("" int)', "CREATE TABLE t (a int) 'unclosed",
        "CREATE TABLE t (\0 int)",
        "CREATE TABLE t (\ud800 int)", "CREATE TABLE sqlite_master (a int)", "CREATE VIRTUAL TABLE t USING fts5(a)",
        "CREATE TABLE t AS SELECT 1", "CREATE TABLE t (1 int)", "CREATE TABLE t (a int REFERENCES 1)",
        "(" * 50_000, "'" * 50_001,
        "CREATE TABLE t (" + "(" * 500 + ")" * 500 + ")",
        "CREATE TABLE t (a int CHECK (" + "(" * 500 + "1" + ")" * 500 + "))",
        "CREATE TABLE t (" + ", ".join(f"c{i} int" for i in range(2001)) + ")",
        "CREATE TABLE t (a int" + ", UNIQUE (a)" * 600 + ")", "a" * 200_001,
        "".join(f"CREATE TABLE t{i} (a int);" for i in range(2001)), "/*" * 1000, "CREATE " * 5000,
    ],
    ids=range(27),
)  # fmt: skip
def test_what_is_no_schema_is_said(ddl: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_schema(ddl)
    assert 10 < len(str(caught.value)) < 500 and caught.value.exit_code == 4


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE t (a int CHECK (" + "NOT " * 900 + "a))",
        "CREATE TABLE t (a int CHECK (" + "(" * 50 + "a" + ")" * 50 + "))",
        "CREATE TABLE t (a int CHECK (a > " + "1 + " * 900 + "1))",
        "CREATE TABLE t (a int DEFAULT (" + "(" * 50 + ")" * 50 + "))",
        "CREATE TABLE t (a int" + "," * 50_000 + ")", "CREATE TABLE " + "t" * 100_000 + " (a int)",
        "CREATE TABLE t (a enum(" + ",".join(f"'{i}'" for i in range(10_000)) + "))",
        "CREATE TABLE t (a int)" + "; ALTER TABLE t ADD x" * 1,
        "CREATE TABLE t (a int CHECK (a = randomblob(1000000000)))",
    ],
    ids=range(9),
)  # fmt: skip
def test_monsters_that_are_schemas(ddl: str) -> None:
    assert len(made(read_schema(ddl))) == 1


@pytest.mark.parametrize(
    "name",
    ['x"); DROP TABLE y; --', "a'b", "[x]", "`", '""', "select", "ㄱ\n", " ", "x;y", "\\", "a\tb", "%", "--"],
)
def test_names_cannot_break_out(name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    schema = read_schema(
        f"CREATE TABLE victim (a int); CREATE TABLE {quoted} ({quoted} int PRIMARY KEY CHECK ({quoted} > 0), "
        "b text UNIQUE,"
        f" FOREIGN KEY ({quoted}) REFERENCES {quoted}({quoted}))"
    )
    assert made(schema) == {"victim": ["a"], name: [name, "b"]}
    assert made(read_schema(schema.create_sql())) == {"victim": ["a"], name: [name, "b"]}


NAMES = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda name: not name.lower().startswith("sqlite"))
TYPES = st.sampled_from(
    ["INT", "VARCHAR(10)", "DECIMAL(8,2)", "DATE", "TIMESTAMP", "BOOLEAN", "TEXT", "BLOB", "", "my type"]
)
CONSTRAINTS = st.sampled_from(["", " NOT NULL", " UNIQUE", " PRIMARY KEY", " DEFAULT 'x;' NOT NULL", " NULL"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, TYPES, CONSTRAINTS),
        min_size=1,
        max_size=6,
        unique_by=lambda column: column[0].lower(),
    ),
    NAMES,
)
def test_any_names_survive(columns: list[tuple[str, str, str]], name: str) -> None:
    def quote(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    body = ", ".join(f"{quote(column)} {kind}{rest}" for column, kind, rest in columns)
    schema = read_schema(f"CREATE TABLE {quote(name)} ({body})")
    assert made(schema) == {name: [column for column, _, _ in columns]}
    again = read_schema(schema.create_sql(), "sqlite")
    assert made(again) == made(schema)
    for before, after in zip(table(schema, name).columns, table(again, name).columns, strict=True):
        assert (before.name, before.not_null, before.unique) == (after.name, after.not_null, after.unique)


_SOUP = """CREATE TABLE t a b INT ( ( ) ) , , ; PRIMARY KEY FOREIGN REFERENCES UNIQUE CHECK NOT NULL DEFAULT CONSTRAINT
    ALTER ADD COLUMN INDEX ON ENUM ( 'x' ) "q" `b` ' " ` [ ] -- /* */ :: . = > 1 2.5 AS SERIAL GENERATED ALWAYS IDENTITY
    COMMENT ENGINE TYPE DOMAIN MODIFY KEY USING LIKE 가 \\ # $ @ b'1' x'0' IN BETWEEN AND SELECT"""
SOUP = st.sampled_from(_SOUP.split())


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.lists(SOUP, max_size=40).map(" ".join)),
    st.sampled_from([None, "sqlite", "mysql", "postgres"]),
)
def test_anything_ends_in_a_schema_or_a_schema_error(text: str, dialect: str | None) -> None:
    for ddl in (text, f"CREATE TABLE t (a INT, {text})", f"CREATE TABLE t (a INT CHECK ({text}))"):
        try:
            schema = read_schema(ddl, dialect)
        except SchemaError:
            continue
        assert set(made(schema)) == {found.name for found in schema.tables.values()}


def test_read_schema_is_cached_and_a_schema_can_be_a_key() -> None:
    ddl = "CREATE TABLE t (a int)"
    assert read_schema(ddl) is read_schema(ddl)
    assert len({read_schema(ddl), read_schema(ddl + ";")}) == 1


def test_look_ups_ignore_case() -> None:
    schema = read_schema("CREATE TABLE Guests (GuestId INTEGER PRIMARY KEY)")
    assert column(schema, "GUESTS", "guestid").name == "GuestId" and table(schema, "guests").name == "Guests"
    assert schema.table("nobody") is None and table(schema, "guests").column("x") is None
    assert table(schema, "guests").is_key(("guestID",)) and not table(schema, "guests").is_key(())


# --- the DDL of real benchmarks


def distinct(source: str) -> list[Item]:
    found: dict[tuple[str, str], Item] = {}
    for item in load_items(source):
        found.setdefault((item.context, str(item.database)), item)
    return list(found.values())


def same_names(item: Item) -> None:
    """Every table of the DDL is in the populated database, with the same columns, and nothing is lost from it."""
    assert item.database is not None
    connection = sqlite3.connect(f"file:{item.database}?mode=ro", uri=True)
    real = {
        name.lower(): [column.lower() for column in columns] for name, columns in names(connection).items()
    }
    connection.close()
    found = {
        name.lower(): [column.lower() for column in columns]
        for name, columns in made(read_schema(item.context)).items()
    }
    assert len(found) == item.context.upper().count("CREATE TABLE")
    assert found.items() <= real.items()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared samples are not here")
@pytest.mark.parametrize("name", ["spider_sample", "defog_sample"])
def test_the_ddl_of_real_benchmarks(name: str) -> None:
    for item in distinct(str(SHARED / name / "questions.jsonl")):
        same_names(item)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_ddl_of_the_bundled_questions(split: str) -> None:
    items = distinct(f"ko_text2sql:{split}")
    for item in items:
        same_names(item)
        schema = read_schema(item.context)
        assert schema.dialect == "sqlite" and all("is not in the DDL" in note for note in schema.notes)
