"""`quantlab evaluate --predictions FILE`: score what some model, person or program has written; no model is loaded.

The predictions become a run like any other (samples with verdict and reason, a row of the leaderboard whose model is
the file's name), and the report says what the numbers rest on: the rules, the clock, witness databases and their
mutation score, published rules beside ours, and a judge's verdicts against execution.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab import __version__
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.errors import RecipeError
from quantlab.paths import file_digest, short_hash, slug
from quantlab.progress import Progress, default_progress
from quantlab.recipe.load import EvaluateRecipe, parse_recipe
from quantlab.runs.leaderboard import rebuild_leaderboard
from quantlab.runs.run import Run, Sample, TaskResult

SHOWN = 5  # disagreements and reasons printed; all of them are in the files


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    data: str | None = None
    rules: tuple[str, ...] = ()
    judge: Path | None = None
    tasks: tuple[str, ...] = ()
    results: Path = Path("results")
    overrides: tuple[str, ...] = ()
    resume: bool = False


def run(predictions: Path, options: Options, *, as_json: bool = False) -> None:
    """The verb."""
    if any(task != "text2sql" for task in options.tasks):
        raise RecipeError("--predictions are SQL: the only task is text2sql", hint="leave --task out")
    with stdout_is_stderr():
        summary = score(predictions, options, default_progress())
    if as_json:
        print_json(summary)
        return
    print(report(summary))
    from quantlab.report.leaderboard import print_table

    print_table(summary["rows"])
    print(f"every verdict with its reason: {summary['samples']}")


def score(predictions: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """Everything between the command line and its last line; returns the summary."""
    from quantlab.evals import text2sql
    from quantlab.text2sql.data.dataset import digest, id_notes, load_items
    from quantlab.text2sql.data.predictions import read_judge, read_predictions

    recipe = _recipe(options)
    task = recipe.tasks.text2sql
    items = load_items(task.data, task.limit)
    outputs = read_predictions(predictions, items)
    judged = read_judge(options.judge, items) if options.judge is not None else {}
    data, written = digest(items), file_digest(predictions)[:16]
    judge_digest = file_digest(options.judge)[:16] if options.judge is not None else ""
    short = short_hash([recipe.digest(), written, data, judge_digest])[:8]
    row = {
        "run_id": f"{slug(predictions.stem)}-predictions-{short}",
        "model": predictions.name,
        "stage": "predictions",
        "recipe_digest": recipe.digest(),
        "model_digest": written,
        "data_digest": short_hash([data]),
        "quantlab_version": __version__,
    }
    directory = options.results / "runs" / str(row["run_id"])
    found = Run.read(directory) if (directory / "run.json").exists() else None
    if found is not None and found.done and not options.resume:
        raise RecipeError(
            f"{directory}: these predictions were scored already",
            hint="pass --resume to show them, or another --results",
        )
    if found is None or not found.done:
        found = Run.start(directory, recipe.to_yaml(), row)
        found.record["data"] = {"text2sql": data}
        samples = text2sql.score(
            items, outputs, progress=progress, setting=text2sql.setting_of(task), rules=task.rules
        )
        details = text2sql.details(task, samples)
        notes = id_notes(items, task.data)
        details |= {"notes": notes} if notes else {}
        if judged:
            details["judge"] = _agreement(samples, judged)
        metrics = {**text2sql.summarize(samples), "data_digest": data}
        if judged:
            metrics["judge"] = sum(yes for yes, _ in judged.values()) / len(judged)
        found.add(TaskResult("text2sql", metrics, samples, details))
        found.finish()
    rows = rebuild_leaderboard(options.results)
    content = found.record["tasks"]["text2sql"]
    return {
        "status": "done",
        "run": found.run_id,
        "metrics": content["metrics"],
        "details": content["details"],
        "reasons": _reasons(found.samples("text2sql")),
        "rows": [line for line in rows if line["run_id"] == found.run_id],
        "samples": str(directory / "samples" / "text2sql.jsonl"),
        "leaderboard": str(options.results / "leaderboard.csv"),
    }


def _recipe(options: Options) -> EvaluateRecipe:

    overrides = [*options.overrides, *text2sql_overrides(options.data, options.rules)]
    recipe = parse_recipe("kind: evaluate\nevaluate: [text2sql]\n", "--predictions", overrides)
    assert isinstance(recipe, EvaluateRecipe)
    return recipe


def _agreement(samples: Sequence[Sample], judged: dict[str, tuple[bool, str]]) -> dict[str, Any]:
    """The judge against execution on the items that execution says something about."""
    from quantlab.text2sql.teaching.agreement import confusion, table_text

    scored = {s.id: s for s in samples if s.extra["evidence"]}
    found = confusion(
        {name: yes for name, (yes, _) in judged.items()},
        {name: s.verdict == "ok" for name, s in scored.items()},
    )
    disagreements = [
        {
            "id": one.id,
            "judge": "yes" if one.judge else "no",
            "judge_why": judged[one.id][1],
            "execution": scored[one.id].verdict,
            "execution_why": scored[one.id].why,
        }
        for one in found.disagreements
    ]
    return {**found.record(), "table": table_text(found), "disagreements": disagreements}


def _reasons(samples: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What went wrong, the most frequent first; numbers and values in the words are left out to count alike ones."""
    words = Counter(
        f"{row['verdict']}: "
        + re.sub(r"'[^']*'|\b\d[\d.]*\b", "…", str(row["why"]).split(" (witness")[0])[:100]
        for row in samples
        if row["verdict"] != "ok"
    )
    return dict(words.most_common())


def report(summary: dict[str, Any]) -> str:
    """The summary as plain text."""
    metrics, details = summary["metrics"], summary["details"]
    counts = ", ".join(
        f"{metrics['n_' + name]} {name}"
        for name in ("ok", "wrong", "error", "timeout", "unparsed")
        if metrics["n_" + name]
    )
    lines = [f"{metrics['items']} predictions on {details['data']}: {counts}"]
    if metrics["no_evidence"]:
        lines.append(
            f"{metrics['no_evidence']} not scored: their gold gives no evidence (it fails, or returns nothing)"
        )
    lines += details.get("notes") or []
    lines.append(f"rules: {details['rules']}")
    lines.append(f"the clock of every query stands at {details['clock']}")
    witness = details.get("witness")
    if witness:
        score_ = witness["mutation_score"]
        lines.append(
            f"{witness['items']} questions without a database of their own: {witness['databases']} witness databases, "
            f"which tell {witness['killed']} of {witness['mutants']} mutants from the gold"
            + (f" ({score_:.1%})" if score_ is not None else "")
        )
    for rule, found in (details.get("published") or {}).items():
        lines += _rule_lines(rule, found)
    judge = details.get("judge")
    if judge:
        lines += ["judge against execution:", judge["table"]]
        for one in judge["disagreements"][:SHOWN]:
            why = one["judge_why"] or one["execution_why"]
            lines.append(
                f"  {one['id']}: judge {one['judge']}, execution {one['execution']}"
                + (f": {why}" if why else "")
            )
        if len(judge["disagreements"]) > SHOWN:
            lines.append(f"  and {len(judge['disagreements']) - SHOWN} more, in run.json")
    if summary["reasons"]:
        lines.append("most frequent reasons:")
        lines += [f"  {count} × {reason}" for reason, count in list(summary["reasons"].items())[:SHOWN]]
    return "\n".join(lines)


def _rule_lines(rule: str, found: dict[str, Any]) -> list[str]:
    if found["accuracy"] is None:
        return [f"by the rule of {rule}: its verdicts cannot be told"]
    text = (
        f"by the rule of {rule}: {100 * found['accuracy']:.1f} % "
        f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}] of {found['items']}; right there "
        f"and not here {len(found['right_there_not_here'])}, the other way {len(found['right_here_not_there'])}, not "
        f"scored here {found['not_scored_here']}, not told there {found['not_told']}"
    )
    return [text, *(f"  {count} × {reason}" for reason, count in list(found["reasons"].items())[:SHOWN])]


def text2sql_overrides(data: str | None, rules: Sequence[str]) -> list[str]:
    """`--data` and `--metric` as overrides of the recipe."""
    found = [f"tasks.text2sql.data={data}"] if data is not None else []
    return found + ([f"tasks.text2sql.rules=[{', '.join(rules)}]"] if rules else [])
