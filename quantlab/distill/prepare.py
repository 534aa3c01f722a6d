"""From a source of rows to the rows that are learned: teacher, cleaning, fraction.

    read the source → leave out the held-out database → ask the teacher → clean → take a fraction

The result of everything but the last step is kept in a directory named by what decides it, so the cells of a sweep and
a resumed run share it; the teacher's and the judge's answers are in the ledger besides.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.errors import DataError, QuantlabError
from quantlab.paths import atomic_write_text
from quantlab.progress import Progress
from quantlab.recipe.distill import DistillRecipe, Judge, Teacher
from quantlab.runs.run import read_jsonl, write_jsonl
from quantlab.teacher.client import Gathered, gather
from quantlab.teacher.estimate import Counter, Estimate, estimate
from quantlab.teacher.ledger import Ledger, Request
from quantlab.teacher.local import identity
from quantlab.teacher.prices import price_of
from quantlab.text2sql.cleaning.filters import Rejected, clean, summary_table, write_rejected
from quantlab.text2sql.data.dataset import digest, id_notes, load_items
from quantlab.text2sql.data.item import BadRow, Item, parse_row
from quantlab.text2sql.prompt.for_model import as_asked
from quantlab.text2sql.prompt.prompt import row_fields
from quantlab.text2sql.prompt.template import Template, bundled_template
from quantlab.text2sql.teaching.judge import Verdict, collect_verdicts, judge_requests, unusable_verdict
from quantlab.text2sql.teaching.prompts import answer_request, load_prompt, parse_answer
from quantlab.text2sql.teaching.question_writing import (
    Planned,
    contexts_of,
    plan_writing,
    unusable_pairs,
    written_items,
)

BUNDLED = "ko_text2sql"  # its own test and development rows are kept out whatever is evaluated


class Stopped(QuantlabError):
    """A budget ended the gathering; what was answered is in the ledger."""


@dataclass(frozen=True)
class Source:
    """The rows to prepare, with what prompts show of them; unreadable ones apart; the items that none of them must be
    close to; the wording that they are asked by."""

    items: list[Item]
    bad: list[BadRow]
    held_out: int
    evaluated: list[Item]
    template: Template = field(default_factory=lambda: bundled_template("ko"))


def read_source(recipe: DistillRecipe) -> Source:
    """The rows of ``data.source`` without those of the held-out database."""
    bad: list[BadRow] = []
    items = load_items(recipe.data.source, recipe.data.limit, bad)
    left_out = str(recipe.data.holdout_db) if recipe.data.holdout_db is not None else None
    kept = [item for item in items if item.db_id != left_out]
    if not kept:
        raise DataError(f"{recipe.data.source}: every row is of the held-out database {left_out}")
    shown, template = as_asked(kept, recipe.tasks.text2sql.prompt)
    return Source(shown, bad, len(items) - len(kept), _evaluated_items(recipe), template)


def _evaluated_items(recipe: DistillRecipe) -> list[Item]:
    """Items that a training row must not be close to."""
    sources = {recipe.tasks.text2sql.data}
    if recipe.data.source.startswith(BUNDLED):
        sources |= {f"{BUNDLED}/test.jsonl", f"{BUNDLED}/dev.jsonl"}
    found: list[Item] = []
    for source in sorted(sources):
        found += load_items(source)
    return found


def prepared_digest(recipe: DistillRecipe, source: Source) -> str:
    """Names what decides the cleaned rows: the source's content, teacher, judge, rules, the evaluated items."""
    content = recipe.content()
    parts = {
        "data": {k: v for k, v in content["data"].items() if k not in ("fraction", "seed")},
        "teacher": _what_answers(recipe.teacher, recipe.teacher.task) if recipe.teacher else None,
        "judge": _what_answers(recipe.judge, "judge")
        if recipe.judge and "judge" in recipe.data.filters
        else None,
        "items": digest(source.items),
        "evaluated": digest(source.evaluated),
    }
    if any(item.evidence for item in source.items):
        parts["kept"] = "evidence"  # rows that were prepared when it was not kept are prepared anew
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _what_answers(endpoint: Teacher | Judge, task: str) -> dict[str, Any]:
    """What decides the answers of an endpoint: its keys, the content behind `hf:` and `file:`, the prompt."""
    return endpoint.answers() | {
        "identity": identity(endpoint),
        "prompt": load_prompt(task, endpoint.language).digest,
    }


def _enough(gathered: Gathered, endpoint: Teacher | Judge, who: str) -> None:
    """Stop where too many requests stayed without a usable answer: the next run asks again."""
    if gathered.stopped:
        raise Stopped(f"the {who} {endpoint.model}: {gathered.stopped}")
    failed, total = len(gathered.failed), len(gathered.answers)
    if failed > endpoint.max_failed * total:
        reason = next(iter(gathered.failed.values()))
        raise Stopped(
            f"the {who} {endpoint.model} left {failed} of {total} requests without a usable answer; one says: {reason}",
            hint="the rest is in the ledger, the same command asks for these again; "
            f"max_failed (now {endpoint.max_failed:g}) is the share that may be missing",
        )


def prepare(
    recipe: DistillRecipe, source: Source, ledger: Path, folder: Path, progress: Progress
) -> tuple[list[Item], dict[str, Any]]:
    """The rows to learn, from ``folder/<digest>`` when they were prepared before, and what the run keeps about them:
    counts of every rule, spending.

    Raises:
        Stopped: a budget ended it. DataError: the source is bad, or nothing is left after cleaning.
    """
    for note in id_notes(source.items, recipe.data.source):
        progress.note(note)
    place = folder / prepared_digest(recipe, source)
    if not (place / "cleaning.json").is_file():
        _prepare(recipe, source, ledger, place, progress)
    record = json.loads((place / "cleaning.json").read_text(encoding="utf-8"))
    items = [
        parse_row(row, f"{place / 'train.jsonl'}:{number}")
        for number, row in enumerate(read_jsonl(place / "train.jsonl"), start=1)
    ]
    chosen = take_fraction(items, recipe.data.fraction, recipe.data.seed)
    if not chosen:
        raise DataError(
            f"{recipe.data.source}: no row is left to learn from\n{record['table']}",
            hint=f"{place / 'rejected.jsonl'} says why each was taken out",
        )
    return chosen, record | {
        "digest": place.name,
        "learned": len(chosen),
        "fraction": recipe.data.fraction,
    }


def _prepare(
    recipe: DistillRecipe,
    source: Source,
    ledger: Path,
    place: Path,
    progress: Progress,
) -> None:
    items = source.items
    lost: list[Rejected] = []
    spent: list[dict[str, Any]] = []
    if recipe.teacher is not None:
        items, lost, gathered = ask_teacher(items, recipe.teacher, ledger, recipe.data.seed, progress)
        spent.append({"for": recipe.teacher.task, "model": recipe.teacher.model, **_spending(gathered)})

    def verdicts(left: Sequence[Item]) -> dict[str, Verdict]:
        assert recipe.judge is not None
        found, gathered = ask_judge(left, recipe.judge, ledger, progress)
        spent.append({"for": "judge", "model": recipe.judge.model, **_spending(gathered)})
        return found

    cleaned = clean(
        items,
        recipe.data.filters,
        evaluated=source.evaluated,
        dedup=recipe.data.dedup,
        near_duplicate=recipe.data.near_duplicate,
        leakage=recipe.data.leakage,
        verdicts=verdicts if "judge" in recipe.data.filters else None,
        progress=progress,
    )
    total = cleaned.total + len(lost) + len(source.bad)
    counts = {"unreadable": len(source.bad), "no answer": len(lost)} | cleaned.counts
    if not source.bad:
        counts.pop("unreadable")
    if recipe.teacher is None:
        counts.pop("no answer")
    place.mkdir(parents=True, exist_ok=True)
    write_rejected(place / "rejected.jsonl", [*_unread(source.bad), *lost, *cleaned.rejected])
    write_jsonl(place / "train.jsonl", [_row(item) for item in cleaned.kept])
    record = {
        "source": recipe.data.source,
        "rows": total,
        "held_out": source.held_out,
        "counts": counts,
        "unchecked": cleaned.unchecked,
        "kept": len(cleaned.kept),
        "evaluated": len(source.evaluated),
        "spent": spent,
        "prompts": _prompts(recipe),
        "table": summary_table(counts, total, cleaned.unchecked),
    }
    atomic_write_text(place / "cleaning.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def _prompts(recipe: DistillRecipe) -> list[dict[str, Any]]:
    asked = [(recipe.teacher, recipe.teacher.task)] if recipe.teacher else []
    if recipe.judge and "judge" in recipe.data.filters:
        asked.append((recipe.judge, "judge"))  # type: ignore[arg-type]
    return [dict(load_prompt(task, endpoint.language).record) for endpoint, task in asked]


def _unread(bad: Sequence[BadRow]) -> list[Rejected]:
    return [Rejected(Item(row.where, "", "", "", ""), "unreadable", row.reason) for row in bad]


def _row(item: Item) -> dict[str, Any]:
    """What of a row is learned, or counted: everything that a prompt shows."""
    fields = row_fields(item, item.context)  # notes apart: a linker reads the DDL without them
    shown: dict[str, Any] = {"id": item.id, "db_id": item.db_id, **fields, "answer": item.answer}
    if item.notes:
        shown["schema_notes"] = [list(note) for note in item.notes]
    named = {key: item.extra[key] for key in ("level", "kind") if key in item.extra}
    filled = {**shown, "dialect": item.dialect} | named
    return {key: value for key, value in filled.items() if value or key not in ("evidence", "dialect")}


def _spending(gathered: Gathered) -> dict[str, Any]:
    return asdict(gathered.spending) | {"failed": len(gathered.failed)}


def take_fraction(items: Sequence[Item], fraction: float, seed: int) -> list[Item]:
    """That share of the rows, drawn at random; what a smaller share draws, a larger one with the same seed has too."""
    if fraction == 1:
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    chosen = sorted(order[: round(fraction * len(items))])
    return [items[index] for index in chosen]


def teacher_requests(
    items: Sequence[Item], teacher: Teacher, seed: int
) -> tuple[list[Request], list[Planned]]:
    """What the teacher is asked; the plan is empty for the task ``answer``."""
    prompt = load_prompt(teacher.task, teacher.language)
    if teacher.task == "write":
        plan = plan_writing(
            contexts_of(items),
            teacher.write.count,
            {str(level): share for level, share in teacher.write.levels.items()},
            prompt=prompt,
            per_request=teacher.write.per_request,
            seed=seed,
            temperature=teacher.temperature,
        )
        return [planned.request for planned in plan], plan
    return [
        answer_request(
            prompt,
            **row_fields(item),
            max_tokens=teacher.max_tokens,
            temperature=teacher.temperature,
            label=item.id,
        )
        for item in items
    ], []


def ask_teacher(
    items: Sequence[Item], teacher: Teacher, ledger: Path, seed: int, progress: Progress
) -> tuple[list[Item], list[Rejected], Gathered]:
    """Rows with the teacher's answers (or its own questions), and those it gave none for."""
    requests, plan = teacher_requests(items, teacher, seed)
    accept = unusable_pairs if teacher.task == "write" else None
    gathered = gather(requests, teacher, ledger, progress, accept=accept, purpose=teacher.task)
    _enough(gathered, teacher, "teacher")
    texts = [answer.text if answer else None for answer in gathered.answers]
    if teacher.task == "write":
        notes = {item.context: item.notes for item in items}
        written = written_items(plan, texts)
        return [replace(item, notes=notes.get(item.context, ())) for item in written], [], gathered
    answered, lost = [], []
    for number, (item, text) in enumerate(zip(items, texts, strict=True)):
        sql = parse_answer(text) if text is not None else None
        if sql:
            answered.append(replace(item, answer=sql, alternatives=()))
        else:
            reason = gathered.failed.get(number) or f"no SQL in the reply: {(text or '')[:200]!r}"
            lost.append(Rejected(item, "no answer", reason))
    return answered, lost, gathered


def ask_judge(
    items: Sequence[Item],
    judge: Judge,
    ledger: Path,
    progress: Progress,
    predicted: dict[str, str] | None = None,
) -> tuple[dict[str, Verdict], Gathered]:
    """Item id → verdict on the item's own answer, or on what was ``predicted`` for it."""
    requests = _judge_requests(items, judge, predicted)
    gathered = gather(requests, judge, ledger, progress, accept=unusable_verdict, purpose="judge")
    _enough(gathered, judge, "judge")
    texts = [answer.text if answer else None for answer in gathered.answers]
    return collect_verdicts(items, texts), gathered


def _judge_requests(items: Sequence[Item], judge: Judge, predicted: dict[str, str] | None) -> list[Request]:
    return judge_requests(
        load_prompt("judge", judge.language),
        items,
        predicted,
        max_tokens=judge.max_tokens,
        temperature=judge.temperature,
    )


def estimates(recipe: DistillRecipe, items: Sequence[Item], ledger: Path) -> dict[str, dict[str, Any]]:
    """What teacher and judge will take, without a network; the judge is asked about every row at most."""
    found = {}
    if recipe.teacher is not None:
        requests, plan = teacher_requests(items, recipe.teacher, recipe.data.seed)
        expected = None if plan else _lengths(items, recipe.teacher, ledger)
        found[f"teacher {recipe.teacher.model}"] = _shown(
            recipe.teacher, estimate(requests, recipe.teacher, ledger, expected)
        )
    if recipe.judge is not None and "judge" in recipe.data.filters:
        requests = _judge_requests(items, recipe.judge, None)
        found[f"judge {recipe.judge.model} (rows)"] = _shown(
            recipe.judge, estimate(requests, recipe.judge, ledger)
        )
    if recipe.judge is not None and "text2sql" in recipe.evaluate:
        options = recipe.tasks.text2sql
        asked, _ = as_asked(load_items(options.data, options.limit), options.prompt)
        requests = _judge_requests(asked, recipe.judge, {item.id: item.answer for item in asked})
        once = estimate(requests, recipe.judge, ledger)
        both = replace(  # base and student, whose answers are not known yet
            once,
            requests=2 * len(asked),
            cached=0,
            input_tokens=2 * once.input_tokens,
            output_tokens=2 * once.output_tokens,
            usd=2 * once.usd,
        )
        found[f"judge {recipe.judge.model} (base and student, at most)"] = _shown(recipe.judge, both)
    return found


def _shown(endpoint: Teacher | Judge, cost: Estimate) -> dict[str, Any]:
    """The estimate, and whether its money means anything."""
    price = price_of(endpoint.model, endpoint.price, endpoint.batch) if not endpoint.local else None
    return asdict(cost) | {"priced": endpoint.local or price is not None}


def _lengths(items: Sequence[Item], teacher: Teacher, ledger: Path) -> list[int]:
    """Tokens of the source's own answers, which the teacher's will resemble."""
    book = Ledger(ledger) if ledger.exists() else None
    try:
        counter = Counter(teacher, book)
        return [counter.text(item.answer) for item in items]
    finally:
        if book is not None:
            book.close()
