"""Every YAML under recipes/ is a valid recipe, is headed by its command, and names files that exist."""

import shlex
from pathlib import Path

import pytest

from quantlab.commands.recipes import about
from quantlab.paths import bundled, find_source
from quantlab.recipe import QuantizeRecipe, bundled_recipes, load_recipe

FILES = sorted(bundled("recipes").rglob("*.y*ml"))
METHODS = {"none", "rtn", "bnb-int8", "bnb-fp4", "bnb-nf4", "gptq", "awq"}


def test_every_file_is_found_by_name() -> None:
    assert sorted(bundled_recipes().values()) == FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_names_existing_sources(path: Path) -> None:
    recipe = load_recipe(path)
    for task in ("perplexity", "fidelity"):
        assert find_source(getattr(recipe.tasks, task).source).is_file()
    if isinstance(recipe, QuantizeRecipe) and recipe.needs_calibration:
        assert find_source(recipe.calibration.source).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_headed_by_its_command_and_what_to_expect(path: Path) -> None:
    first, second, third = path.read_text(encoding="utf-8").splitlines()[:3]
    words = shlex.split(first.removeprefix("# "))
    assert (
        words[:2] == ["quantlab", "quantize"] and words[2] == f"recipes/{path.name}" and words[3] == "--model"
    )
    assert second.startswith("# ") and about(path) == second[2:]
    assert third.startswith("# Expect")


def test_every_method_has_a_recipe() -> None:
    recipes = [load_recipe(path) for path in FILES]
    assert {recipe.method for recipe in recipes if isinstance(recipe, QuantizeRecipe)} == METHODS
    assert any(isinstance(recipe, QuantizeRecipe) and recipe.double_quant for recipe in recipes)
