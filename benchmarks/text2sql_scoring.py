"""Scoring 1,000 predictions: quantlab's two reused worker processes against one fresh process for every query.

    python benchmarks/text2sql_scoring.py [--predictions 1000] [--slow 4] [--timeout 2] [--start fork] [--json]

A process for each query is how evaluators make sure that a query can be killed and leaves nothing behind: it opens its
own read-only connection, runs the query, and sends the rows back. Both sides judge with the same code
(`quantlab.text2sql.scoring.execution.judge`), so only the running of queries differs. The predictions are made from
the golds of the bundled development questions: the gold, the gold laid out anew, near misses, queries that fail,
prose, and, spread among them, `--slow` ones that have to be stopped: every fourth of these hangs inside a single call
of the engine, the others are joins and recursions without end. `--timeout` is when a query is killed, on both sides.
Prints both times and their ratio, with and without the slow ones, and the number of verdicts that differ; exits with
1 when the ratio is below 5 or a verdict differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Execution, Limits, Sandbox
from quantlab.text2sql.scoring.execution import judge

RATIO = 5.0
HANG = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r"

Pair = tuple[Item, str]


def answer(pipe: multiprocessing.connection.Connection, path: str, sql: str) -> None:
    """What the fresh process does."""
    try:
        connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        cursor = connection.execute(sql)
        columns = [column[0] for column in cursor.description]
        pipe.send((columns, cursor.fetchall(), ""))
    except Exception as error:  # whatever it is, it is the query's outcome
        pipe.send(([], [], str(error) or type(error).__name__))


class ProcessPerQuery:
    """Stands in for a Sandbox in `judge`."""

    def __init__(self, timeout: float, start: str) -> None:
        self.timeout = timeout
        self.context: Any = multiprocessing.get_context(start)

    def run(self, database: Path | str, sql: str, role: str = "prediction") -> Execution:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=answer, args=(theirs, str(database), sql))
        process.start()
        theirs.close()
        try:
            if not ours.poll(self.timeout):
                return Execution("timeout", "seconds", f"stopped after {self.timeout:g} s")
            columns, rows, reason = ours.recv()
        except EOFError:
            return Execution("error", "crash", "the process died")
        finally:
            process.kill()
            process.join()
            ours.close()
        if reason:
            return Execution("error", "sql", reason)
        return Execution("rows", "rows", "", tuple(columns), tuple(rows))


NEAR_MISSES: list[tuple[str, str]] = [
    (r">(?!=)", ">="),
    (r"<(?![=>])", "<="),
    (r"\bASC\b|\bDESC\b", ""),
    (r"\bAND\b", "OR"),
    (r"\bCOUNT\(\*\)", "COUNT(DISTINCT 1)"),
    (r"\bMAX\(", "MIN("),
    (r"\bAVG\(", "SUM("),
    (r"\bLIMIT \d+", "LIMIT 1"),
    (r"\bDISTINCT\b", ""),
    (r"'[^']*'", "'없는 값'"),
    (r" = (\d)", r" <> \1"),
    (r"\bWHERE .*?(?=\bGROUP\b|\bORDER\b|\bLIMIT\b|;|$)", ""),
    (r"\bSELECT ", "SELECT 1, "),
]
FAILURES: list[Callable[[str], str]] = [
    lambda gold: gold.replace("SELECT ", "SELECT no_such_column, ", 1),
    lambda gold: gold[: len(gold) * 2 // 3].rstrip() + " (",
    lambda gold: re.sub(r"\bFROM \w+", "FROM nowhere", gold),
    lambda gold: "DELETE FROM " + re.findall(r"\bFROM (\w+)", gold)[0],
    lambda gold: "DROP TABLE " + re.findall(r"\bFROM (\w+)", gold)[0],
    lambda gold: "죄송하지만 질문을 이해하지 못했습니다.",
    lambda gold: "",
]


def predictions(items: Sequence[Item], count: int) -> list[Pair]:
    """Two fifths right, two fifths near misses, one fifth that fails; the same ones every time."""
    numbers = random.Random(0)
    pairs: list[Pair] = []
    while len(pairs) < count:
        item = items[len(pairs) % len(items)]
        gold = item.answer.rstrip("; \n")
        kind = numbers.randrange(5)
        if kind == 0:
            sql = gold
        elif kind == 1:
            sql = re.sub(
                r"\s+\b(FROM|WHERE|GROUP BY|ORDER BY|LIMIT)\b", lambda m: "\n  " + m[1].lower(), gold
            )
        elif kind < 4:
            fitting = [miss for miss in NEAR_MISSES if re.search(miss[0], gold)] or NEAR_MISSES[-1:]
            sql = re.sub(*numbers.choice(fitting), gold, count=1)
        else:
            sql = numbers.choice(FAILURES)(gold)
        pairs.append((item, sql))
    return pairs


def slow_predictions(items: Sequence[Item], count: int) -> list[Pair]:
    chosen = [items[i * 7 % len(items)] for i in range(count)]
    return [(item, (ENDLESS, _cross_join(item), HANG, ENDLESS)[i % 4]) for i, item in enumerate(chosen)]


def _cross_join(item: Item) -> str:
    table = re.findall(r"\bFROM (\w+)", item.answer)[0]
    return "SELECT COUNT(*) FROM " + ", ".join(f"{table} t{i}" for i in range(12))


def spread(some: Sequence[Pair], among: Sequence[Pair]) -> list[Pair]:
    pairs = list(among)
    for i, pair in enumerate(some):
        pairs.insert((2 * i + 1) * len(among) // (2 * len(some)) + i, pair)
    return pairs


def verdict(runner: Sandbox | ProcessPerQuery, pair: Pair) -> str:
    item, sql = pair
    assert item.database is not None
    return judge(cast(Sandbox, runner), item.database, item.golds, sql).verdict


def ours(pairs: Sequence[Pair], timeout: float) -> tuple[list[str], float]:
    limits = Limits(seconds=timeout * 0.8, grace=timeout * 0.2)
    started = time.perf_counter()
    with Sandbox(limits, workers=2) as sandbox:
        found = list(sandbox.map(lambda pair: verdict(sandbox, pair), pairs))
    return found, time.perf_counter() - started


def theirs(pairs: Sequence[Pair], timeout: float, start: str) -> tuple[list[str], list[float]]:
    """Verdicts, and the seconds of each."""
    runner = ProcessPerQuery(timeout, start)
    found, seconds = [], []
    for pair in pairs:
        started = time.perf_counter()
        found.append(verdict(runner, pair))
        seconds.append(time.perf_counter() - started)
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictions", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=4, help="how many of them have to be stopped")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds until a query is killed")
    methods = multiprocessing.get_all_start_methods()
    parser.add_argument("--start", choices=methods, default="fork" if "fork" in methods else methods[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    items = load_items("ko_text2sql:dev")
    ordinary = predictions(items, args.predictions - args.slow)
    slow = slow_predictions(items, args.slow)
    pairs = spread(slow, ordinary)
    _, seconds_ordinary = ours(ordinary, args.timeout)
    found, seconds = ours(pairs, args.timeout)
    other, times = theirs(pairs, args.timeout, args.start)
    waiting = sum(spent for pair, spent in zip(pairs, times, strict=True) if pair in slow)
    line: dict[str, Any] = {
        "predictions": len(pairs),
        "slow": len(slow),
        "start": args.start,
        "seconds": seconds,
        "seconds_process_per_query": sum(times),
        "ratio": sum(times) / seconds,
        "seconds_ordinary": seconds_ordinary,
        "seconds_ordinary_process_per_query": sum(times) - waiting,
        "ratio_ordinary": (sum(times) - waiting) / seconds_ordinary,
        "different": sum(one != two for one, two in zip(found, other, strict=True)),
        "verdicts": dict(Counter(found)),
    }
    line = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
    if args.json:
        print(json.dumps(line))
    else:
        print(f"{len(pairs)} predictions, {len(slow)} of them slow: {line['verdicts']}")
        for end, name in (("", "all"), ("_ordinary", "without the slow ones")):
            first, second = line[f"seconds{end}"], line[f"seconds{end}_process_per_query"]
            print(f"{name + ':':23}two workers {first:7.2f} s, a process per query {second:7.2f} s,", end="")
            print(f" ratio {line[f'ratio{end}']:5.1f}")
        print(f"verdicts that differ:  {line['different']}")
    sys.exit(line["ratio"] < RATIO or line["different"] > 0)


if __name__ == "__main__":
    main()
