"""Text2SQL accuracy: questions in, SQL out, executed against the gold on a database.

EM (exact match after normalising) and EX (same result when executed) are kept apart, and so are the ways of
failing: `ok, wrong, error, timeout, unparsed`. Only the first complete statement of an answer is judged;
how many answers ended there of themselves is `stopped`, reported beside it. An item whose gold returns
nothing says nothing about a prediction: it is left out of EX, whatever the prediction, and counted as
`no_evidence`.

An item with a populated database is run on it, one without on witness databases made from its DDL and gold
(`quantlab.text2sql.scoring.databases`). An item that cannot be run at all is an error that is not scored, with the
reason.

Scoring needs no model: `score` takes outputs, wherever they come from. `rules` sets the verdicts of published
evaluators beside ours.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantlab.progress import Progress
from quantlab.registry.tasks import Text2SqlOptions
from quantlab.runs.run import VERDICTS, Sample, TaskResult
from quantlab.stats import wilson
from quantlab.text2sql.data.dataset import id_notes, load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.dialects.transpile import CLOCK
from quantlab.text2sql.extraction.extract import extract, rest_is_nothing
from quantlab.text2sql.prompt.for_model import (
    as_asked,
    choose_shots,
    data_digest,
    make_prompts,
    prompt_record,
)
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.scoring.databases import Setting, find_ground, judge_on
from quantlab.text2sql.scoring.exact_match import exact_match
from quantlab.text2sql.scoring.execution import Verdict
from quantlab.text2sql.scoring.official.evaluators import beside, compare_rule

RULES = (
    "rows as a multiset, as a sequence (up to ties) only when the gold's outermost query sorts; "
    "columns may be permuted, none dropped or added; "
    "floats within 1e-6 relative; NULL equals only NULL; an empty gold result is no evidence"
)


def evaluate(
    subject: Any, options: Text2SqlOptions, *, baseline: Any = None, progress: Progress
) -> TaskResult:
    """Generate and score. Metrics of `summarize`, one sample an item."""
    items, template = as_asked(load_items(options.data, options.limit), options.prompt)
    notes = id_notes(items, options.data)
    for note in notes:
        progress.note(note)
    prompts = make_prompts(subject, items, options, choose_shots(options, items, template), template)
    from quantlab.evals.generation import generate
    from quantlab.evals.kv_cache import Caches

    caches = Caches(subject.model, options.kv_cache)
    with progress.task("text2sql", total=len(items)) as advance:
        generations = generate(
            subject.model,
            subject.tokenizer,
            [prompt.text for prompt in prompts],
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            device=subject.device,
            stop_at_statement=options.stop == "statement",
            caches=caches,
            advance=advance,
        )
    samples = score(
        items,
        [generation.text for generation in generations],
        progress=progress,
        setting=setting_of(options),
        rules=options.rules,
    )
    for sample, prompt, generation in zip(samples, prompts, generations, strict=True):
        sample.extra.update(prompt.extra)
        sample.extra["stopped"] = generation.ended and bool(sample.extra["stopped"])
        sample.extra["truncated"] = generation.full or bool(prompt.cut)
        sample.extra["new_tokens"] = generation.tokens
    asked = data_digest(items, template)
    return TaskResult(
        "text2sql",
        {**summarize(samples), "ex_data": data_name(options, asked), "data_digest": asked},
        samples,
        {
            "max_new_tokens": options.max_new_tokens,
            "stop": options.stop,
            "prompt": prompt_record(items, options.prompt, template),
            **details(options, samples),
            **({"notes": notes} if notes else {}),
            **caches.details(),
        },
    )


def data_name(options: Text2SqlOptions, asked: str) -> str:
    """The questions by their source and the digest of what is asked."""
    return f"{options.data}#{asked[:8]}"


def setting_of(options: Text2SqlOptions) -> Setting:
    """Where and how questions are run, from the options of the task."""
    return Setting(dialect=options.dialect, witness=options.witness)


def details(options: Text2SqlOptions, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the numbers rest on: the data, the rules, the clock, witness databases, published rules."""
    found: dict[str, Any] = {"data": options.data, "rules": RULES, "clock": CLOCK}
    witnessed = [sample.extra["witness"] for sample in samples if sample.extra.get("witness")]
    if witnessed:
        mutants = sum(record["mutants"] for record in witnessed)
        killed = sum(record["killed"] for record in witnessed)
        found["witness"] = {
            "items": len(witnessed),
            "databases": sum(record["databases"] for record in witnessed),
            "mutants": mutants,
            "killed": killed,
            "mutation_score": _share(killed, mutants),
        }
    if options.rules:
        found["published"] = {rule: compare_rule(rule, samples) for rule in options.rules}
    return found


def score(
    items: Sequence[Item],
    outputs: Sequence[str],
    *,
    progress: Progress,
    workers: int | None = None,
    setting: Setting | None = None,
    rules: Sequence[str] = (),
) -> list[Sample]:
    """A sample for each item from what was written for it; needs no model."""
    setting = setting or Setting()
    with Sandbox(workers=workers or min(2, os.cpu_count() or 1)) as sandbox:

        def one(pair: tuple[Item, str]) -> Sample:
            return score_one(sandbox, *pair, setting=setting, rules=rules)

        samples = []
        with progress.task("text2sql: execution", total=len(items)) as advance:
            for sample in sandbox.map(one, list(zip(items, outputs, strict=True))):
                samples.append(sample)
                advance(1)
    return samples


def score_one(
    sandbox: Sandbox, item: Item, output: str, *, setting: Setting | None = None, rules: Sequence[str] = ()
) -> Sample:
    """Extract, match and execute one answer."""
    found = extract(output)
    ground = find_ground(item, sandbox, setting or Setting())
    verdict = judge_on(sandbox, ground, found.statement)
    exact = bool(found.statement) and any(
        exact_match(found.statement, gold, ground.dialect) for gold in item.golds
    )
    if exact and not verdict.evidence and verdict.verdict == "error" and verdict.kind == "rows":
        verdict = Verdict(
            "ok", "not scored by execution: the gold returns no rows; same query", False, verdict.kind
        )
    extra: dict[str, Any] = {
        "sql": found.statement,
        "gold": item.answer,
        "exact": exact,
        "evidence": verdict.evidence,
        "stopped": bool(found.statement) and rest_is_nothing(found.after),
        "cut_before": found.before,
        "cut_after": found.after,
        **({"cut_inside": found.inside} if found.inside else {}),
        "db_id": item.db_id,
    }
    extra |= {key: item.extra[key] for key in ("level", "kind") if key in item.extra}
    if ground.witness is not None:
        extra["witness"] = ground.record
    if rules:
        extra["published"] = {
            rule: beside(sandbox, ground, rule, verdict, item, found.statement) for rule in rules
        }
    return Sample(item.id, item.question, output, verdict.verdict, verdict.why, extra)


def summarize(samples: Sequence[Sample]) -> dict[str, float | int | str | None]:
    """em, ex with its Wilson interval, stopped, and the counts; shares are None where nothing was scored."""
    scored = [sample for sample in samples if sample.extra["evidence"]]
    right = sum(sample.verdict == "ok" for sample in scored)
    low, high = wilson(right, len(scored))
    counts = Counter(sample.verdict for sample in samples)
    return {
        "em": _share(sum(sample.extra["exact"] for sample in samples), len(samples)),
        "ex": _share(right, len(scored)),
        "ex_low": low if scored else None,
        "ex_high": high if scored else None,
        "stopped": _share(sum(sample.extra["stopped"] for sample in samples), len(samples)),
        "items": len(samples),
        "scored": len(scored),
        "no_evidence": len(samples) - len(scored),
        "truncated": sum(bool(sample.extra.get("truncated")) for sample in samples),
        **{f"n_{verdict}": counts[verdict] for verdict in VERDICTS},
    }


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
