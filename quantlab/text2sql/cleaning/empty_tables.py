"""Whether queries run at all: on the empty tables of their DDL, for rows that come without a database.

The DDL comes with the data and is not trusted. It is read into a schema (`quantlab.text2sql.schema.schema`), the
tables are made from that, never from the text, in the memory of a sandbox worker, and the queries run there, many in
one round trip. MySQL's and PostgreSQL's queries are translated to SQLite; what has no counterpart cannot be checked,
which is said, and is no reason to reject a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.dialects.transpile import to_sqlite
from quantlab.text2sql.sandbox.pool import Execution, Sandbox
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.schema.schema import DIALECTS

TOGETHER = 50  # queries in one round trip; they share its time


def run_on_empty_tables(sandbox: Sandbox, items: Sequence[Item]) -> list[Execution | None]:
    """The executions of rows that have the same DDL; None where the DDL or the query has no counterpart in SQLite."""
    found: list[Execution | None] = [None] * len(items)
    stated = items[0].dialect if items[0].dialect in DIALECTS else None
    try:
        schema = read_schema(items[0].context, stated)
    except DataError:
        return found
    if schema.views:
        return found  # their columns are not known
    create = schema.create_sql()
    texts = {
        number: translated.sql
        for number, item in enumerate(items)
        if (translated := to_sqlite(item.answer, stated or schema.dialect, schema=schema)).sql
    }
    numbers = list(texts)
    for start in range(0, len(numbers), TOGETHER):
        part = numbers[start : start + TOGETHER]
        answers = sandbox.trial(create, [], [texts[number] for number in part])
        if any(answer.status == "timeout" for answer in answers):  # one may have taken the others' time
            answers = [sandbox.trial(create, [], [texts[number]])[0] for number in part]
        for number, answer in zip(part, answers, strict=True):
            found[number] = None if answer.kind == "database" else answer
    return found
