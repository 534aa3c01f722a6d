"""Every YAML under recipes/ is a valid recipe, is headed by its command, and names files that exist."""

import itertools
import shlex
from pathlib import Path

import pytest

from quantlab.commands.recipes import about
from quantlab.distill.sweep import cells
from quantlab.paths import bundled, find_source
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import bundled_recipes, load_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.hub import parse_hub

ROOT = bundled("recipes")
FILES = sorted(ROOT.rglob("*.y*ml"))
METHODS = {"none", "rtn", "imatrix", "bnb-int8", "bnb-fp4", "bnb-nf4", "gptq", "awq", "fp8"}
LAYOUTS = {"gptq", "awq", "compressed-tensors", "gguf", "bitsandbytes", "none"}
BOOK = sorted((ROOT / "book").glob("*.yaml"))
SMALL = "ko_text2sql:ko_text2sql/test_book_columns.csv"  # what the book's recipes are evaluated on in their small forms


def name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def named_commands(path: Path) -> list[list[str]]:
    """Words of the commands that stand in a recipe's comments after the first line."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    text = "\n".join(lines[1:]).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("quantlab ")]


def overrides(words: list[str]) -> list[str]:
    return [after for word, after in itertools.pairwise(words) if word == "--set"]


def check_sources(recipe: DistillRecipe) -> None:
    for source in (recipe.data.source, recipe.tasks.text2sql.data):
        if source.startswith("hf:"):
            assert parse_hub(source)[0]
        else:
            assert find_source(source.removeprefix("ko_text2sql:")).is_file()


def test_every_file_is_found_by_name() -> None:
    assert sorted(bundled_recipes().values()) == FILES


@pytest.mark.parametrize("path", FILES, ids=name)
def test_loads_and_names_existing_sources(path: Path) -> None:
    recipe = load_recipe(path)
    for task in ("perplexity", "fidelity"):
        assert find_source(getattr(recipe.tasks, task).source).is_file()
    if isinstance(recipe, QuantizeRecipe) and recipe.needs_calibration:
        assert find_source(recipe.calibration.source).is_file()
    if isinstance(recipe, DistillRecipe):
        for cell in cells(recipe, path.name):
            check_sources(cell.recipe)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_is_headed_by_its_command_and_what_to_expect(path: Path) -> None:
    first, second, third = path.read_text(encoding="utf-8").splitlines()[:3]
    words = shlex.split(first.removeprefix("# "))
    recipe = load_recipe(path)
    assert words[:3] == ["quantlab", "distill" if isinstance(recipe, DistillRecipe) else "quantize",
                         f"recipes/{path.relative_to(ROOT).as_posix()}"]  # fmt: skip
    assert (words[3:4] == ["--model"]) == isinstance(recipe, QuantizeRecipe)
    assert second.startswith("# ") and about(path) == second[2:]
    assert third.startswith("# Expect")


def test_every_method_has_a_recipe() -> None:
    recipes = [load_recipe(path) for path in FILES]
    assert {recipe.method for recipe in recipes if isinstance(recipe, QuantizeRecipe)} == METHODS
    quantizing = [recipe for recipe in recipes if isinstance(recipe, QuantizeRecipe)]
    assert {recipe.format for recipe in quantizing} == LAYOUTS
    for key in ("double_quant", "static_groups", "target_bits"):
        assert any(getattr(recipe, key) for recipe in quantizing), key


# What the recipes of published results are named by: a change here is a break with every one of them.
DIGESTS = {
    "awq-int3": "ab2b9d44dc023c09", "awq-int4": "fe15cb8b929072a4", "bnb-fp4": "8baa229ada314ab6",
    "bnb-int8": "969d69372952b86e", "bnb-nf4": "5279bfa049d704a3", "bnb-nf4-dq": "70fea53efbddcb0a",
    "gptq-int3": "1018a52c124e4f51", "gptq-int4": "4d2b54efa2caacfb", "gptq-int8": "b671e2407b419793",
    "none": "d94fa6921dc76d85", "rtn-int3": "eeb6b195cb7b1d86", "rtn-int4": "00e42aac776a8d3c",
    "rtn-int8": "192f9bc56f3a5088", "heal-nf4": "671f8bd9a63913b7", "distill-ko-text2sql": "d9e51b7eb49f47d3",
    "book/lora-rank": "a97bb7a961be86ee",
}  # fmt: skip


@pytest.mark.parametrize("stem", DIGESTS)
def test_digests_of_published_recipes_stay(stem: str) -> None:
    assert load_recipe(bundled_recipes()[stem]).digest() == DIGESTS[stem]


def test_the_book_has_four_tables() -> None:
    assert [path.stem for path in BOOK] == ["base-models", "cleaned", "data-fraction", "lora-rank"]


@pytest.mark.parametrize("path", BOOK, ids=name)
def test_a_table_of_the_book_is_a_grid_and_runs_small_as_its_comment_says(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, DistillRecipe)
    grid = cells(recipe, path.name)
    assert len(grid) > 1 and len({cell.label for cell in grid}) == len(grid)
    assert all(cell.recipe.data.holdout_db == 1 for cell in grid)
    assert {cell.recipe.tasks.text2sql.data for cell in grid} == {"hf:shangrilar/ko_text2sql/origin:test"}
    assert all(cell.recipe.tasks.text2sql.limit is None for cell in grid)  # all 112
    (command,) = named_commands(path)
    assert command[:3] == ["quantlab", "distill", f"recipes/book/{path.name}"]
    small = load_recipe(path, overrides(command))
    assert isinstance(small, DistillRecipe)
    small_grid = cells(small, path.name)
    assert len(small_grid) > 1
    for cell in small_grid:
        check_sources(cell.recipe)
        assert cell.recipe.student.model == "embedded:base" and cell.recipe.train.max_steps
        assert not cell.recipe.data.source.startswith("hf:")
        assert cell.recipe.tasks.text2sql.data == SMALL and cell.recipe.tasks.text2sql.dialect == "sqlite"


def test_the_small_forms_questions_are_a_file_like_the_books() -> None:
    """The book's columns, no database, and the bundled test questions in them."""
    path = find_source(SMALL.removeprefix("ko_text2sql:"))
    assert path.read_text(encoding="utf-8").partition("\n")[0] == "db_id,context,question,answer"
    found, bundled_test = load_items(SMALL), load_items("ko_text2sql:test")
    assert all(item.database is None and item.db_id == "1" for item in found)
    fields = [(item.context, item.question, item.answer) for item in found]
    assert fields == [(item.context, item.question, item.answer) for item in bundled_test]


def test_recipes_for_distillation() -> None:
    teacher, embedded, heal = (
        load_recipe(ROOT / f"{stem}.yaml") for stem in ("distill-ko-text2sql", "distill-embedded", "heal-nf4")
    )
    assert isinstance(teacher, DistillRecipe) and isinstance(embedded, DistillRecipe)
    assert isinstance(heal, DistillRecipe)
    assert teacher.teacher and teacher.judge and teacher.teacher.max_usd and teacher.judge.max_usd
    assert embedded.teacher is None and embedded.judge is None  # offline
    assert heal.train.logits and heal.train.logits.model == heal.student.model
    assert (heal.student.mode, heal.train.loss, heal.data.format) == ("qlora", "forward_kl", "text")
