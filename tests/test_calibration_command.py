"""`quantlab calibration` and the dry run say what a run would be calibrated on; recipes name mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantlab.commands.calibration import in_short, lines, preview, previews, run, wished
from quantlab.commands.planned_run import calibration_digest, text_digest
from quantlab.errors import DataError, RecipeError
from quantlab.models.safetensors.files import open_files
from quantlab.quant.pipeline import Job, calibration_rows
from quantlab.recipe.base import Calibration
from quantlab.recipe.load import parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from tests import command

GPTQ = "kind: quantize\nmethod: gptq\n"
SMALL = ("calibration.rows=4", "calibration.seq_len=64")


def parse(*overrides: str) -> QuantizeRecipe:
    recipe = parse_recipe(GPTQ, "r.yaml", overrides)
    assert isinstance(recipe, QuantizeRecipe)
    return recipe


def test_it_shows_the_rows_that_a_run_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    run("calib/ko-text2sql.jsonl", "embedded:base", SMALL, as_json=True)
    found = json.loads(capsys.readouterr().out)
    recipe = parse("calibration.source=calib/ko-text2sql.jsonl", *SMALL)
    rows, record = calibration_rows([Job("x", recipe, Path("x"))], open_files("embedded:base"), False)
    assert rows is not None and {key: found[key] for key in record} == record
    assert len(found["shown"]) == 3 and found["scripts"]["Hangul"] > 0 and found["lines_like"]["SQL"] > 0.1
    run("calib/ko-text2sql.jsonl", "embedded:base", SMALL, show=1)
    said = capsys.readouterr().out
    assert f"documents joined and cut into windows; digest {record['digest']}\n" in said
    assert said.startswith("4 rows of 64 tokens for embedded:base, seed 0, ")
    assert "400 text" in said and "special tokens: 0.00% of the tokens" in said and said.count("\nrow ") == 1


def test_from_the_command_line(tmp_path: Path) -> None:
    mixture = "calibration.source=[calib/general.jsonl, {source: calib/ko-text2sql.jsonl, weight: 3}]"
    words = [
        "--model",
        "embedded:base",
        *(word for one in (mixture, *SMALL) for word in ("--set", one)),
        "--json",
    ]
    found = json.loads(command.quantlab("calibration", "gptq-int4", *words, cwd=tmp_path).stdout)
    assert [(s["rows"], s["weight"]) for s in found["sources"]] == [(1, 1), (3, 3)]
    assert found["source"] == "calib/general.jsonl (1) + calib/ko-text2sql.jsonl (3)"


def test_what_is_no_recipe_with_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rtn-int4: nothing is calibrated") as caught:
        wished("rtn-int4")
    assert "gptq or awq" in caught.value.hint
    with pytest.raises(RecipeError, match="no such recipe"):
        wished("gptq-itn4.yaml")
    with pytest.raises(DataError, match="no such file: gptq-itn4"):
        run("gptq-itn4", "embedded:base")
    odd = tmp_path / "a: [b].jsonl"  # a name that is no plain YAML
    assert wished(str(odd), ["calibration.rows=3"]).calibration == Calibration(source=str(odd), rows=3)


def test_control_characters_stay_out_of_the_terminal(tmp_path: Path) -> None:
    source = tmp_path / "x.txt"
    source.write_text("\x1b[31mred \u202e" * 200)
    found = preview(Calibration(source=str(source), rows=1, seq_len=64), open_files("embedded:base"), show=1)
    said = "\n".join(lines(found))
    assert "\x1b" not in said and "\u202e" not in said and "\\x1b[31m" in said


def test_a_dry_run_says_each_calibration_once_and_asks_no_hub() -> None:
    recipes = [
        parse(*SMALL, "calibration.source=calib/ko-text2sql.jsonl"),
        parse(*SMALL, "calibration.source=calib/ko-text2sql.jsonl", "bits=8"),
        parse(*SMALL, "calibration.source=[calib/general.jsonl, 'hf:a/b']"),
        QuantizeRecipe(method="rtn"),
    ]
    (found,) = previews(recipes, open_files("embedded:base"))
    (said,) = in_short(found)
    assert said.startswith(
        "calibration: 4 rows of 64 tokens, calib/ko-text2sql.jsonl (400 documents); Latin "
    )


def test_what_is_left_out_is_said_while_a_run_goes_on(tmp_path: Path, tiny: Path) -> None:
    source = tmp_path / "t.jsonl"
    rows = [{"text": f"{n} some words of a text about {n}"} for n in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"text": "a"}]))
    words = (
        "--model",
        tiny,
        "--set",
        f"calibration.source={source}",
        "--no-eval",
        "--out",
        "q",
        "--no-verify",
    )
    small = ("--set", "calibration.rows=2", "--set", "calibration.seq_len=32")
    done = command.quantlab("quantize", "gptq-int4", *words, *small, cwd=tmp_path)
    assert f"{source}: left out 1 duplicate, 1 near-empty document" in done.stderr
    (record,) = json.loads((tmp_path / "q" / "quantlab.json").read_text())["calibration"]["sources"]
    assert (record["documents"], record["duplicates"], record["near_empty"]) == (42, 1, 1)


# Recipes


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5", "calibration.source: expected a string, found 5"),
        ("{source: a}", "calibration.source: expected a string, found {'source': 'a'}"),
        ("[]", "calibration.source: List should have at least 1 item"),
        ("[a, 3]", "calibration.source.1: expected a string, found 3"),
        ("[a, {source: b, wieght: 3}]", "calibration.source.1.wieght: unknown key; did you mean 'weight'?"),
        ("[a, {weight: 3}]", "calibration.source.1.source: missing"),
        ("[a, {source: b, weight: 0}]", "calibration.source.1.weight: expected greater than 0, found 0"),
        ("[a, {source: b, weight: .inf}]", "calibration.source.1.weight: expected a finite number"),
        ("[a, {source: b, weight: '3'}]", "calibration.source.1.weight: expected a number, found '3'"),
        ("[a, b, a]", "calibration.source: 'a' is named twice"),
        ("[a, {source: b, weight: 1000}]", "calibration.rows: 128 rows in these weights leave none for 'a'"),
    ],
)
def test_mistakes_in_a_mixture_are_named(value: str, message: str) -> None:
    assert message in refusal(f"calibration.source={value}")


def test_a_mistake_in_a_mixture_has_its_line() -> None:
    text = GPTQ + "calibration:\n  source:\n  - a\n  - source: b\n    wieght: 3\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:7: calibration\.source\.1\.wieght: unknown key"):
        parse_recipe(text, "r.yaml")


@pytest.mark.parametrize(
    ("weights", "rows", "shares"),
    [
        ([1, 1], 128, [64, 64]), ([3, 1], 10, [8, 2]), ([1, 1, 1], 128, [43, 43, 42]), ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([2, 3, 5], 7, [1, 2, 4]), ([1e-3, 1], 1001, [1, 1000]), ([5], 3, [3]),
    ],
)  # fmt: skip
def test_shares_are_rounded_by_largest_remainder(weights: list[float], rows: int, shares: list[int]) -> None:
    named: list[Any] = [{"source": str(n), "weight": weight} for n, weight in enumerate(weights)]
    assert Calibration(source=named, rows=rows).shares() == shares


def test_new_keys_change_no_digest_of_recipes_without_them() -> None:
    assert parse().decides() == {"kind": "quantize", "method": "gptq"}
    one = parse("calibration.source=mine.txt")
    assert one.digest() == parse("calibration.source=[mine.txt]").digest()
    assert one.digest() == parse("calibration.source=[{source: mine.txt, weight: 2}]").digest()
    assert one.digest() == parse("calibration.source=mine.txt", "calibration.pack=true").digest()
    assert one.decides()["calibration"] == {"source": "mine.txt"}
    mixed = parse("calibration.source=[a, {source: b, weight: 2}]", "calibration.pack=false")
    assert mixed.decides()["calibration"] == {"source": ["a", {"source": "b", "weight": 2.0}], "pack": False}
    assert (
        parse_recipe(mixed.to_yaml()).digest()
        == mixed.digest()
        != parse("calibration.source=[a, b]").digest()
    )


def test_the_content_of_every_source_decides_a_run(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"text": "one"}\n{"text": " "}\n')
    two.write_text('{"messages": [{"role": "user", "content": "two"}]}\n')
    assert calibration_digest(Calibration(source=str(one))) == text_digest(str(one))
    both = Calibration(source=[str(one), str(two)])
    before = calibration_digest(both)
    two.write_text('{"messages": [{"role": "system", "content": "two"}]}\n')
    assert calibration_digest(both) != before
