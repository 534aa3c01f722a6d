"""Sweeps: the grid, its order, its labels, and refusals that name axis, value and reason."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.distill.sweep import LABEL_LENGTH, LIMIT, cells, describe, spread
from quantlab.errors import RecipeError
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import parse_recipe

PLAIN = "kind: distill\nstudent: {model: embedded:base}\n"


def parse(text: str, *overrides: str) -> DistillRecipe:
    recipe = parse_recipe(text, "s.yaml", overrides)
    assert isinstance(recipe, DistillRecipe)
    return recipe


def sweep(text: str, base: str = PLAIN) -> DistillRecipe:
    return parse(f"{base}sweep: {text}\n")


def refusal(text: str, base: str = PLAIN) -> str:
    with pytest.raises(RecipeError) as caught:
        cells(sweep(text, base), "s.yaml")
    assert caught.value.exit_code == 2
    return f"{caught.value}\n{caught.value.hint}"


def test_grid_in_order_with_the_last_axis_fastest() -> None:
    recipe = sweep("{student.lora.r: [64, 16], data.fraction: [0.2, 1]}")
    grid = cells(recipe)
    assert [cell.label for cell in grid] == [
        "r-64_fraction-0.2", "r-64_fraction-1", "r-16_fraction-0.2", "r-16_fraction-1",
    ]  # fmt: skip
    assert grid[0].point == grid[0].overrides == {"student.lora.r": 64, "data.fraction": 0.2}
    assert [(c.recipe.student.lora.r, c.recipe.data.fraction) for c in grid] == [
        (64, 0.2), (64, 1.0), (16, 0.2), (16, 1.0),
    ]  # fmt: skip
    assert all(cell.recipe.sweep == {} for cell in grid)
    assert cells(recipe) == grid  # the same again


def test_a_cell_is_the_recipe_that_set_would_make() -> None:
    base = PLAIN + "data: {fraction: 0.5, holdout_db: 1}\ntrain: {lr: 1e-3}\n"
    (cell, _) = cells(sweep("{student.lora.r: [8, 9]}", base))
    assert cell.recipe.digest() == parse(base, "student.lora.r=8").digest()
    assert cell.recipe.data.fraction == 0.5 and cell.recipe.data.holdout_db == 1
    assert parse(cell.recipe.to_yaml()).digest() == cell.recipe.digest()


def test_without_a_sweep_there_is_one_cell() -> None:
    (cell,) = cells(parse(PLAIN))
    assert cell.recipe == parse(PLAIN) and dict(cell.overrides) == {} and describe(cell.point) == "no values"


def test_grouped_keys_change_together() -> None:
    grid = cells(sweep('{"student.lora.r, student.lora.alpha": [[16, 32], [64, 128]], train.seed: [0, 1]}'))
    assert [(c.recipe.student.lora.r, c.recipe.student.lora.alpha, c.recipe.train.seed) for c in grid] == [
        (16, 32, 0), (16, 32, 1), (64, 128, 0), (64, 128, 1),
    ]  # fmt: skip
    assert grid[0].label == "r-16_alpha-32_seed-0"
    assert grid[0].overrides == {"student.lora.r": 16, "student.lora.alpha": 32, "train.seed": 0}
    assert grid[0].point["student.lora.r, student.lora.alpha"] == [16, 32]
    assert spread(grid[0].point) == grid[0].overrides


def test_lists_mappings_and_null_as_values() -> None:
    grid = cells(sweep("{data.filters: [[], [parses, binds]], data.holdout_db: [null, 1, game]}"))
    assert [cell.label for cell in grid[:4]] == [
        "filters-none_holdout_db-none", "filters-none_holdout_db-1", "filters-none_holdout_db-game",
        "filters-parses-binds_holdout_db-none",
    ]  # fmt: skip
    assert grid[3].recipe.data.filters == ["parses", "binds"]
    (one, two) = cells(sweep("{student.lora: [{r: 8, alpha: 8}, {r: 9, rslora: true}]}"))
    assert (one.label, two.label) == ("lora-r-8-alpha-8", "lora-r-9-rslora-true")
    assert two.recipe.student.lora.rslora and two.recipe.student.lora.alpha == 32


def test_a_mapping_that_the_recipe_leaves_out_can_be_swept_into() -> None:
    base = PLAIN + "train: {loss: forward_kl, logits: {model: m}}\n"
    assert [c.recipe.train.logits.top_k for c in cells(sweep("{train.logits.top_k: [8, 9]}", base))  # type: ignore[union-attr]
            ] == [8, 9]  # fmt: skip
    assert "train.logits.model: missing" in refusal("{train.logits.top_k: [8]}")
    (cell, _) = cells(sweep('{"train.loss,train.logits": [[sft, null], [jsd, {model: m}]]}'))
    assert cell.recipe.train.logits is None


def test_defaults_that_follow_from_another_key_are_made_anew() -> None:
    teacher = PLAIN + "teacher: {model: gpt-4o}\n"
    (api, local) = cells(sweep('{teacher.model: [gpt-4o-mini, "file:answers.jsonl"]}', teacher))
    assert api.recipe.teacher and local.recipe.teacher
    assert api.recipe.teacher.endpoint and local.recipe.teacher.endpoint is None
    assert local.label == "model-file-answers.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{student.lora.r: [16, 0]}", "s.yaml: sweep.student.lora.r = 0: student.lora.r: expected greater"),
        ("{student.lora.r: [sixteen]}", "sweep.student.lora.r = sixteen: student.lora.r: expected a integer"),
        ("{student.lora.rank: [16]}", "sweep.student.lora.rank = 16: student.lora.rank: unknown key"),
        ("{student.lora.alfa: [16]}", "student.lora.alfa: unknown key; did you mean 'alpha'?"),
        ("{student.mode: [lora, qlorra]}", "sweep.student.mode = qlorra: student.mode: 'qlorra' is not one of"),
        ("{student.mode: [qlorra]}", "did you mean qlora?"),
        ("{student.lora.r.x: [1]}", "sweep.student.lora.r.x = 1: student.lora.r: expected a integer"),
        ("{student.model.x: [1]}", "sweep.student.model.x = 1: student.model is a value, it has no keys"),
        ("{student.lora: [{r: 0}]}", "sweep.student.lora = {r: 0}: student.lora.r: expected greater"),
        ("{evaluate: [[text2sgl]]}", "sweep.evaluate = [text2sgl]: evaluate: unknown task 'text2sgl'; did you mean"),
        ("{train.loss: [sft, jsd], train.seed: [3]}",
         "sweep with train.loss = jsd, train.seed = 3: train.logits: loss jsd needs"),
        ("{data.filters: [[judge]]}", "sweep.data.filters = [judge]: data.filters: the rule `judge` needs"),
        ('{"student.lora.r,student.lora.alpha": [[16, 32], [64]]}', "lists of 2 values, one a key, found [64]"),
        ('{"student.lora.r,student.lora.alpha": [16]}', "expected lists of 2 values, one a key, found 16"),
        ('{"student.lora.r,kind": [[16, distill]]}', "kind is not a key that can be swept"),
        ('{"student.lora.r,": [[16, 1]]}', "expected a dotted key, as in student.lora.r"),
        ("{student..r: [16]}", "expected a dotted key"),
        ('{student.lora.r: [1], "train.seed,student.lora.r": [[1, 2]]}', "student.lora.r is set by student.lora.r"),
        ("{student.lora: [{r: 1}], student.lora.r: [2]}", "student.lora.r is set by student.lora already"),
        ("{data.fraction: [1, 0.5, 1.0]}", "two cells are the same recipe: data.fraction = 1, and data.fraction = 1.0"),
        ("{student.lora.r: [4, 4]}", "take out the value that is there twice"),
    ],
)  # fmt: skip
def test_refused_with_axis_value_and_reason(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_too_many_cells_are_refused_before_any_is_built() -> None:
    many = ", ".join(map(str, range(1, 41)))
    said = refusal(f"{{student.lora.r: [{many}], student.lora.alpha: [{many}]}}")
    assert f"40 × 40 = 1600 cells, at most {LIMIT}" in said and "group keys" in said


def test_labels_tell_values_apart_and_stay_short() -> None:
    grid = cells(sweep('{"student.model": [a/tiny, b/tiny, A/TINY, ' + "x" * 90 + "]}"))
    labels = [cell.label for cell in grid]
    assert all(re.fullmatch(r"model-tiny-[0-9a-f]{6}", label, re.IGNORECASE) for label in labels[:3])
    assert len({label.casefold() for label in labels}) == 4 and len(labels[3]) < 60
    # One alone needs no hash, and a value's label does not depend on where it stands.
    assert cells(sweep("{student.model: [a/tiny, c/other]}"))[0].label == "model-tiny"
    assert {c.label for c in cells(sweep('{"student.model": [b/tiny, a/tiny]}'))} == set(labels[:2])
    base = PLAIN + "train: {loss: jsd, logits: {model: m}}\n"
    both = cells(sweep("{student.model: [a], train.logits.model: [b]}", base))
    assert both[0].label == "student.model-a_logits.model-b"


values = st.lists(
    st.integers(-5, 5) | st.text(max_size=8) | st.floats(allow_nan=False), min_size=1, max_size=4
)


@given(
    st.dictionaries(st.sampled_from(["train.seed", "data.holdout_db", "student.model", "train.lr"]), values)
)
def test_any_grid_has_labels_fit_for_directories_or_is_refused(axes: dict[str, list[object]]) -> None:
    try:
        grid = cells(parse(PLAIN).model_copy(update={"sweep": axes}))
    except RecipeError as error:
        assert "sweep" in str(error)
        return
    labels = [cell.label for cell in grid]
    assert len({label.casefold() for label in labels}) == len(labels)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]*", label) and len(label) <= LABEL_LENGTH for label in labels)
