"""Cleaning rows: rules with names, each rejection counted and kept with its reason.

    parses          sqlglot reads the answer as SQLite
    select          it is exactly one SELECT (WITH … SELECT and set operations count)
    binds           every table and column exists in the DDL
    duplicate       the same question (and evidence) and query on the same database came before
    executes        it runs: in the row's database, else on empty tables made from the DDL
    returns         on the row's database it returns at least one value that is not NULL
    leakage         too close to an evaluated item; always applied
    near_duplicate  nearly the same question with the same query came before
    judge           a judge says that the query answers the question

They run in this order, cheap ones first, those that need a judge last, so only rows that are otherwise good are paid
for; a row is rejected by the first rule it breaks. What a rule cannot tell (`rules.Unchecked`) rejects nothing and is
counted apart. The result does not depend on the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.errors import RecipeError
from quantlab.paths import nearest
from quantlab.progress import Progress, Silent
from quantlab.runs.run import write_jsonl
from quantlab.text2sql.cleaning.duplicates import Leakage, Profile, exact_duplicates, near_duplicates, profile
from quantlab.text2sql.cleaning.empty_tables import run_on_empty_tables
from quantlab.text2sql.cleaning.rules import RULES, Finding, Unchecked, judge
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Execution, Sandbox
from quantlab.text2sql.teaching.judge import Verdict

__all__ = ["ORDER", "RULES", "Cleaned", "Rejected", "clean", "summary_table", "write_rejected"]

Verdicts = Mapping[str, Verdict]


@dataclass(frozen=True)
class Rejected:
    item: Item
    rule: str
    reason: str


@dataclass(frozen=True)
class Cleaned:
    """`counts`: rule → rows it took, `unchecked`: rule → rows it could not check, both in the order of the rules."""

    kept: list[Item]
    rejected: list[Rejected]
    counts: dict[str, int]
    unchecked: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.kept) + len(self.rejected)


ORDER = (
    "parses", "select", "binds", "duplicate", "executes", "returns", "leakage", "near_duplicate", "judge",
)  # fmt: skip


def clean(
    items: Sequence[Item],
    rules: Sequence[str],
    *,
    evaluated: Sequence[Item] = (),
    dedup: bool = True,
    near_duplicate: float = 0.9,
    leakage: float = 0.8,
    verdicts: Verdicts | Callable[[Sequence[Item]], Verdicts] | None = None,
    sandbox: Sandbox | None = None,
    progress: Progress | None = None,
) -> Cleaned:
    """Apply `rules` (names in RULES), duplicates (`dedup`) and leakage against `evaluated`, in ORDER.

    `verdicts` is item id → verdict, or a function that gets them for the rows that are left when the judge's turn
    comes. `near_duplicate` and `leakage` are similarities, see `duplicates`. Raises RecipeError for an unknown rule
    or a judge without verdicts, DataError for a database that cannot be opened.
    """
    _check_rules(rules, verdicts)
    say = progress or Silent()
    wanted = {*rules, "leakage"} | ({"duplicate", "near_duplicate"} if dedup else set())
    work = _Cleaning(list(items), [name for name in ORDER if name in wanted])
    static = [name for name in ("parses", "select", "binds") if name in rules]
    if static:
        with say.task("cleaning: syntax and names", total=len(items)) as advance:
            work.static(static, advance)
    with say.task("cleaning: duplicates", total=len(work.left)) as advance:
        work.profile(advance)
    if dedup:
        work.exact()
    if "executes" in rules or "returns" in rules:
        with say.task("cleaning: execution", total=len(work.left)) as advance, _sandbox(sandbox) as workers:
            work.execute([name for name in ("executes", "returns") if name in rules], workers, advance)
    with say.task("cleaning: leakage", total=len(work.left)) as advance:
        work.leakage(Leakage(evaluated, leakage), advance)
    if dedup:
        with say.task("cleaning: near duplicates", total=len(work.left)) as advance:
            work.near(near_duplicate, advance)
    if "judge" in rules and verdicts is not None:
        work.judge(verdicts(work.items_left()) if callable(verdicts) else verdicts)
    return work.result()


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> int:
    """One JSON line for each rejected row, with the rule and the reason; returns how many."""
    return write_jsonl(
        path,
        (
            _encodable(
                {
                    "rule": row.rule,
                    "reason": row.reason,
                    "id": row.item.id,
                    "db_id": row.item.db_id,
                    "question": row.item.question,
                    **({"evidence": row.item.evidence} if row.item.evidence else {}),
                    "answer": row.item.answer,
                    **{key: row.item.extra[key] for key in ("level", "kind") if key in row.item.extra},
                }
            )
            for row in rejected
        ),
    )


def summary_table(counts: Mapping[str, int], total: int, unchecked: Mapping[str, int] | None = None) -> str:
    """How many rows each rule took and how many were left after it, as a text table."""
    rows = [("rule", "taken", "left", "unchecked"), ("", "", f"{total:,}", "")]
    left = total
    for name, taken in counts.items():
        left -= taken
        blind = (unchecked or {}).get(name, 0)
        rows.append((name, f"{taken:,}", f"{left:,}", f"{blind:,}" if blind else ""))
    width = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{width[0]}}  {row[1]:>{width[1]}}  {row[2]:>{width[2]}}  {row[3]:>{width[3]}}"
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


class _Cleaning:
    """The rows on their way through the rules: who is left, who was rejected by what."""

    def __init__(self, items: list[Item], order: Sequence[str]) -> None:
        self.items = items
        self.left = list(range(len(items)))
        self.profiles: dict[int, Profile] = {}
        self.rejections: dict[int, tuple[str, str]] = {}
        self.counts = dict.fromkeys(order, 0)
        self.unchecked = dict.fromkeys(order, 0)

    def items_left(self) -> list[Item]:
        return [self.items[number] for number in self.left]

    def note(self, number: int, rule: str, finding: Finding) -> bool:
        """Book one finding; True where the row stays."""
        if isinstance(finding, Unchecked):
            self.unchecked[rule] += 1
        elif finding is not None:
            self.counts[rule] += 1
            self.rejections[number] = (rule, finding)
            return False
        return True

    def static(self, rules: Sequence[str], advance: Callable[[float], None]) -> None:
        for number in self.left:
            for name in rules:
                if not self.note(number, name, RULES[name](self.items[number])):
                    break
            advance(1)
        self._drop()

    def profile(self, advance: Callable[[float], None]) -> None:
        for number in self.left:
            self.profiles[number] = profile(self.items[number])
            advance(1)

    def exact(self) -> None:
        found = exact_duplicates([self.profiles[number] for number in self.left])
        for index, original in found.items():
            self.note(self.left[index], "duplicate", f"the same as row {self.items[self.left[original]].id}")
        self._drop()

    def execute(self, rules: Sequence[str], sandbox: Sandbox, advance: Callable[[float], None]) -> None:
        def run(numbers: list[int]) -> list[tuple[int, Execution | None]]:
            outcomes = _run_group(sandbox, [self.items[number] for number in numbers])
            return list(zip(numbers, outcomes, strict=True))

        executions: dict[int, Execution | None] = {}
        for outcomes in sandbox.map(run, _by_empty_tables(self.items, self.left)):
            executions.update(outcomes)
            advance(len(outcomes))
        for number in self.left:
            for name in rules:
                if not self.note(number, name, RULES[name](self.items[number], executions[number])):
                    break
        self._drop()

    def leakage(self, evaluated: Leakage, advance: Callable[[float], None]) -> None:
        for number in self.left:
            self.note(number, "leakage", evaluated.reason(self.profiles[number]))
            advance(1)
        self._drop()

    def near(self, threshold: float, advance: Callable[[float], None]) -> None:
        for near in near_duplicates([self.profiles[number] for number in self.left], threshold, advance):
            earlier = self.items[self.left[near.earlier]].id
            self.note(
                self.left[near.index], "near_duplicate", f"similarity {near.similarity:.2f} to row {earlier}"
            )
        self._drop()

    def judge(self, verdicts: Verdicts) -> None:
        for number in self.left:
            item = self.items[number]
            self.note(number, "judge", judge(item, verdicts.get(item.id)))
        self._drop()

    def result(self) -> Cleaned:
        rejected = [
            Rejected(self.items[number], *self.rejections[number]) for number in sorted(self.rejections)
        ]
        unchecked = {rule: count for rule, count in self.unchecked.items() if count}
        return Cleaned(self.items_left(), rejected, self.counts, unchecked)

    def _drop(self) -> None:
        self.left = [number for number in self.left if number not in self.rejections]


def _check_rules(rules: Sequence[str], verdicts: Any) -> None:
    for name in rules:
        if name not in RULES:
            near = nearest(name, RULES)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(RULES)}"
            raise RecipeError(f"no cleaning rule {name!r}", hint=hint)
    if "judge" in rules and verdicts is None:
        raise RecipeError("the rule judge needs a judge", hint="add `judge: {model: …}` to the recipe")


def _by_empty_tables(items: Sequence[Item], numbers: Sequence[int]) -> list[list[int]]:
    """Rows without a database, together by DDL (they share empty tables); every other row alone."""
    groups: list[list[int]] = []
    place: dict[str, int] = {}
    for number in numbers:
        if items[number].database is None:
            context = items[number].context
            if context in place:
                groups[place[context]].append(number)
                continue
            place[context] = len(groups)
        groups.append([number])
    return groups


def _run_group(sandbox: Sandbox, items: Sequence[Item]) -> list[Execution | None]:
    """Executions with at most one telling row each; None where there is nothing to run on."""
    database = items[0].database
    found: list[Execution | None]
    if database is None:
        found = run_on_empty_tables(sandbox, items)
    else:
        found = [sandbox.run(database, item.answer, role="gold") for item in items]
    return [_telling(execution) if execution is not None else None for execution in found]


def _telling(execution: Execution) -> Execution:
    """The execution with one row only, one with a value where there is any: thousands are held at a time."""
    for row in execution.rows:
        if any(value is not None for value in row):
            return replace(execution, rows=(row,))
    return replace(execution, rows=execution.rows[:1])


@contextmanager
def _sandbox(given: Sandbox | None) -> Iterator[Sandbox]:
    if given is not None:
        yield given
        return
    with Sandbox(workers=min(8, os.cpu_count() or 1)) as own:
        yield own


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Half surrogate pairs, which a JSON escape can bring in, have no UTF-8 form."""
    return {
        key: value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value
        for key, value in row.items()
    }
