"""Mutants: every operator makes what it says, the tree survives, and what means the same is not made."""

import sqlite3

import pytest

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.schema.schema import create_database
from quantlab.text2sql.testdata.mutants import mutants
from quantlab.text2sql.testdata.mutation_target import target_of
from quantlab.text2sql.testdata.operators import OPERATORS

DDL = """
CREATE TABLE members (id INTEGER PRIMARY KEY, name VARCHAR(30) NOT NULL, city VARCHAR(20), age INTEGER NOT NULL,
  joined_on DATE NOT NULL, is_active BOOLEAN NOT NULL);
CREATE TABLE loans (id INTEGER PRIMARY KEY, member_id INTEGER NOT NULL, helper_id INTEGER, fee INTEGER,
  days INTEGER NOT NULL, loaned_on DATE NOT NULL, FOREIGN KEY (member_id) REFERENCES members(id),
  FOREIGN KEY (helper_id) REFERENCES members(id));
"""
SCHEMA = read_schema(DDL)


def made(sql: str, operator: str) -> list[str]:
    return [mutant.sql for mutant in mutants(sql, SCHEMA) if mutant.operator == operator]


CASES = [
    ("boundary", "SELECT name FROM members WHERE age > 30", "age >= 30"),
    ("direction", "SELECT name FROM members WHERE age > 30", "age < 30"),
    ("direction", "SELECT name FROM members WHERE city = '서울'", "city <> '서울'"),
    ("connective", "SELECT name FROM members WHERE age > 30 AND city = 'x'", "age > 30 OR city = 'x'"),
    ("dropped predicate", "SELECT name FROM members WHERE age > 30 AND city = 'x'", "WHERE city = 'x'"),
    ("dropped predicate", "SELECT name FROM members WHERE age > 30", "FROM members"),
    ("negated predicate", "SELECT name FROM members WHERE city IS NULL", "NOT city IS NULL"),
    ("negated predicate", "SELECT name FROM members WHERE city IS NOT NULL", "city IS NULL"),
    ("negated predicate", "SELECT name FROM members WHERE is_active", "NOT is_active"),
    ("null filter", "SELECT city FROM members WHERE age > 3", "AND NOT city IS NULL"),
    ("aggregate", "SELECT SUM(fee) FROM loans", "AVG(fee)"),
    ("aggregate", "SELECT MIN(fee) FROM loans", "MAX(fee)"),
    ("count", "SELECT COUNT(DISTINCT city) FROM members", "COUNT(city)"),
    ("count", "SELECT COUNT(*) FROM members WHERE age > 3", "COUNT(city)"),
    ("distinct", "SELECT city FROM members", "SELECT DISTINCT city"),
    ("distinct", "SELECT DISTINCT city FROM members", "SELECT city"),
    ("join kind", "SELECT m.name FROM members m JOIN loans l ON l.member_id = m.id", "LEFT JOIN"),
    (
        "join kind",
        "SELECT m.name, l.id FROM members m LEFT JOIN loans l ON l.member_id = m.id",
        " JOIN loans",
    ),
    ("sort direction", "SELECT name FROM members ORDER BY age", "age DESC"),
    ("sort dropped", "SELECT name FROM members ORDER BY age, name", "ORDER BY age"),
    ("limit", "SELECT name FROM members ORDER BY age LIMIT 3", "LIMIT 4"),
    ("limit", "SELECT name FROM members ORDER BY age LIMIT 1 OFFSET 1", "OFFSET 2"),
    ("literal", "SELECT name FROM members WHERE age > 30", "age > 31"),
    ("literal", "SELECT name FROM members WHERE joined_on > '2023-01-01'", "'2024-01-01'"),
    ("like pattern", "SELECT age FROM members WHERE name LIKE '김%'", "LIKE '%김%'"),
    ("between bounds", "SELECT name FROM members WHERE age BETWEEN 10 AND 20", "age > 10"),
    ("in list", "SELECT name FROM members WHERE city IN ('a', 'b')", "IN ('a')"),
    ("column", "SELECT fee FROM loans", "SELECT days"),
    ("join column", "SELECT m.name FROM members m JOIN loans l ON l.member_id = m.id", "l.helper_id = m.id"),
    ("set operation", "SELECT city FROM members UNION SELECT name FROM members", "UNION ALL"),
    ("set operation", "SELECT city FROM members EXCEPT SELECT name FROM members", "INTERSECT"),
    ("grouping", "SELECT city, age, COUNT(*) FROM members GROUP BY city, age", "GROUP BY city"),
    ("having", "SELECT city FROM members GROUP BY city HAVING COUNT(*) > 1", "GROUP BY city"),
    ("arithmetic", "SELECT fee + days FROM loans", "fee - days"),
    ("null default", "SELECT COALESCE(fee, 0) FROM loans", "SELECT fee"),
    ("case branch", "SELECT CASE WHEN fee > 3 THEN 'a' ELSE 'b' END FROM loans", "THEN 'b'"),
    ("date part", "SELECT STRFTIME('%Y', joined_on) FROM members", "'%m'"),
    ("function dropped", "SELECT ROUND(fee) FROM loans", "SELECT fee"),
]


@pytest.mark.parametrize(("operator", "sql", "wanted"), CASES)
def test_each_operator_makes_its_edit(operator: str, sql: str, wanted: str) -> None:
    assert any(wanted in text for text in made(sql, operator)), made(sql, operator)


def test_every_operator_has_a_case() -> None:
    assert {operator for operator, _, _ in CASES} == set(OPERATORS)
    assert len(OPERATORS) >= 15


@pytest.mark.parametrize(
    ("operator", "sql"),
    [
        (
            "join kind",
            "SELECT l.fee, m.name FROM loans l JOIN members m ON l.member_id = m.id",
        ),  # NOT NULL foreign key
        ("join kind", "SELECT m.name FROM members m LEFT JOIN loans l ON l.member_id = m.id WHERE l.fee > 3"),
        ("distinct", "SELECT id, name FROM members"),
        ("distinct", "SELECT city, COUNT(*) FROM members GROUP BY city"),
        ("distinct", "SELECT COUNT(*) FROM members"),
        ("count", "SELECT COUNT(id) FROM members"),
        ("limit", "SELECT name FROM members WHERE age = (SELECT MAX(age) FROM members LIMIT 1)"),
    ],
)
def test_what_means_the_same_is_not_made(operator: str, sql: str) -> None:
    assert made(sql, operator) == []


def test_a_grouping_key_that_another_one_decides_is_not_dropped() -> None:
    texts = made("SELECT name, COUNT(*) FROM members GROUP BY id, name", "grouping")
    assert [text.rpartition("GROUP BY ")[2] for text in texts] == ["name"]


def test_a_nullable_foreign_key_is_another_matter() -> None:
    assert made("SELECT l.fee, m.name FROM loans l JOIN members m ON l.helper_id = m.id", "join kind")


def test_the_tree_is_whole_afterwards() -> None:
    for _, sql, _ in CASES:
        target = target_of(sql, SCHEMA)
        assert target is not None
        before = target.text()
        for operator in OPERATORS.values():
            list(operator(target))
            assert target.text() == before


def test_mutants_run_and_come_once_each_in_a_fixed_order() -> None:
    items = load_items("ko_text2sql:dev", 60) + load_items("ko_text2sql:test", 40)
    failed = total = 0
    for item in items:
        schema = read_schema(item.context)
        connection = sqlite3.connect(":memory:")
        create_database(schema, connection)
        found = mutants(item.answer, schema)
        assert found == mutants(item.answer, schema)
        assert len({mutant.sql for mutant in found}) == len(found)
        for mutant in found:
            total += 1
            try:
                connection.execute(mutant.sql)
            except sqlite3.Error:
                failed += 1
        connection.close()
    assert total > 800 and failed <= 0.01 * total, (failed, total)


def test_a_name_in_double_quotes_that_is_no_column_is_a_string() -> None:
    texts = [mutant.sql for mutant in mutants('SELECT name FROM members WHERE city = "서울"', SCHEMA)]
    assert any("city <> '서울'" in text for text in texts)


@pytest.mark.parametrize(
    "sql", ["", "DROP TABLE members", "SELECT 1; SELECT 2", "SELECT FROM WHERE", "(" * 3000]
)
def test_what_is_not_one_query_has_no_mutants(sql: str) -> None:
    assert mutants(sql, SCHEMA) == []
