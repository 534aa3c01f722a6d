"""Recipes: what is accepted, what is refused, and that a refusal says file, line, key and nearest name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.recipe import QuantizeRecipe, find_recipe, json_schema, load_recipe, parse_recipe, usable

GPTQ = "kind: quantize\nmethod: gptq\n"


def parse(text: str, *overrides: str) -> QuantizeRecipe:
    recipe = parse_recipe(text, "r.yaml", overrides)
    assert isinstance(recipe, QuantizeRecipe)
    return recipe


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    assert caught.value.exit_code == 2
    return f"{caught.value}\n{caught.value.hint}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GPTQ + "group_sise: 128\n", "r.yaml:3: group_sise: unknown key; did you mean 'group_size'?"),
        (GPTQ + "calibration:\n  rows: 4\n  sorce: x\n", "r.yaml:5: calibration.sorce: unknown key"),
        (GPTQ + "zzz: 1\n", "keys here: "),
        ("kind: quantize\nmethod: gtpq\n", "r.yaml:2: method: 'gtpq' is not one of"),
        ("kind: quantize\nmethod: gtpq\n", "did you mean gptq?"),
        ("kind: quantise\nmethod: gptq\n", "r.yaml:1: kind: unknown kind 'quantise'; did you mean 'quantize'?"),
        ("method: gptq\n", "kind: missing"),
        ("kind: quantize\n", "method: missing"),
        (GPTQ + "bits: '4'\n", "r.yaml:3: bits: '4' is not one of"),
        (GPTQ + "bits: 5\n", "r.yaml:3: bits: 5 is not one of"),
        (GPTQ + "bits: 16\n", "r.yaml:3: bits: gptq stores 2, 3, 4 or 8 bits"),
        (GPTQ + "symmetric: 1\n", "r.yaml:3: symmetric: expected a boolean, found 1"),
        (GPTQ + "group_size: 24\n", "r.yaml:3: group_size: expected 16, 32, 64, 128, or -1"),
        (GPTQ + "damp: 0\n", "r.yaml:3: damp: expected greater than 0"),
        (GPTQ + "calibration: {rows: 0}\n", "calibration.rows: expected greater than or equal to 1, found 0"),
        (GPTQ + "evaluate: [perplexty]\n", "r.yaml:3: evaluate: unknown task 'perplexty'; did you mean 'perplexity'?"),
        (GPTQ + "evaluate: [speed, speed]\n", "a task is named twice"),
        (GPTQ + "evaluate: ['lm-eval:']\n", "unknown task"),
        (GPTQ + "bits: 4\nbits: 3\n", "r.yaml:4: bits: key given twice (first on line 3)"),
        (GPTQ + "bits: [4\n", "r.yaml:4: not YAML"),
        (GPTQ + "x: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("- gptq\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("? [a]\n: b\n", "expected a word as key"),
        ("kind: quantize\nmethod: rtn\ndamp: 0.1\n", "r.yaml:3: damp: method rtn has no use for it (only gptq)"),
        ("kind: quantize\nmethod: none\nbits: 4\n", "r.yaml:3: bits: method none stores the model as it is"),
        ("kind: quantize\nmethod: bnb-nf4\nbits: 8\n", "r.yaml:3: bits: bnb-nf4 always has bits: 4"),
        ("kind: quantize\nmethod: awq\nbits: 3\n", "the awq layout holds 4 bits only, not 3; for 3 bits set format"),
        (GPTQ + "format: awq\nact_order: true\n", "the awq layout cannot store a column order; set format: gptq"),
        (GPTQ + "format: bitsandbytes\n", "gptq is written as gptq or awq"),
    ],
)  # fmt: skip
def test_refused_with_place_and_reason(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_every_mistake_is_named_at_once() -> None:
    said = refusal(GPTQ + "bits: 5\ncalibration: {rows: 0, sorce: x}\n")
    assert all(key in said for key in ("bits:", "calibration.rows:", "calibration.sorce:"))


def test_defaults_follow_the_method() -> None:
    assert parse(GPTQ).format == "gptq" and parse(GPTQ).symmetric
    awq = parse("kind: quantize\nmethod: awq\n")
    assert awq.format == "awq" and not awq.symmetric
    nf4 = parse("kind: quantize\nmethod: bnb-nf4\nbits: 4\n")  # a fixed value may be repeated
    assert (nf4.bits, nf4.group_size, nf4.format) == (4, 64, "bitsandbytes")
    assert parse("kind: quantize\nmethod: bnb-int8\n").bits == 8
    assert parse("kind: quantize\nmethod: awq\nbits: 3\nformat: gptq\n").bits == 3


def test_overrides() -> None:
    recipe = parse(GPTQ, "calibration.rows=7", "damp=1e-4", "tasks.text2sql.limit=5", "evaluate=[speed]")
    assert (recipe.calibration.rows, recipe.damp) == (7, 1e-4)
    assert recipe.tasks.text2sql.limit == 5 and recipe.evaluate == ["speed"]
    assert "--set tasks.text2sql.limit=0: tasks.text2sql.limit: expected" in refusal(
        GPTQ, "tasks.text2sql.limit=0"
    )
    assert "--set bitz=3: bitz: unknown key; did you mean 'bits'?" in refusal(GPTQ, "bitz=3")
    assert "method is a value, it has no keys" in refusal(GPTQ, "method.x=3")
    assert "expected key=value" in refusal(GPTQ, "bits")
    assert "expected key=value" in refusal(GPTQ, "=3")
    assert "not YAML" in refusal(GPTQ, "bits=[")


def test_usable_leaves_keys_to_the_methods_that_have_them() -> None:
    assert usable("calibration.rows=4", "gptq") and not usable("calibration.rows=4", "rtn")
    assert not usable("bits=3", "none") and usable("tasks.speed.repeats=1", "none")
    assert usable("no_such_key=1", "rtn")  # the schema says what is wrong with it


def test_digest_names_the_content_and_nothing_else() -> None:
    assert parse(GPTQ).digest() == parse("# a comment\nmethod: gptq\nbits: 4\nkind: quantize\n").digest()
    assert parse(GPTQ).digest() != parse(GPTQ + "bits: 3\n").digest()
    assert len(parse(GPTQ).digest()) == 16


methods = st.sampled_from(["none", "rtn", "bnb-int8", "bnb-fp4", "bnb-nf4", "gptq", "awq"])


@given(methods, st.sampled_from(["float32", "auto"]), st.integers(1, 1000))
def test_yaml_of_a_recipe_loads_to_the_same_digest(method: str, dtype: str, limit: int) -> None:
    recipe = parse(f"kind: quantize\nmethod: {method}\ndtype: {dtype}\n", f"tasks.text2sql.limit={limit}")
    assert parse(recipe.to_yaml()).digest() == recipe.digest()


@given(st.text(max_size=40))
def test_any_text_is_a_recipe_or_a_refusal(text: str) -> None:
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert str(error)


def test_find_recipe(tmp_path: Path) -> None:
    assert find_recipe("gptq-int4").name == "gptq-int4.yaml"
    own = tmp_path / "mine.yaml"
    own.write_text(GPTQ, encoding="utf-8")
    assert load_recipe(find_recipe(str(own))) == parse(GPTQ)
    with pytest.raises(RecipeError) as caught:
        find_recipe("recipes/gtpq-int4.yaml")
    assert "did you mean gptq-int4?" in caught.value.hint


def test_unreadable_recipe(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00kind")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(binary)


def test_json_schema_covers_both_kinds() -> None:
    assert {"QuantizeRecipe", "EvaluateRecipe"} <= json_schema()["$defs"].keys()
