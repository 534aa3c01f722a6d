"""How good witness databases are: mutation score, agreement with populated databases, questions per second.

    python benchmarks/witness_databases.py [--perturbed 200] [--seed 0] [--json FILE]

On the bundled development and test questions, whose databases are populated, with witness databases made from DDL and
gold alone (no row is given):

1. Mutation score: the share of mutants that give another result than the gold. Equivalent mutants that the schema does
   not prove are counted against it.
2. Agreement: `--perturbed` queries drawn from the seed, in three equal parts: rewritings that mean the same; plain
   faults (a mutant of an operator that usually shows: another column, a dropped or turned condition, another aggregate,
   …); and another question's query on the same tables. The verdict on the populated database and that on
   witness databases are compared, every disagreement is listed. Beside it half as many subtle faults (`>` for `>=`,
   a number one off, DISTINCT, what COUNT counts, a wildcard), which populated data often do not show.
3. Speed: questions with exactly one join, one process, one thread, nothing cached; making the databases included.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlglot import exp

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.scoring.exact_match import parse
from quantlab.text2sql.scoring.execution import judge
from quantlab.text2sql.testdata.mutants import mutants
from quantlab.text2sql.testdata.witness import build


def rewritings(sql: str) -> Iterator[tuple[str, str]]:
    """(name, text): the query in other words, same meaning on every database."""
    for name, edit in REWRITINGS.items():
        tree = parse(sql)
        assert tree is not None
        if edit(tree):
            yield name, tree.sql(dialect="sqlite")


def reorder_conditions(tree: exp.Expression) -> bool:
    found = list(tree.find_all(exp.And, exp.Or))
    for node in found:
        left, right = node.this.copy(), node.expression.copy()
        node.set("this", right)
        node.set("expression", left)
    return bool(found)


def turn_comparison(tree: exp.Expression) -> bool:
    turned = {exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LTE, exp.LTE: exp.GTE, exp.EQ: exp.EQ}
    found = [node for node in tree.find_all(*turned) if type(node) in turned]
    for node in found:
        node.replace(turned[type(node)](this=node.expression.copy(), expression=node.this.copy()))
    return bool(found)


def write_out_between(tree: exp.Expression) -> bool:
    found = list(tree.find_all(exp.Between))
    for node in found:
        value, low, high = (node.args[key].copy() for key in ("this", "low", "high"))
        both = exp.and_(exp.GTE(this=value, expression=low), exp.LTE(this=value.copy(), expression=high))
        node.replace(exp.paren(both))
    return bool(found)


def write_out_in(tree: exp.Expression) -> bool:
    found = [node for node in tree.find_all(exp.In) if node.expressions]
    for node in found:
        parts = [exp.EQ(this=node.this.copy(), expression=value.copy()) for value in node.expressions]
        node.replace(exp.paren(exp.or_(*parts)))
    return bool(found)


def count_one(tree: exp.Expression) -> bool:
    found = [node for node in tree.find_all(exp.Count) if isinstance(node.this, exp.Star)]
    for node in found:
        node.set("this", exp.Literal.number(1))
    return bool(found)


def new_aliases(tree: exp.Expression) -> bool:
    tables = [table for table in tree.find_all(exp.Table) if table.alias]
    names = {table.alias: f"x{number}_{table.alias}" for number, table in enumerate(tables)}
    for table in tables:
        table.set("alias", exp.TableAlias(this=exp.to_identifier(names[table.alias])))
    for column in tree.find_all(exp.Column):
        if column.table in names:
            column.set("table", exp.to_identifier(names[column.table]))
    return bool(tables)


def in_a_subquery(tree: exp.Expression) -> bool:
    """WHERE moved into a query in FROM; for one table without grouping and sorting."""
    if not isinstance(tree, exp.Select) or tree.args.get("joins") or not tree.args.get("where"):
        return False
    if any(tree.args.get(key) for key in ("group", "order", "limit", "distinct")) or tree.find(exp.Subquery):
        return False
    table = tree.args["from_"].this
    inner = exp.select("*").from_(table.copy()).where(tree.args["where"].this.copy())
    tree.set("where", None)
    tree.args["from_"].set("this", inner.subquery(table.alias or table.name))
    return True


def other_column_order(tree: exp.Expression) -> bool:
    if not isinstance(tree, exp.Select) or len(tree.expressions) < 2:
        return False
    tree.set("expressions", [part.copy() for part in reversed(tree.expressions)])
    return True


REWRITINGS: dict[str, Callable[[exp.Expression], bool]] = {
    "conditions reordered": reorder_conditions,
    "comparisons turned round": turn_comparison,
    "BETWEEN written out": write_out_between,
    "IN written out": write_out_in,
    "COUNT(1)": count_one,
    "other aliases": new_aliases,
    "WHERE in a subquery": in_a_subquery,
    "columns in another order": other_column_order,
}


SUBTLE = frozenset(
    {"boundary", "literal", "distinct", "count", "like pattern", "between bounds", "in list", "limit", "join kind",
     "grouping", "having", "null filter", "sort dropped"}
)  # fmt: skip


def fault(item: Item, rng: random.Random, subtle: bool) -> tuple[str, str] | None:
    """A mutant of a random operator, plain or subtle."""
    found = [m for m in mutants(item.answer, read_schema(item.context)) if (m.operator in SUBTLE) == subtle]
    if not found:
        return None
    operator = rng.choice(sorted({mutant.operator for mutant in found}))
    mutant = rng.choice([mutant for mutant in found if mutant.operator == operator])
    return f"fault: {operator}", mutant.sql


def rewriting(item: Item, rng: random.Random) -> tuple[str, str] | None:
    choices = list(rewritings(item.answer))
    return rng.choice(choices) if choices else None


def other_question(item: Item, items: list[Item], rng: random.Random) -> tuple[str, str] | None:
    """The query of a question whose tables this one has too."""
    tables = read_schema(item.context).tables.keys()
    others = [
        other
        for other in items
        if other.db_id == item.db_id
        and other.id != item.id
        and {t.name.lower() for t in (parse(other.answer) or exp.Select()).find_all(exp.Table)} <= tables
    ]
    return ("another question's", rng.choice(others).answer) if others else None


def perturbed(items: list[Item], count: int, rng: random.Random) -> Iterator[tuple[Item, str, str]]:
    """(question, what was done, query): rewritings, plain faults and other questions' queries in turn."""
    made = 0
    while made < count:
        item = rng.choice(items)
        parts = (
            lambda: rewriting(item, rng),  # noqa: B023 called at once
            lambda: fault(item, rng, subtle=False),  # noqa: B023
            lambda: other_question(item, items, rng),  # noqa: B023
        )
        found = parts[made % 3]()
        if found is not None:
            made += 1
            yield item, *found


def subtle_faults(items: list[Item], count: int, rng: random.Random) -> Iterator[tuple[Item, str, str]]:
    made = 0
    while made < count:
        item = rng.choice(items)
        found = fault(item, rng, subtle=True)
        if found is not None:
            made += 1
            yield item, *found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perturbed", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": platform.machine(), "seed": args.seed}
    with tempfile.TemporaryDirectory() as folder, Sandbox(workers=1) as sandbox:
        for split in ("dev", "test"):
            report[split] = scores(load_items(f"ko_text2sql:{split}"), sandbox, Path(folder))
        items = load_items("ko_text2sql:dev") + load_items("ko_text2sql:test")
        rng = random.Random(args.seed)
        print("perturbed queries: ", end="")
        drawn = perturbed(items, args.perturbed, rng)
        report["agreement"] = agreement(drawn, sandbox, Path(folder))
        print("subtle faults: ", end="")
        drawn = subtle_faults(items, args.perturbed // 2, rng)
        report["subtle_faults"] = agreement(drawn, sandbox, Path(folder))
        report["speed"] = speed(items, sandbox, Path(folder) / "speed")
    if args.json:
        args.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def scores(items: list[Item], sandbox: Sandbox, folder: Path) -> dict[str, Any]:
    found = {item.id: build(read_schema(item.context), item.golds, sandbox, folder) for item in items}
    total = sum(witness.mutants for witness in found.values())
    killed = sum(witness.killed for witness in found.values())
    databases = sum(len(witness.databases) for witness in found.values())
    without = [name for name, witness in found.items() if not witness.databases]
    alive = [
        {"id": name, "operator": mutant.operator, "sql": mutant.sql}
        for name, witness in found.items()
        for mutant in witness.survivors
    ]
    print(
        f"{len(items)} questions: {killed} of {total} mutants told from the gold ({killed / total:.1%}), "
        f"{databases / len(items):.1f} databases a question, {len(without)} without any"
    )
    return {"questions": len(items), "mutants": total, "killed": killed, "score": killed / total,
            "databases": databases, "without": without, "survivors": alive}  # fmt: skip


def agreement(drawn: Iterator[tuple[Item, str, str]], sandbox: Sandbox, folder: Path) -> dict[str, Any]:
    differ = []
    agree: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for item, done, sql in drawn:
        assert item.database is not None
        witness = build(read_schema(item.context), item.golds, sandbox, folder)
        populated = judge(sandbox, item.database, item.golds, sql)
        ours = judge(sandbox, witness.databases, item.golds, sql)
        kind = (
            "faults"
            if done.startswith("fault")
            else "rewritings"
            if done in REWRITINGS
            else "other questions"
        )
        totals[kind] += 1
        agree[kind] += populated.verdict == ours.verdict
        if populated.verdict != ours.verdict:
            differ.append(
                {"id": item.id, "done": done, "gold": item.answer, "query": sql, "populated": populated.verdict,
                 "populated_why": populated.why, "witness": ours.verdict, "witness_why": ours.why}
            )  # fmt: skip
    both, count = agree.total(), totals.total()
    parts = ", ".join(f"{agree[kind]} of {totals[kind]} {kind}" for kind in totals)
    print(f"verdicts agree on {both} of {count} ({both / count:.1%}): {parts}")
    for one in differ:
        print(
            f"  {one['id']} {one['done']}: populated {one['populated']}, witness {one['witness']}: {one['witness_why']}"
        )
        print(f"    gold  {one['gold']}\n    query {one['query']}")
    return {
        "queries": count,
        "agree": both,
        "parts": {k: [agree[k], totals[k]] for k in totals},
        "differ": differ,
    }


def speed(items: list[Item], sandbox: Sandbox, folder: Path) -> dict[str, Any]:
    joined = [
        item for item in items if len(list((parse(item.answer) or exp.Select()).find_all(exp.Join))) == 1
    ]
    read_schema.cache_clear()
    started, cpu = time.perf_counter(), time.process_time()
    for item in joined:
        build(read_schema(item.context), item.golds, sandbox, folder)
    seconds = time.perf_counter() - started
    print(
        f"{len(joined)} questions with one join: {len(joined) / seconds:.0f} questions/s, databases written to disk "
        f"({time.process_time() - cpu:.1f} s of {seconds:.1f} s in this process, the rest in the worker)"
    )
    return {"questions": len(joined), "seconds": seconds, "per_second": len(joined) / seconds}


if __name__ == "__main__":
    main()
