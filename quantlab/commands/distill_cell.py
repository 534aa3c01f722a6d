"""One recipe without a sweep, from rows to a measured student. Every stage finds what an earlier attempt finished."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab import __version__
from quantlab.calibration import read_texts
from quantlab.commands.defaults import note_texts
from quantlab.commands.distill_plan import Plan, plan_cell
from quantlab.commands.planned_run import PlannedRun, find_baseline, start_run, text_digest
from quantlab.distill.prepare import prepare, read_source
from quantlab.distill.processes import is_first_process, process_count
from quantlab.distill.sweep import Cell
from quantlab.models.positions import positions_of
from quantlab.models.provenance import provenance
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.paths import atomic_write_text, short_hash
from quantlab.progress import Progress
from quantlab.quant.checkpoint_paths import partial_path
from quantlab.recipe.distill import DistillRecipe
from quantlab.runs.leaderboard import rebuild_leaderboard
from quantlab.runs.run import Run
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item

if TYPE_CHECKING:
    from quantlab.commands.distill_plan import Options
    from quantlab.distill.data import Block
    from quantlab.distill.train import LogitLoss, Settings


def run_cell(name: str, cell: Cell, options: Options, progress: Progress) -> dict[str, Any]:
    """Prepare, train, save, measure; what is there already is kept."""
    plan = plan_cell(name, cell, options)
    for said in (plan.files.found.note, note_texts([cell.recipe], plan.files)):
        if said and is_first_process():
            progress.note(f"{plan.files.name}: {said}")
    together = _Processes(options)
    if not plan.made:
        _make(plan, options, progress, together)
    together.wait()
    if not together.first:
        return {}
    return _measure(plan, options, progress)


class _Processes:
    """The processes of `accelerate launch`: one prepares and measures, all train."""

    def __init__(self, options: Options) -> None:
        self.first = is_first_process()
        self._state: Any = None
        if process_count() > 1:
            from accelerate import PartialState

            # While the first one asks a teacher, the others wait: for days if need be.
            self._state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=7))

    def wait(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()


def _make(plan: Plan, options: Options, progress: Progress, together: _Processes) -> None:
    """Rows, training, merging, and the student's directory moved into place."""
    from quantlab.distill.student import trainable

    recipe, partial = plan.recipe, partial_path(plan.out)
    started = time.perf_counter()
    if together.first:
        _open_partial(partial, plan.work, options)
        rows = _rows(plan, options, progress)
    together.wait()
    if not together.first:
        rows = _rows(plan, options, progress)
    from quantlab.distill.train import train

    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(options.results / "tensorboard" / plan.work.run_id))
    student = _open(plan, options)
    lesson = _lay_out(plan, student, rows, options, progress)
    counts = lesson.counts
    if together.first and counts["too_long"]:
        progress.note(
            f"{counts['too_long']} rows are left out: longer than {recipe.train.max_len} tokens, or with a prompt that "
            "is cut in evaluation"
        )
    size = trainable(student.model)
    with progress.task(f"training {plan.work.name}"):
        trained = train(
            student,
            lesson.blocks,
            lesson.held_out,
            lesson.settings,
            partial / "training",
            progress,
            lesson.logits,
        )
    if not together.first:
        return
    record = {
        "kind": "distill",
        "quantlab_version": __version__,
        "run_id": plan.work.run_id,
        "recipe": recipe.content(),
        "recipe_digest": recipe.digest(),
        "parent": recipe.student.model,
        "parent_digest": plan.files.digest,
        "data": rows["record"] | counts,
        "training": asdict(trained) | {"trainable": size, "precision": student.precision},
    }
    with progress.task("saving the student"):
        record["saved"] = _save(student, plan, partial / "student")
    record["seconds"] = round(time.perf_counter() - started, 1)
    atomic_write_text(
        partial / "student" / "quantlab.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    )
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    if plan.out.is_dir():
        plan.out.rmdir()  # empty, or it would have been refused
    os.replace(partial / "student", plan.out)
    shutil.rmtree(partial)


def _open_partial(partial: Path, work: PlannedRun, options: Options) -> None:
    """The directory of the unfinished student; one of another recipe, or without --resume, is begun anew."""
    marker = partial / "resume.json"
    key = {"run_id": work.run_id}
    if marker.is_file() and options.resume and json.loads(marker.read_text(encoding="utf-8")) == key:
        shutil.rmtree(partial / "student", ignore_errors=True)
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    atomic_write_text(marker, json.dumps(key))


def _rows(plan: Plan, options: Options, progress: Progress) -> dict[str, Any]:
    """`items` or `texts`, and the `record` of how they came about."""
    recipe = plan.recipe
    if recipe.data.format == "text":
        texts = read_texts(recipe.data.source)[: recipe.data.limit]
        name = text_digest(recipe.data.source)
        return {"texts": texts, "record": {"source": recipe.data.source, "rows": len(texts), "digest": name}}
    source = plan.source or read_source(recipe)
    if source.bad:
        progress.note(
            f"{len(source.bad)} rows cannot be read and are left out; one says: {source.bad[0].reason}"
        )
    items, record = prepare(recipe, source, options.book, options.results / "data", progress)
    return {"items": items, "record": record | {"prompt": _prompt(recipe, items, progress)}}


def _prompt(recipe: DistillRecipe, items: Sequence[Item], progress: Progress) -> dict[str, Any]:
    """How the rows are asked, for the student's record; said where the evaluation's questions are asked otherwise."""
    from quantlab.text2sql.prompt.for_model import prompt_record, template_of

    options = recipe.tasks.text2sql
    template = template_of(options.prompt, items)
    if "text2sql" in recipe.evaluate:
        asked = template_of(options.prompt, load_items(options.data, options.limit))
        if asked != template:
            progress.note(
                f"the rows are asked by the prompt {template.name}, the evaluation's questions by {asked.name}: "
                "tasks.text2sql.prompt.language makes them one"
            )
    return prompt_record(items, options.prompt, template) | {"example": template.example()}


def _open(plan: Plan, options: Options) -> Any:
    from quantlab.distill.student import open_student

    student = plan.recipe.student
    return open_student(
        student.model,
        mode=student.mode,
        r=student.lora.r,
        alpha=student.lora.alpha,
        dropout=student.lora.dropout,
        targets=student.lora.targets,
        rslora=student.lora.rslora,
        device=options.device,
        precision=plan.recipe.train.precision,
        seed=plan.recipe.train.seed,
        trust_remote_code=options.trust_remote_code,
    )


@dataclass(frozen=True)
class _Lesson:
    """What the trainer is given: blocks to train on, blocks that are evaluated on, settings, the KL loss where there is
    one, and how many rows and tokens there are."""

    blocks: Sequence[Block]
    held_out: Sequence[Block]
    settings: Settings
    logits: LogitLoss | None
    counts: dict[str, int]


def _lay_out(plan: Plan, student: Any, rows: dict[str, Any], options: Options, progress: Progress) -> _Lesson:
    """The rows as blocks of tokens, and how they are trained on."""
    from quantlab.distill.data import pack, split_off
    from quantlab.distill.train import Settings

    recipe, train = plan.recipe, plan.recipe.train
    # A packed block may be longer than the model's positions, which begin anew in it; a row may not.
    positions = positions_of(student.model.config)
    longest = min(train.max_len, positions or train.max_len)
    examples, counts = _encode(recipe, student, rows, longest)
    learned, kept = split_off(examples, train.eval_share, train.seed)
    logits = _logits(plan, student, examples, options, progress) if train.logits is not None else None
    named = {field.name for field in fields(Settings)} - {"packed", "report_to"}
    settings = Settings(
        **train.model_dump(include=named), packed=train.packing != "none", report_to=tuple(train.report_to)
    )
    blocks = pack(learned, train.packing, train.max_len, train.seed)
    held = pack(kept, train.packing, train.max_len, train.seed)
    counts |= {
        "examples": len(learned),
        "eval_examples": len(kept),
        "blocks": len(blocks),
        "block_tokens": sum(map(len, blocks)),
    }
    return _Lesson(blocks, held, settings, logits, counts)


def _encode(
    recipe: DistillRecipe, student: Any, rows: dict[str, Any], longest: int
) -> tuple[Any, dict[str, int]]:
    """Examples of at most `longest` tokens, and how many rows are left out. Questions are asked as the evaluation
    will ask them: with its chat template, its linker, its examples."""
    from quantlab.distill.data import encode, encode_texts
    from quantlab.text2sql.prompt.for_model import as_asked, choose_shots, make_prompts, without_shown

    if recipe.data.format == "text":
        return encode_texts(rows["texts"], student.tokenizer, longest), {"too_long": 0}
    options = recipe.tasks.text2sql
    noted, template = as_asked(rows["items"], options.prompt)
    shots = choose_shots(options, load_items(options.data, options.limit), template) if options.shots else []
    items = without_shown(noted, shots)
    prompts = make_prompts(student, items, options, shots, template)
    examples, too_long = encode(items, student.tokenizer, longest, prompts)
    shown = len(rows["items"]) - len(items)
    return examples, {"too_long": len(too_long), **({"shown_as_examples": shown} if shots else {})}


def _logits(plan: Plan, student: Any, examples: Any, options: Options, progress: Progress) -> Any:
    """The teacher's log-probabilities on the examples, gathered where the store lacks them."""
    from quantlab.distill.logits import gather_logits, same_vocabulary, vocabulary_digest
    from quantlab.distill.train import LogitLoss
    from quantlab.models.load import load_model

    wish = plan.recipe.train.logits
    assert wish is not None
    files = open_files(wish.model)
    teacher = load_model(
        wish.model,
        device=options.device,
        dtype="float32" if student.device == "cpu" else "auto",
        trust_remote_code=options.trust_remote_code,
    )
    size = same_vocabulary(teacher.tokenizer, student.tokenizer, teacher.model.config, student.model.config)
    vocabulary = vocabulary_digest(teacher.tokenizer)
    top_k = min(wish.top_k, size)
    name = short_hash([files.digest, vocabulary, str(top_k), str(wish.temperature), str(size)])
    store = gather_logits(
        teacher.model,
        [(example.tokens, example.positions()) for example in examples],
        options.results / "logits" / name,
        top_k=top_k,
        temperature=wish.temperature,
        batch_tokens=4096,
        device=student.device,
        identity={"teacher": files.digest, "tokenizer": vocabulary},
        progress=progress,
        vocabulary=size,
    )
    return LogitLoss(
        lambda example: store.lookup(store.number(example.tokens, example.positions())),
        plan.recipe.train.loss,
        size,
        wish.temperature,
        wish.weight,
        wish.beta,
    )


def _save(student: Any, plan: Plan, out: Path) -> dict[str, Any]:
    """Merge and save, or save the adapter beside the quantized base; says which, and how exact it is."""
    from quantlab.distill.student import merged, probe, save_adapted, save_merged, settle

    wish = plan.recipe.student.merge
    apart = student.adapted and (plan.files.quantized is not None if wish is None else not wish)
    if apart:
        save_adapted(student, out)
        return {"merged": False}
    before = probe(settle(student))
    model = merged(student)
    error = float((probe(model) - before).abs().max())
    dtype = plan.recipe.dtype if plan.recipe.dtype != "auto" else _stored_dtype(plan.files)
    save_merged(model, student, out, dtype)
    return {"merged": True, "dtype": dtype, "largest_logit_difference_before_rounding": error}


def _stored_dtype(files: ModelFiles) -> str:
    stored = files.config.get("dtype") or files.config.get("torch_dtype") or "float32"
    return stored if stored in ("float32", "bfloat16", "float16") else "float32"


def _measure(plan: Plan, options: Options, progress: Progress) -> dict[str, Any]:
    """Base and student on the same items, the comparison, the card; returns what the summary shows."""
    from quantlab.commands.distill_report import add_comparison, describe
    from quantlab.commands.measure import Entry, Evaluator
    from quantlab.report.student_card import write_student_card

    bench = Evaluator(options.device, options.trust_remote_code, progress)
    model = plan.recipe.student.model
    base = find_baseline(plan.work, plan.files.digest) or plan.base.existing() or start_run(plan.base)
    run = plan.work.existing() or start_run(plan.work)
    entries = [Entry(plan.base, base, model), Entry(plan.work, run, plan.out)]
    bench.take_turns([entry for entry in entries if not entry.run.done], (model, plan.recipe.dtype))
    if not base.done:
        base.row["work_seconds"] = 0.0
        bench.measure(plan.base, base, model, None, None)
    made = provenance(plan.out)
    if not run.done:
        run.row["work_seconds"] = made.get("seconds")
        run.record["checkpoint"] = str(plan.out)
        run.record["output_digest"] = open_files(plan.out).digest
        run.record["data_prepared"] = made.get("data")
        run.record["training"] = made.get("training")
        _keep_rejected(plan, run, options)

        def before_end(run: Run) -> None:
            add_comparison(run, base, plan.recipe, options.book, progress)

        bench.measure(plan.work, run, plan.out, base, model, before_end)
    rebuild_leaderboard(options.results)
    write_student_card(plan.out, run.row, run.record.get("before_after"))
    return {**describe(plan.cell.label, run, base, made, plan.out), "errors": bench.errors}


def _keep_rejected(plan: Plan, run: Run, options: Options) -> None:
    """A copy of what cleaning took out, with the run."""
    name = (run.record["data_prepared"] or {}).get("digest", "")
    rejected = options.results / "data" / name / "rejected.jsonl"
    if name and rejected.is_file():
        shutil.copyfile(rejected, run.directory / "rejected.jsonl")
