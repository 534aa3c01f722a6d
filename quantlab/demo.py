"""`quantlab demo`: the whole story on the model that ships with quantlab, offline, on the CPU, in minutes.

The base is measured; a student is distilled from it by LoRA on the bundled pairs, and measured on the same questions
and on some about a database that nobody trained on; then the student is stored in eight smaller ways, each written to
disk, reloaded, measured and ranked. The recipes are the bundled ones with fewer questions and less text than their
defaults. Run again, it goes on where it stopped, and shows what it has when it is finished.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from quantlab.commands import distill, evaluate
from quantlab.commands.distill_plan import Options as DistillOptions
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.quantize import Options, quantize_and_measure
from quantlab.errors import RecipeError
from quantlab.paths import atomic_write_text
from quantlab.progress import Advance, Progress
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import find_recipe, load_recipe
from quantlab.recipe.quantize import QuantizeRecipe, usable
from quantlab.registry.tasks import TASKS

MODEL = "embedded:base"
DISTILL = "distill-embedded"
RECIPES = ("rtn-int4", "rtn-int3", "bnb-int8", "bnb-nf4", "bnb-nf4-dq", "gptq-int4", "gptq-int3", "awq-int4")
MEASURED = (
    "tasks.perplexity.max_tokens=10000",
    "tasks.text2sql.data=ko_text2sql/dev.jsonl",
    "tasks.text2sql.limit=80",
    "tasks.text2sql.batch_size=40",
    "tasks.text2sql.max_new_tokens=96",
    "tasks.speed.prompt_tokens=64",
    "tasks.speed.new_tokens=16",
    "tasks.speed.repeats=2",
)
SMALLER = (*MEASURED, "tasks.fidelity.max_tokens=5000", "calibration.rows=32")
# One recipe for each kernel: timing a model takes ten seconds and more.
TIMED = ("bnb-int8", "bnb-nf4", "gptq-int4", "awq-int4")
UNTIMED = "evaluate=[perplexity, text2sql, fidelity]"
TRAINED = (
    *MEASURED,
    "evaluate=[perplexity, text2sql, speed]",
    "data.filters=[parses, select, binds]",
    "train.max_steps=150",
    "train.eval_share=0.0",
    "train.save_every=75",
)
GAME = (
    "tasks.text2sql.data=ko_text2sql/test.jsonl",
    "tasks.text2sql.batch_size=42",
    "tasks.text2sql.max_new_tokens=96",
)
TRUST = 60.0  # seconds of work after which what was measured weighs as much as what was expected
# Seconds that each kind of work takes on two cores, for the estimate before there is anything to measure.
STAGES = {
    "cleaning: syntax and names": 9.0,
    "cleaning: duplicates": 8.0,
    "cleaning: leakage": 2.0,
    f"training {DISTILL}": 85.0,
    "saving the student": 1.0,
    "quantizing": 15.0,
    "evaluate: text2sql": 10.0,
}


def run(out: Path, *, device: str = "cpu", as_json: bool = False) -> None:
    """The verb."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in ("runs", "student", "student.partial", "data"))
    ):
        raise RecipeError(f"{out} contains something else", hint="pass another --out")
    from quantlab.models.load import pick_device

    device = pick_device(device)
    lesson = load_recipe(find_recipe(DISTILL), (*TRAINED, f"train.precision={_precision(device)}"))
    assert isinstance(lesson, DistillRecipe)
    recipes = quantize_recipes()
    started = time.monotonic()
    with stdout_is_stderr(), Overall(expected(recipes)) as progress:
        taught = distill.distill(
            DISTILL,
            lesson,
            DistillOptions(out=out / "student", results=out, device=device, resume=True),
            progress,
        )
        summary = quantize_and_measure(
            recipes,
            Options(
                model=str(out / "student"),
                out=out / "checkpoints",
                results=out,
                device=device,
                resume=True,
                verify=False,  # every checkpoint is reloaded and measured here anyway
            ),
            progress,
        )
        game = _game(str(out / "student"), out, device, progress)
    student = taught["cells"][0]
    summary["rows"] = [
        *summary["rows"],
        *(row for row in taught["rows"] if row["run_id"] != student["run_id"]),
    ]
    summary |= {"student": student, "held_out": game, "seconds": round(time.monotonic() - started, 1)}
    _finish(summary, out, as_json=as_json)


def _precision(device: str) -> str:
    """What the student is trained in: bfloat16 saves a third of the time, on what multiplies it."""
    import torch

    from quantlab.models.precision import computed_in

    return str(computed_in(torch.bfloat16, device)).removeprefix("torch.")


def quantize_recipes() -> list[tuple[str, QuantizeRecipe]]:
    """The bundled recipes by name, with less to measure."""
    found = []
    for name in RECIPES:
        path = find_recipe(name)
        plain = load_recipe(path)
        assert isinstance(plain, QuantizeRecipe)
        keys = SMALLER if name in TIMED else (*SMALLER, UNTIMED)
        recipe = load_recipe(path, [key for key in keys if usable(key, plain.method)])
        assert isinstance(recipe, QuantizeRecipe)
        found.append((name, recipe))
    return found


def _game(ref: str, out: Path, device: str, progress: Progress) -> dict[str, Any]:
    """The row of a model on the questions about the held-out database; kept apart, they are other questions."""
    options = evaluate.Options(
        tasks=("text2sql",), results=out / "held-out", overrides=GAME, device=device, resume=True
    )
    row: dict[str, Any] = evaluate.evaluate(ref, options, progress)["rows"][0]
    return row


def _finish(summary: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from quantlab.report.cells import accuracy
    from quantlab.report.html import page
    from quantlab.report.leaderboard import print_table
    from quantlab.runs.leaderboard import rebuild_leaderboard

    rows = rebuild_leaderboard(out)
    summary["rows"] = rows
    atomic_write_text(out / "leaderboard.html", page(rows))
    if as_json:
        print_json(summary)
        return
    student = summary["student"]
    print(student["cleaning"], "", student["training"], "", student["comparison"], sep="\n")
    print_table(rows)
    print(f"\nheld-out game database, 126 questions, EX % [95 %]: student {accuracy(summary['held_out'])}")
    shared = ", ".join(summary["shared_calibration"])
    print(f"base, student, {len(RECIPES)} quantized students: {summary['seconds']:.0f} s")
    if shared:
        print(f"solved from one shared calibration pass: {shared}")
    if summary["skipped"]:
        print(f"kept from an earlier run (delete {out} to start over): {', '.join(summary['skipped'])}")
    print(f"table        {out / 'leaderboard.csv'} (column parent: base, student, quantized student)")
    print(f"page         {out / 'leaderboard.html'}")
    print(f"every answer {out / 'runs'}/<run>/samples/text2sql.jsonl")
    print(f"student      {out / 'student'}")
    # none of them has experts
    print(f"checkpoints  {out / 'checkpoints'}/<recipe>, each loads with transformers alone")


def expected(recipes: list[tuple[str, QuantizeRecipe]]) -> dict[str, float]:
    """Outermost task name → seconds expected."""
    steps = dict(STAGES)
    for count in (2, len(TIMED) + 1):  # base and student; the student again, and what is made of it
        steps[f"speed of {count} models"] = TASKS["speed"].seconds * count
    for name in ("none", DISTILL):
        steps |= {f"{name}: {task}": TASKS[task].seconds for task in ("perplexity", "text2sql")}
    for name, recipe in recipes:
        steps |= {
            f"{name}: {task}": TASKS[task].seconds for task in recipe.evaluate if not TASKS[task].in_turn
        }
    return steps


class Overall:
    """One bar (or one line now and then) for everything: outermost tasks are steps of known expected length, tasks
    inside them move the bar within the step. The estimate is scaled by how long the steps so far really took, little at
    first: the cleaning says little about the training."""

    def __init__(self, steps: Mapping[str, float], stream: TextIO | None = None, every: float = 10.0) -> None:
        self.steps = dict(steps)
        self.total = sum(steps.values())
        self.done = self._ceiling = 0.0
        self.stream = stream or sys.stderr
        self.every = every
        self.started = self.spoke = time.monotonic()
        self._stack: list[str] = []
        self._label = "starting"  # the last step, also between two of them
        self._bars: Any = None
        self._bar: Any = None

    def __enter__(self) -> Overall:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bars = Progress(
                BarColumn(30),
                TaskProgressColumn(),
                TextColumn("about {task.fields[left]:.0f} s left"),
                TextColumn("{task.description}"),
                console=Console(file=self.stream),
                transient=True,
            )
            self._bar = self._bars.add_task("starting", total=self.total, left=self.total)
            self._bars.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def left(self) -> float:
        """Seconds still expected."""
        passed = time.monotonic() - self.started
        return max(self.total - self.done, 0.0) * (passed + TRUST) / (self.done + TRUST)

    def note(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        self._stack.append(name)
        weight = self.steps.get(self._stack[0], 0.0)
        if len(self._stack) == 1:
            self._ceiling = self.done + weight

        def advance(units: float = 1) -> None:
            if total and len(self._stack) == 2:
                self.done = min(self.done + weight * units / total, self._ceiling)
                self._show()

        self._show()
        try:
            yield advance
        finally:
            self._stack.pop()
        if not self._stack:
            self.done = self._ceiling
            self._show()

    def _show(self) -> None:
        if self._stack:
            self._label = self._stack[0]
        text = self._label if self.done < self.total else "done"
        if self._bars is not None:
            self._bars.update(self._bar, completed=self.done, left=self.left(), description=text)
        elif time.monotonic() - self.spoke >= self.every:
            self.spoke = time.monotonic()
            print(
                f"{min(self.done / self.total, 1):4.0%}  {text}, about {self.left():.0f} s left",
                file=self.stream,
                flush=True,
            )
