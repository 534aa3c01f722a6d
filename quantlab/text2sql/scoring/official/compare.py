"""The rules of other evaluators, so that a published number can be set beside ours.

Written from what those tools publish, for one question. Nothing is executed here but in our sandbox;
`published_verdict` is a function of two results and the texts of the queries.

- `spider-test-suite` (taoyds/test-suite-sql-eval, `exec_eval.py`): DISTINCT is taken out of both queries before they
  run, unless asked to keep it; rows are a bag, or a sequence when the gold contains the words "order by" anywhere;
  columns may be permuted; values compare as Python does. The verdict on a question is that of all its databases.
- `bird` (bird-bench/mini_dev, `evaluation_ex.py`): the sets of rows are equal. No order, no duplicates, columns where
  they are, values as Python compares them.
- `sql-eval` (defog-ai/sql-eval, `eval.py`): see `published_frames.py`. Its "correct", not its "exact match".

How a write that is denied here is counted. Spider's and BIRD's tools run any statement on a plain connection and take
what `fetchall` gives, which for a write is no rows: so no rows are compared (`seen`). A write that fails there, over
a constraint for instance, would be an error instead; that is not seen from here. Mini-Dev's script then runs the gold
on the same connection, where a DELETE has already happened: `gold_after` writes the gold so that our read-only
sandbox gives what it gave there, and a gold on a dropped table fails; after other writes to data the verdict is not
known. (The script of the full BIRD set gives each query a connection of its own.) sql-eval reads through pandas, which
raises for a statement that returns no rows: an error.

Not covered: Spider's `--plug_value`, sql-eval's rounding, and whatever cannot be told (`Published.verdict` is None).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlglot import exp

from quantlab.errors import RecipeError
from quantlab.paths import nearest
from quantlab.text2sql.sandbox.pool import Execution, Role, Sandbox
from quantlab.text2sql.schema.schema import quote_name
from quantlab.text2sql.scoring.exact_match import MAX_LENGTH, parse
from quantlab.text2sql.scoring.official import spider
from quantlab.text2sql.scoring.official.sql_eval import frames_agree
from quantlab.text2sql.scoring.order_by import Row

Rule = Literal["spider-test-suite", "bird", "sql-eval"]
RULES: tuple[Rule, ...] = ("spider-test-suite", "bird", "sql-eval")

Result = tuple[Sequence[str], Sequence[Row]]

# Statements that a plain connection runs and has no rows for: those that change data, and the others.
_DATA = ("DELETE", "INSERT", "REPLACE", "UPDATE", "DROP", "ALTER")
_OTHER = ("CREATE", "REINDEX", "ANALYZE", "ATTACH", "VACUUM", "BEGIN", "SAVEPOINT")


@dataclass(frozen=True)
class Published:
    """`verdict` is None where a published tool's outcome cannot be told; `note` says what was assumed or why not."""

    verdict: bool | None
    note: str = ""
    gold: Execution | None = None
    predicted: Execution | None = None


def published_verdict(
    rule: str,
    gold_sql: str,
    gold_columns: Sequence[str],
    gold_rows: Sequence[Row],
    predicted_sql: str,
    predicted_columns: Sequence[str],
    predicted_rows: Sequence[Row],
    *,
    question: str = "",
    category: str = "",
) -> bool:
    """What the tool says of these two results, which are of the queries as `published_query` gives them.

    A denied write has no columns and no rows (`seen`). `question` and `category` (`query_category`) decide for
    sql-eval whether order counts. RecipeError for another rule.
    """
    _check(rule)
    if rule == "spider-test-suite":
        return spider.results_equal(gold_rows, predicted_rows, "order by" in gold_sql.lower())
    if rule == "bird":
        # Text that is no UTF-8 stops the script's fetchall, which counts as wrong.
        if _undecodable(gold_rows) or _undecodable(predicted_rows):
            return False
        return set(map(tuple, predicted_rows)) == set(map(tuple, gold_rows))
    return frames_agree(
        gold_columns,
        gold_rows,
        predicted_columns,
        predicted_rows,
        gold_sql,
        predicted_sql,
        question,
        category,
    )


def published_query(rule: str, sql: str, role: Role = "prediction", *, keep_distinct: bool = False) -> str:
    """The text that the tool hands to its database for `sql`; only Spider's changes anything."""
    _check(rule)
    if rule != "spider-test-suite":
        return sql
    return spider.rewrite(sql, predicted=role == "prediction", keep_distinct=keep_distinct)


def seen(rule: str, sql: str, execution: Execution) -> Result | Literal["error", "unknown"]:
    """What the tool would have got for a query that ended here as `execution`."""
    if execution.status == "rows":
        return execution.columns, execution.rows
    if execution.kind == "empty" or (execution.kind == "denied" and _returns_nothing(sql)):
        return "error" if rule == "sql-eval" else ((), ())
    if execution.kind == "sql" or (execution.kind == "several" and rule != "sql-eval"):
        return "error"
    return "unknown"


def run_published(
    sandbox: Sandbox,
    databases: Path | Sequence[Path],
    rule: str,
    golds: str | Sequence[str],
    predicted_sql: str,
    *,
    question: str = "",
    category: str = "",
    keep_distinct: bool = False,
) -> Published:
    """Run gold and prediction as the tool would have them, in our sandbox, and apply its rule.

    The queries must be SQLite's. Any of several golds may be met (only sql-eval has several), each on all databases
    (a test suite has several). What did not decide the verdict is left out of the answer.
    """
    found = published_query(rule, predicted_sql, keep_distinct=keep_distinct)
    paths = [databases] if isinstance(databases, Path) else databases
    best = Published(None, "there is no gold or no database")
    for number, gold in enumerate([golds] if isinstance(golds, str) else golds):
        wanted = published_query(rule, gold, "gold", keep_distinct=keep_distinct)
        result = best
        for path in paths:
            result = _run_on(sandbox, path, rule, wanted, found, question, category)
            if not result.verdict:
                break
        if result.verdict:
            return result
        if number == 0 or result.verdict is None:
            best = result
    return best


def _run_on(
    sandbox: Sandbox,
    database: Path,
    rule: str,
    gold_sql: str,
    predicted_sql: str,
    question: str,
    category: str,
) -> Published:
    predicted = sandbox.run(database, predicted_sql, role="prediction")
    found = seen(rule, predicted_sql, predicted)
    same_connection = rule == "bird" and predicted.kind == "denied" and not isinstance(found, str)
    after = gold_after(predicted_sql, gold_sql) if same_connection else gold_sql
    gold = sandbox.run(database, gold_sql if after is None else after, role="gold")
    if found == "error":
        return Published(False, f"an error there too: {predicted.reason}", gold, predicted)
    if found == "unknown":
        return Published(None, _unknown(rule, predicted), gold, predicted)
    if after is None:
        return Published(None, "the gold runs there on what the write has left", gold, predicted)
    if after == "":
        return Published(False, "the table is gone when the gold runs there", gold, predicted)
    wanted = seen(rule, gold_sql, gold)
    if isinstance(wanted, str) or isinstance(found, str):
        return Published(None, f"the gold does not run here: {gold.reason}", gold, predicted)
    note = "it gives no rows" + (
        ", and the gold runs after it on the same connection" if same_connection else ""
    )
    verdict = published_verdict(
        rule, gold_sql, *wanted, predicted_sql, *found, question=question, category=category
    )
    return Published(verdict, note if predicted.kind == "denied" else "", gold, predicted)


def gold_after(predicted_sql: str, gold_sql: str) -> str | None:
    """The gold such that it gives what it would on a connection on which `predicted_sql` has run before it.

    After `DELETE FROM t WHERE c` the table is shadowed by one of the rows for which c is not true; views, triggers
    and cascades are not followed. "" for a gold on a table that was dropped: it fails. None where it cannot be told.
    """
    words = _words(predicted_sql)
    if words and words[0] in _OTHER:
        return gold_sql
    tree = _parse(predicted_sql)
    if isinstance(tree, exp.Drop):
        gold = _parse(gold_sql)
        return None if gold is None else "" if _tables(tree) & _tables(gold) else gold_sql
    if not isinstance(tree, exp.Delete) or not isinstance(tree.this, exp.Table):
        return None
    if any(value for name, value in tree.args.items() if name not in ("this", "where")):
        return None  # LIMIT, ORDER BY, a WITH of its own
    where, name = tree.args.get("where"), tree.this.name
    if where is not None and name.lower() in _tables(where):
        return None  # inside the shadow its name would mean the shadow
    alias = f" AS {quote_name(tree.this.alias)}" if tree.this.alias else ""
    kept = f"NOT COALESCE(({where.this.sql(dialect='sqlite')}), 0)" if where is not None else "0"
    shadow = f"{quote_name(name)} AS (SELECT * FROM main.{quote_name(name)}{alias} WHERE {kept})"
    own = re.match(r"\s*WITH(\s+RECURSIVE)?\b", gold_sql, re.IGNORECASE)
    if own is None:
        return f"WITH {shadow} {gold_sql}"
    return f"WITH{own.group(1) or ''} {shadow}, {gold_sql[own.end() :]}"


def _tables(tree: exp.Expression) -> set[str]:
    return {table.name.lower() for table in tree.find_all(exp.Table)}


def _returns_nothing(sql: str) -> bool:
    """Whether a plain connection runs this statement and has no rows to give."""
    words = _words(sql)
    if not words or "RETURNING" in words:
        return False
    if words[0] == "WITH":
        return isinstance(_parse(sql), exp.Delete | exp.Insert | exp.Update)
    return words[0] in _DATA or words[0] in _OTHER


def _parse(sql: str) -> exp.Expression | None:
    return parse(sql) if len(sql) <= MAX_LENGTH else None


def _words(sql: str) -> list[str]:
    return [token.upper() for token in spider.TOKEN.findall(sql) if token[0].isalpha()]


def _undecodable(rows: Sequence[Row]) -> bool:
    """Whether some text was no UTF-8: the sandbox hands such bytes on as lone surrogates."""
    texts = (value for row in rows for value in row if isinstance(value, str))
    return any("\udc80" <= char <= "\udcff" for text in texts for char in text)


def _unknown(rule: str, execution: Execution) -> str:
    if execution.status == "timeout":
        given = {
            "spider-test-suite": "without end, its timeout does not fire",
            "bird": "30 s",
            "sql-eval": "10 s",
        }
        return f"{execution.reason} here; there it is given {given[rule]}"
    return f"not known what the tool makes of it; here: {execution.reason}"


def _check(rule: str) -> None:
    if rule not in RULES:
        near = nearest(rule, RULES)
        hint = f"did you mean {near}?" if near else f"one of: {', '.join(RULES)}"
        raise RecipeError(f"no published rule {rule!r}", hint=hint)
