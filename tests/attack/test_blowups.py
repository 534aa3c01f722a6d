"""Queries without end or without measure, and limits that are met at the edge. Each is named by what stops it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Limits, Sandbox

ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
MANY = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 100000)"
BIG = "WITH RECURSIVE r(x, y) AS (SELECT 1, randomblob(900000) UNION ALL SELECT x + 1, randomblob(900000) FROM r)"
CROSS = ", ".join(f"players p{i}" for i in range(20))
WIDE = ", ".join(f"players p{i}" for i in range(64))
HANG = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"


def growing(first: str, again: str) -> str:
    return f"WITH RECURSIVE r(y) AS (SELECT {first} UNION ALL SELECT {again} FROM r) SELECT MAX(length(y)) FROM r"


def doubling(step: str, times: int = 30) -> str:
    """Common table expressions that each read the one before twice: 2^30 of them when written out."""
    parts = [f"c{i}(a) AS ({step.format(p=f'c{i - 1}')})" for i in range(1, times + 1)]
    return f"WITH c0(a) AS (SELECT 1), {', '.join(parts)} SELECT COUNT(*) FROM c{times}"


ATTACKS: list[tuple[str, str]] = [
    # Without end
    ("steps", f"{ENDLESS} SELECT COUNT(*) FROM r"),
    ("steps", "WITH RECURSIVE r(x) AS (SELECT 1 UNION SELECT x + 1 FROM r) SELECT COUNT(*) FROM r"),
    ("steps", f"{ENDLESS} SELECT 1 WHERE EXISTS (SELECT 1 FROM r WHERE x = 0)"),
    ("steps", f"{ENDLESS} SELECT x FROM r WHERE x < 0 LIMIT 1"),
    ("steps", f"{ENDLESS} SELECT 1 FROM r LIMIT 1 OFFSET 9223372036854775806"),
    ("steps", f"SELECT COUNT(*) FROM {CROSS}"),
    ("steps", f"SELECT MAX(p0.name || p19.name) FROM {CROSS} ORDER BY 1"),
    ("steps|seconds", f"SELECT DISTINCT p0.name || p1.name || p2.name || p3.name FROM {CROSS} ORDER BY 1 DESC"),
    (
        "steps",
        f"SELECT COUNT(*) FROM {CROSS} WHERE "
        + " OR ".join(f"p{i % 20}.level = p{(i * 7) % 20}.player_id" for i in range(400)),
    ),
    (
        "steps",
        f"SELECT COUNT(*) FROM json_each('[{'1,' * 40000}1]') a, json_each('[{'1,' * 400}1]') b",
    ),
    (
        "steps",
        f"{MANY} SELECT SUM(x) OVER (ROWS BETWEEN 50000 PRECEDING AND 50000 FOLLOWING EXCLUDE CURRENT ROW) FROM r",
    ),
    ("steps", f"{MANY} SELECT COUNT(*) FROM (SELECT NTILE(1000000000) OVER (ORDER BY -x) FROM r)"),
    ("steps", f"{MANY} SELECT COUNT(*) FROM r a JOIN r b ON a.x <> b.x"),
    ("too_many_rows", f"{ENDLESS} SELECT x FROM r"),
    ("too_many_rows", "SELECT * FROM players a, players b, players c"),
    ("too_many_rows", "VALUES " + ",".join(["(1)"] * 11_000)),
    # Inside one engine call, where no step is counted
    ("seconds", HANG),
    ("seconds", "SELECT replace(hex(zeroblob(400000)), hex(zeroblob(200000)) || '1', 'x')"),
    ("seconds", "SELECT hex(zeroblob(450000)) LIKE '%' || hex(zeroblob(900)) || '1%'"),
    ("seconds|rows", "SELECT printf('%.*c', 1000000000, 'x')"),
    ("seconds|steps", growing("'[1]'", "json_set(y, '$[#]', 1)")),
    # Without measure
    ("size", "SELECT randomblob(1000000000)"),
    ("size", "SELECT zeroblob(2147483647)"),
    ("size", "SELECT zeroblob(9223372036854775807)"),
    ("size", "SELECT hex(printf('%900000d', 1))"),
    ("size", "SELECT hex(hex(hex(hex(hex(zeroblob(100000))))))"),
    ("size", "SELECT replace(hex(zeroblob(400000)), '0', 'aaaaaaaaaa')"),
    ("size", "SELECT quote(zeroblob(900000))"),
    ("size", "SELECT zeroblob(1000000) || zeroblob(1000000)"),
    ("size", "SELECT group_concat(hex(randomblob(400000))) FROM players WHERE level < 5"),
    ("size", "SELECT json_group_array(hex(randomblob(20000))) FROM players"),
    ("size", f"{MANY} SELECT json_group_array(json_array(x, x, x, x, x, x, x, x, x)) FROM r"),
    ("size", f"{MANY} SELECT group_concat(hex(randomblob(100))) OVER (ORDER BY x) FROM r"),
    ("size", growing("'a'", "y || y")),
    ("size", growing("'[]'", "json_array(y, y)")),
    ("size", f"{BIG} SELECT y FROM r LIMIT 5000"),
    ("size", "SELECT zeroblob(1000000) FROM players"),
    ("size", "SELECT char(128512) || replace(hex(zeroblob(50000)), '0', char(128512)) FROM players"),
    ("size", "SELECT " + ", ".join(["'가나다라마바사'"] * 2000) + " FROM players"),
    ("size", 'WITH c AS (SELECT 1 AS "' + "a" * 2000 + '") SELECT ' + "c.*, " * 1500 + "1 FROM c"),
    ("size", "SELECT '" + "a" * 2_000_000 + "'"),
    ("size", "SELECT 1 IN (" + "1," * 60_000 + "1)"),
    ("size", "SELECT 1" + " " * 200_000),
    ("size", "SELECT '" + "가" * 60_000 + "'"),
    ("memory|seconds", f"{BIG} SELECT COUNT(*) FROM (SELECT * FROM r ORDER BY y)"),
    ("memory|seconds", f"{MANY} SELECT COUNT(*) FROM (SELECT randomblob(1000) AS b FROM r ORDER BY b)"),
    (
        "memory|seconds",
        "WITH RECURSIVE r(x) AS (SELECT randomblob(1000) UNION SELECT randomblob(1000) FROM r) SELECT COUNT(*) FROM r",
    ),
    ("memory|seconds", doubling("SELECT * FROM {p} UNION ALL SELECT * FROM {p}")),
    ("memory|seconds", doubling("SELECT x.a FROM {p} x, {p} y")),
    ("memory|size", "SELECT " + ", ".join(["zeroblob(1000000)"] * 1900)),
    # Too deep, too wide, too long for the parser
    ("sql", "SELECT " + "(" * 5000 + "1" + ")" * 5000),
    ("sql", "SELECT * FROM " + "(SELECT * FROM " * 2000 + "players" + ")" * 2000),
    ("sql", "SELECT " + "CASE WHEN 1 THEN " * 2000 + "1" + " END" * 2000),
    ("sql", "SELECT " + "NOT " * 2000 + "1"),
    ("sql", "SELECT 1 IN (" + "(SELECT 1 IN " * 400 + "(1)" + ")" * 400 + ")"),
    ("sql", "SELECT " + " + ".join(["1"] * 5000)),
    ("sql", " UNION ALL ".join(["SELECT 1"] * 600)),
    ("sql", "SELECT " + ",".join(["1"] * 2001)),
    ("sql", f"SELECT 1 FROM {WIDE}, players q"),
    ("sql", "SELECT json_object(" + ",".join("'a',1" for _ in range(64)) + ")"),
    ("sql", "SELECT COUNT(*) FROM json_each('" + "[" * 3000 + "]" * 3000 + "')"),
    ("sql", "SELECT COUNT(*) FROM players WHERE 'aaaa' LIKE '" + "%a" * 2000 + "'"),
    # Overflow
    ("sql", "SELECT abs(-9223372036854775807 - 1)"),
    ("sql", "SELECT SUM(9223372036854775807) FROM players"),
    ("sql", "SELECT 1 LIMIT 99999999999999999999"),
    ("sql", "SELECT 1 LIMIT 1e400"),
    # Looks worse than it is: all of it within the limits
    ("rows", "SELECT " + "(" * 60 + "1" + ")" * 60),
    ("rows", doubling("SELECT MAX(a) FROM {p}", 900)),
    ("rows", "SELECT COUNT(*) FROM players WHERE hex(zeroblob(450000)) LIKE '" + "%0" * 990 + "1'"),
    ("rows", "SELECT hex(zeroblob(450000)) GLOB '" + "*[0-9]" * 300 + "x'"),
    ("rows", "SELECT 1 IN (" + ",".join(str(i) for i in range(15_000)) + ")"),
    (
        "rows",
        f"SELECT COUNT(*) FROM {WIDE} WHERE " + " AND ".join(f"p{i}.level = p{i + 1}.level + 1" for i in range(63)),
    ),
    ("rows", "SELECT COUNT(*) FROM json_tree('" + "[" * 1000 + "]" * 1000 + "')"),
    ("rows", "SELECT name FROM players LIMIT 9223372036854775807 OFFSET 9223372036854775807"),
    ("rows", "SELECT name FROM players LIMIT -1 OFFSET -9223372036854775808"),
    ("rows", "SELECT 9223372036854775807 + 1, -9223372036854775808 / -1, 1 << 9223372036854775807, 5 % 0"),
    ("rows", "SELECT " + "9" * 90_000),
    ("rows", "SELECT zeroblob(-1), length(randomblob(0)), format('%.900000f', 1e308)"),
    ("rows", "SELECT " + ",".join(["1"] * 2000)),
]  # fmt: skip


@pytest.mark.parametrize(("kinds", "sql"), ATTACKS, ids=[f"{n}-{k}" for n, (k, _) in enumerate(ATTACKS)])
def test_is_held(attack, victim: Path, kinds: str, sql: str) -> None:
    attack(victim, sql, kinds)


def test_limits_are_met_at_the_edge(victim: Path) -> None:
    fits = "SELECT level FROM players -- 가"
    limits = Limits(rows=50, result_bytes=50 * 8 + len("level"), sql_bytes=len(fits.encode()))
    with Sandbox(limits) as sandbox:
        assert len(sandbox.run(victim, fits).rows) == 50
        assert sandbox.run(victim, fits + "나").reason.startswith("the query is longer")
        assert sandbox.run(victim, "SELECT level, 1 FROM players").reason.startswith("the result is larger")
        assert sandbox.run(victim, "SELECT a.level FROM players a, players").kind == "size"
        assert sandbox.run(victim, "SELECT 1 FROM players LIMIT 51").kind == "rows"
    with Sandbox(Limits(rows=49)) as sandbox:
        assert sandbox.run(victim, fits).kind == "too_many_rows"
        assert len(sandbox.run(victim, fits.replace("--", "LIMIT 49 --")).rows) == 49
