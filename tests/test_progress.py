"""Progress when piped, and the demo's one bar over everything."""

import io
import time

import pytest

from quantlab.demo import DISTILL, TRAINED, Overall, expected, quantize_recipes
from quantlab.progress import Bars, Lines, Silent, default_progress
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import find_recipe, load_recipe


def test_lines_speak_at_the_end_of_outermost_work_only() -> None:
    said = io.StringIO()
    progress = Lines(said)
    with progress.task("outer"), progress.task("inner", total=2) as advance:
        advance(1)
        advance(1)
    assert said.getvalue().startswith("outer: ") and "inner" not in said.getvalue()


def test_lines_estimate_inside_long_work() -> None:
    said = io.StringIO()
    with Lines(said, every=0).task("work", total=4) as advance:
        time.sleep(0.01)
        advance(1)
        advance(3)
    assert "work: 25%, about 0 s left" in said.getvalue() and "work: 100%" in said.getvalue()


def test_unknown_total_and_nesting_after_an_error() -> None:
    said = io.StringIO()
    progress = Lines(said, every=0)
    with pytest.raises(ValueError, match="stop"), progress.task("broken") as advance:
        advance(3)
        raise ValueError("stop")
    assert "broken: 3 done" in said.getvalue()
    with progress.task("next"):
        pass
    assert "next: " in said.getvalue()


def test_bars_nest_and_leave_only_the_outermost() -> None:
    said = io.StringIO()
    progress = Bars(said)
    with progress.task("outer"), progress.task("inner", total=1) as advance:
        advance(1)
    progress.note("[not markup]")
    assert (
        "outer:" in said.getvalue() and "inner:" not in said.getvalue() and "[not markup]" in said.getvalue()
    )


def test_silence_and_choice() -> None:
    assert isinstance(default_progress(quiet=True), Silent)
    with Silent().task("x", total=1) as advance:
        advance(1)


def test_overall_reaches_the_end_whatever_the_steps_report() -> None:
    said = io.StringIO()
    with Overall({"a": 30.0, "b: x": 10.0, "b: y": 10.0}, said, every=0) as progress:
        assert progress.left() == pytest.approx(50)
        with progress.task("a"), progress.task("inner", total=10) as advance:
            for _ in range(5):
                advance(1)
            assert progress.done == pytest.approx(15)
            advance(50)  # more than was said
            assert progress.done == pytest.approx(30)
        with progress.task("b: x"):
            pass
        assert progress.done == pytest.approx(40)
        with progress.task("not expected"), progress.task("inner", total=1) as advance:
            advance(1)
        assert progress.done == pytest.approx(40)
        with progress.task("b: y"):
            pass
        assert progress.done == pytest.approx(progress.total)
    assert "60%  a, about" in said.getvalue() and "100%  done" in said.getvalue()


def test_a_quick_beginning_does_not_halve_the_estimate() -> None:
    said = io.StringIO()
    progress = Overall({"cleaning": 20.0, "training": 80.0, "the rest": 240.0}, said)
    for step, took in (("cleaning", 10.0), ("training", 80.0)):
        with progress.task(step):
            progress.started -= took
        left = sum(progress.steps.values()) - progress.done
        assert 0.8 * left < progress.left() <= left
    with progress.task("the rest"), progress.task("inner", total=2) as advance:
        progress.started -= 360.0  # three times as slow as expected
        advance(1)
        assert 200 < progress.left() < 300


def test_the_demo_stores_the_student_in_eight_ways_and_its_overrides_fit() -> None:
    recipes = quantize_recipes()
    assert len({recipe.digest() for _, recipe in recipes}) == 8
    lesson = load_recipe(find_recipe(DISTILL), TRAINED)
    assert isinstance(lesson, DistillRecipe) and lesson.train.packing == "shared"
    for _, recipe in recipes:  # else the student's own run would not be their baseline
        assert all(recipe.tasks.of(task) == lesson.tasks.of(task) for task in ("perplexity", "text2sql"))
    steps = expected(recipes)
    assert "none: text2sql" in steps and "gptq-int4: fidelity" in steps and steps["quantizing"] > 0
    assert 300 < sum(steps.values()) < 360  # measured on two threads with AVX2: 302 to 371
