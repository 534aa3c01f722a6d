"""Recipes: what is accepted, what is refused, and that a refusal says file, line, key and nearest name."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.recipe.load import find_recipe, json_schema, load_recipe, parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe, usable

AWQ = "kind: quantize\nmethod: awq\n"
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
        (GPTQ + "bits: 5\n", "for 5 bits set format: gguf"),
        (GPTQ + "bits: 16\n", "r.yaml:3: bits: gptq stores 2, 3, 4 or 8 bits"),
        (GPTQ + "symmetric: 1\n", "r.yaml:3: symmetric: expected a boolean, found 1"),
        (GPTQ + "group_size: 24\n", "r.yaml:3: group_size: expected auto, 16, 32, 64, 128, or -1"),
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
        ("kind: quantize\nmethod: rtn\ndamp: 0.1\n", "r.yaml:3: damp: not an option of rtn (only of gptq)"),
        ("kind: quantize\nmethod: none\nbits: 4\n", "r.yaml:3: bits: method none stores the model as it is"),
        ("kind: quantize\nmethod: bnb-nf4\nbits: 8\n", "r.yaml:3: bits: bnb-nf4 always has bits: 4"),
        (AWQ + "bits: 3\nformat: awq\n", "the awq format holds 4 bits only, not 3; for 3 bits set format"),
        (GPTQ + "format: awq\nact_order: true\n", "the awq format cannot store a column order; set format: gptq"),
        (GPTQ + "format: bitsandbytes\n", "gptq is written as gptq or awq or compressed-tensors"),
        (GPTQ + "bits: atuo\n", "r.yaml:3: bits: 'atuo' is not one of 2, 3, 4, 5, 6, 8, 16"),
        (GPTQ + "bits: auto\n", "target_bits: missing; bits: auto needs an average width between 2 and 8"),
        (GPTQ + "target_bits: 3.5\n", "r.yaml:3: target_bits: goes with bits: auto, not with bits: 4"),
        (GPTQ + "bits: auto\ntarget_bits: 1.9\n", "r.yaml:4: target_bits: expected greater than or equal to 2"),
        (GPTQ + "bits: auto\ntarget_bits: .nan\n", "r.yaml:4: target_bits: expected"),
        (GPTQ + "bits: auto\ntarget_bits: '3.5'\n", "r.yaml:4: target_bits: expected a number, found '3.5'"),
        (GPTQ + "bits: auto\ntarget_bits: 3\nformat: gptq\n",
         "r.yaml:5: format: the gptq format is read with one width for all layers; for bits: auto set format: c"),
        ("kind: quantize\nmethod: rtn\nbits: auto\n", "r.yaml:3: bits: auto weighs the layers on calibration data"),
        ("kind: quantize\nmethod: rtn\ntarget_bits: 3\n", "not an option of rtn (only of gptq, awq, imatrix)"),
        ("kind: quantize\nmethod: bnb-nf4\nbits: auto\n", "r.yaml:3: bits: bnb-nf4 always has bits: 4"),
        ("kind: quantize\nmethod: fp8\nbits: 4\n", "r.yaml:3: bits: fp8 always has bits: 8; leave the key out"),
        ("kind: quantize\nmethod: fp8\nformat: gptq\n", "fp8 always has format: compressed-tensors"),
        ("kind: quantize\nmethod: fp8\ncalibration: {rows: 4}\n", "not an option of fp8 (only of gptq, awq, imatrix)"),
        (GPTQ + "static_groups: true\n", "r.yaml:3: static_groups: goes with act_order: true"),
        (GPTQ + "act_order: group\nstatic_groups: true\n", "r.yaml:4: static_groups: goes with act_order: true"),
        ("kind: quantize\nmethod: awq\nstatic_groups: true\n", "not an option of awq (only of gptq)"),
        (GPTQ + "act_order: true\nformat: compressed-tensors\n",
         "r.yaml:3: act_order: the compressed-tensors format cannot store a column order; set format: gptq, or s"),
        (GPTQ + "bits: auto\ntarget_bits: 3\nact_order: true\n",
         "r.yaml:5: act_order: the compressed-tensors format cannot store a column order; set static_groups: true"),
        (GPTQ + "symmetric: false\nformat: compressed-tensors\n",
         "r.yaml:3: symmetric: the compressed-tensors format is read with symmetric grids only"),
        (GPTQ + "format: compressed-tensor\n", "did you mean compressed-tensors?"),
        (GPTQ + "tasks: {kv_cache: {bits: 3}}\n", "tasks.kv_cache.bits: 3 is not one of 2, 4 or 8"),
        (GPTQ + "tasks: {kv_cache: {group_size: 64}}\n", "tasks.kv_cache.bits: missing"),
        (GPTQ + "tasks: {kv_cache: {bits: 4, residul: 64}}\n", "residul: unknown key; did you mean 'residual'?"),
        (GPTQ + "tasks: {kv_cache: {bits: 4, residual: 100}}\n",
         "tasks.kv_cache.residual: 100 tokens are not whole groups of 64; nearest: 128"),
        (GPTQ + "tasks: {kv_cache: {bits: 4}}\nevaluate: [speed, 'lm-eval:x']\n", "run without tasks.kv_cache"),
    ],
)  # fmt: skip
def test_refused_with_place_and_reason(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_every_mistake_is_named_at_once() -> None:
    said = refusal(GPTQ + "bits: 7\ncalibration: {rows: 0, sorce: x}\n")
    assert all(key in said for key in ("bits:", "calibration.rows:", "calibration.sorce:"))


def test_defaults_follow_the_method() -> None:
    assert parse(GPTQ).format == "gptq" and parse(GPTQ).symmetric
    awq = parse("kind: quantize\nmethod: awq\n")
    assert awq.format == "awq" and not awq.symmetric
    nf4 = parse("kind: quantize\nmethod: bnb-nf4\nbits: 4\n")  # a fixed value may be repeated
    assert (nf4.bits, nf4.group_size, nf4.format) == (4, 64, "bitsandbytes")
    assert parse("kind: quantize\nmethod: bnb-int8\n").bits == 8
    assert parse("kind: quantize\nmethod: awq\nbits: 3\nformat: gptq\n").bits == 3
    fp8 = parse("kind: quantize\nmethod: fp8\n")
    assert (fp8.bits, fp8.group_size, fp8.format) == (
        8,
        -1,
        "compressed-tensors",
    ) and not fp8.needs_calibration
    assert parse("kind: quantize\nmethod: awq\nformat: compressed-tensors\n").symmetric


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_bits_auto(method: str) -> None:
    found = parse(f"kind: quantize\nmethod: {method}\nbits: auto\ntarget_bits: 3\n")
    assert (found.format, found.symmetric, found.widths) == ("compressed-tensors", True, (2, 3, 4, 8))
    assert found.target_bits == found.average_bits == 3.0
    assert (
        found.digest()
        == parse(found.to_yaml()).digest()
        == parse(found.to_yaml(), "target_bits=3.0").digest()
    )
    assert found.digest() != parse(found.to_yaml(), "target_bits=3.5").digest()
    plain = parse(GPTQ, "bits=auto", "target_bits=2.5")
    assert plain.average_bits == 2.5
    assert (parse(GPTQ).widths, parse(GPTQ).average_bits) == ((4,), 4.0)


def test_static_groups_need_no_column_order() -> None:
    for layout in ("gptq", "awq", "compressed-tensors"):
        found = parse(GPTQ + f"act_order: true\nstatic_groups: true\nformat: {layout}\n")
        assert found.static_groups and found.content()["static_groups"]
    assert "target_bits" not in parse(GPTQ).content()


def test_a_digest_holds_the_differences_from_the_defaults() -> None:
    """So a key that is added later leaves the digests of recipes without it as they are."""
    plain = parse(GPTQ)
    assert plain.decides() == {"kind": "quantize", "method": "gptq"}
    assert (
        parse(GPTQ, "damp=0.01", "calibration.rows=128", "tasks.speed.repeats=5").digest() == plain.digest()
    )
    changed = parse(GPTQ, "damp=0.05", "calibration.rows=64", "tasks.speed.repeats=3")
    assert changed.decides() == plain.decides() | {
        "damp": 0.05,
        "calibration": {"rows": 64},
        "tasks": {"speed": {"repeats": 3}},
    }

    class Later(type(plain)):  # type: ignore[misc]
        new_key: int = 7

    assert Later(method="gptq").digest() == plain.digest() != Later(method="gptq", new_key=8).digest()


# Every default of today. Changing one makes other results under the same digest: raise DEFAULTS, then note it here.
def test_defaults_change_only_with_their_number() -> None:
    from quantlab.recipe.base import DEFAULTS

    found = json.dumps({name: json.loads(parse(f"kind: quantize\nmethod: {name}\n").model_dump_json())
                        for name in ("rtn", "gptq", "awq", "bnb-nf4", "fp8", "none")}, sort_keys=True)  # fmt: skip
    assert (DEFAULTS, hashlib.sha256(found.encode()).hexdigest()[:16]) == (1, "fc92f1a1d55b5fbc")


def test_a_quantized_cache_reaches_the_tasks() -> None:
    plain, cached = parse(GPTQ), parse(GPTQ, "tasks.kv_cache.bits=4")
    assert plain.digest() == parse(GPTQ, "tasks.kv_cache=null").digest()
    assert cached.content()["tasks"]["kv_cache"] == {"bits": 4, "group_size": 64, "residual": 128}
    assert parse(cached.to_yaml()).digest() == cached.digest() != plain.digest()
    for task in ("perplexity", "text2sql", "fidelity", "speed"):
        options = cached.tasks.of(task)
        assert options.kv_cache == cached.tasks.kv_cache and plain.tasks.of(task).kv_cache is None  # type: ignore[attr-defined]
        # measured otherwise, so neither serves as the other's baseline
        assert options != plain.tasks.of(task)
        assert options.model_dump() == plain.tasks.of(task).model_dump()


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
    assert usable("target_bits=3", "awq") and not usable("target_bits=3", "fp8")
    assert usable("static_groups=true", "gptq") and not usable("static_groups=true", "awq")
    assert usable("tasks.kv_cache.bits=4", "fp8") and not usable("group_size=64", "fp8")


def test_digest_names_the_content_and_nothing_else() -> None:
    assert parse(GPTQ).digest() == parse("# a comment\nmethod: gptq\nbits: 4\nkind: quantize\n").digest()
    assert parse(GPTQ).digest() != parse(GPTQ + "bits: 3\n").digest()
    assert len(parse(GPTQ).digest()) == 16


methods = st.sampled_from(["none", "rtn", "bnb-int8", "bnb-fp4", "bnb-nf4", "gptq", "awq", "fp8"])


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
    schema = json_schema()["$defs"]
    assert {"QuantizeRecipe", "EvaluateRecipe", "KvCacheOptions"} <= schema.keys()
    assert schema["QuantizeRecipe"]["properties"]["bits"]["enum"] == [2, 3, 4, 5, 6, 8, 16, "auto"]
    assert "kv_cache" in schema["TaskOptions"]["properties"]
    assert "kv_cache" not in str(schema["SpeedOptions"])


def test_aliases_of_aliases_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        parse(bomb)
    assert parse("kind: quantize\nmethod: &same rtn\nignore: [*same]\n").ignore == ["rtn"]


def test_a_key_of_two_methods_has_the_default_of_each() -> None:
    gptq, awq = parse("kind: quantize\nmethod: gptq\n"), parse("kind: quantize\nmethod: awq\n")
    assert not gptq.clip_search and awq.clip_search
    for recipe, value in ((gptq, "true"), (awq, "false")):
        plain, other = f"kind: quantize\nmethod: {recipe.method}\n", f"clip_search: {value}\n"
        same = f"clip_search: {str(value != 'true').lower()}\n"
        assert parse(plain + same).digest() == recipe.digest() != parse(plain + other).digest()
        assert "clip_search" not in recipe.decides() and "clip_search" in parse(plain + other).decides()
        assert parse(parse(plain + other).to_yaml()).digest() == parse(plain + other).digest()
