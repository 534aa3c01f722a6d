"""What a distillation says at its end: base against student, judge against execution, what was taken out and spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.distill.prepare import ask_judge
from quantlab.progress import Progress
from quantlab.recipe.distill import DistillRecipe
from quantlab.report.distillation import as_dict, as_markdown, as_text, compare
from quantlab.runs.run import Run, verdicts, write_jsonl
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.prompt.for_model import as_asked
from quantlab.text2sql.teaching.agreement import Agreement, confusion

TASK = "text2sql"


def add_comparison(run: Run, base: Run, recipe: DistillRecipe, ledger: Path, progress: Progress) -> None:
    """Into the student's run: the judge's verdicts (where there is a judge) and the comparison with the base."""
    if TASK not in recipe.evaluate:
        return
    agreement = None
    if recipe.judge is not None:
        judge_run(base, recipe, ledger, progress)
        agreement = judge_run(run, recipe, ledger, progress)
        base.save()
    result = compare(base.samples(TASK), run.samples(TASK), judge=agreement)
    run.record["before_after"] = as_dict(result) | {"markdown": as_markdown(result)}
    run.record["before_after_text"] = as_text(result)
    run.save()


def judge_run(run: Run, recipe: DistillRecipe, ledger: Path, progress: Progress) -> Agreement:
    """Ask the judge about every answer of a run; its yes or no goes into the samples, their share into the row.

    An answer without SQL is a no that nobody is asked about.
    """
    assert recipe.judge is not None
    samples = run.samples(TASK)
    options = recipe.tasks.text2sql
    shown, _ = as_asked(load_items(options.data, options.limit), options.prompt)
    items = {item.id: item for item in shown}
    predicted = {row["id"]: row["extra"]["sql"] for row in samples if row["extra"].get("sql")}
    asked = [items[name] for name in predicted if name in items]
    said, _ = ask_judge(asked, recipe.judge, ledger, progress, predicted)
    for row in samples:
        verdict = said.get(row["id"])
        if row["id"] not in predicted:
            row["extra"]["judge"] = {"yes": False, "why": "no SQL in the answer"}
        elif verdict is not None:
            row["extra"]["judge"] = {"yes": verdict.yes, "why": verdict.why}
    write_jsonl(run.directory / "samples" / f"{TASK}.jsonl", samples)
    yes = {row["id"]: row["extra"]["judge"]["yes"] for row in samples if "judge" in row["extra"]}
    agreement = confusion(yes, verdicts(run))
    run.row["judge"] = sum(yes.values()) / len(yes) if yes else None
    run.record["judge"] = {
        "model": recipe.judge.model,
        "language": recipe.judge.language,
        **agreement.record(),
        "disagreements": [vars(row) for row in agreement.disagreements],
    }
    run.save()
    return agreement


def describe(label: str, run: Run, base: Run, made: dict[str, Any], out: Path) -> dict[str, Any]:
    """One cell of the summary: numbers for programs, and blocks of text for people."""
    training, data = made.get("training") or {}, made.get("data") or {}
    return {
        "label": label,
        "run_id": run.run_id,
        "base_run_id": run.row.get("parent") or base.run_id,
        "checkpoint": str(out),
        "cleaning": data.get("table", ""),
        "spent": _spent(data.get("spent") or []),
        "spending": data.get("spent") or [],
        "training": _trained(training, data, made.get("saved") or {}),
        "numbers": {key: value for key, value in training.items() if key != "curve"},
        "comparison": run.record.get("before_after_text", ""),
        "before_after": run.record.get("before_after"),
        "judge": run.record.get("judge"),
        "row": run.row,
    }


def _spent(spent: list[dict[str, Any]]) -> str:
    """A line for each gathering."""
    lines = []
    for one in spent:
        line = (
            f"{one['for']} by {one['model']}: {one['requests']:,} paid requests, {one['cached']:,} from the ledger, "
            f"{one['input_tokens']:,} tokens in, {one['output_tokens']:,} out, {one['usd']:.4f} USD"
        )
        if one["uncertain"]:
            line += f" (and up to {one['uncertain_usd']:.4f} for {one['uncertain']} whose answer never came)"
        lines.append(line)
    return "\n".join(lines)


def _trained(training: dict[str, Any], data: dict[str, Any], saved: dict[str, Any]) -> str:
    if not training:
        return ""
    text = (
        f"trained {training['trainable']:,} parameters in {training['steps']:,} steps on "
        f"{data.get('examples', 0):,} examples ({training['tokens']:,} tokens, {training['learned']:,} learned), "
        f"{training['seconds']:.0f} s; last loss {training['loss']:.4f}"
    )
    if training.get("eval_loss") is not None:
        text += f", on {data.get('eval_examples', 0):,} kept examples {training['eval_loss']:.4f}"
    if training.get("stopped_early"):
        text += "; stopped early"
    if training.get("resumed_from"):
        text += f"; resumed from step {training['resumed_from']}"
    error = saved.get("largest_logit_difference_before_rounding")
    if error is not None:
        text += f"; merged, largest logit difference {error:.1e}, stored as {saved['dtype']}"
    return text
