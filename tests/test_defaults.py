"""What a recipe leaves open is settled by the model; what it says stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantlab.calibration import read_texts
from quantlab.commands.defaults import note_texts, settle
from quantlab.commands.planned_run import check_lengths
from quantlab.errors import RecipeError
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.paths import bundled_sources
from quantlab.recipe.load import EvaluateRecipe, Recipe, bundled_recipes, load_recipe, parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from tests.conftest import write_mixture

KOREAN = ("calib/ko-text2sql.jsonl", "heldout.txt")
GENERAL = ("calib/general.jsonl", "general.txt")


def files_with(tiny: Path, folder: Path, **config: Any) -> ModelFiles:
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in (content | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return open_files(folder)


def sources(recipe: Recipe) -> set[str]:
    assert isinstance(recipe, QuantizeRecipe | EvaluateRecipe)
    found = {recipe.tasks.perplexity.source, recipe.tasks.fidelity.source}
    return found | ({recipe.calibration.source} if isinstance(recipe, QuantizeRecipe) else set())


@pytest.mark.parametrize(
    "name", sorted(n for n in bundled_recipes() if not n.startswith(("book", "heal", "distill")))
)
def test_no_bundled_recipe_puts_korean_ddl_into_a_strangers_model(tiny: Path, name: str) -> None:
    recipe = load_recipe(bundled_recipes()[name])
    assert sources(settle(recipe, open_files(tiny))) <= set(GENERAL)
    settled = settle(recipe, open_files("embedded:base"))
    used = {settled.tasks.perplexity.source}
    if isinstance(settled, QuantizeRecipe) and settled.needs_calibration:
        used.add(settled.calibration.source)
    assert used <= set(KOREAN)


def test_what_is_made_from_the_embedded_model_counts_as_embedded(tiny: Path, tmp_path: Path) -> None:
    parent, child, other = tmp_path / "student", tmp_path / "gptq", tmp_path / "other"
    for folder, origin in ((parent, "embedded:base"), (child, str(parent)), (other, str(tiny))):
        shutil.copytree(tiny, folder)
        (folder / "quantlab.json").write_text(json.dumps({"parent": origin}))
    recipe = EvaluateRecipe(evaluate=["perplexity"])
    for folder in (parent, child):
        assert settle(recipe, open_files(folder)).tasks.perplexity.source == "heldout.txt"
    assert settle(recipe, open_files(other)).tasks.perplexity.source == "general.txt"
    # its own parent: no endless chain
    (other / "quantlab.json").write_text(json.dumps({"parent": str(other)}))
    assert settle(recipe, open_files(other)).tasks.perplexity.source == "general.txt"


def test_a_key_that_was_written_stays(tiny: Path) -> None:
    text = "kind: quantize\nmethod: gptq\ncalibration: {source: mine.txt}\ntasks: {fidelity: {source: yours.txt}}\n"
    for files in (open_files(tiny), open_files("embedded:base")):
        settled = settle(parse_recipe(text), files)
        assert isinstance(settled, QuantizeRecipe)
        assert settled.calibration.source == "mine.txt" and settled.tasks.fidelity.source == "yours.txt"
    assert settled.tasks.perplexity.source == "heldout.txt"


def test_settling_twice_changes_nothing(tiny: Path) -> None:
    for path in bundled_recipes().values():
        recipe = load_recipe(path)
        for files in (open_files(tiny), open_files("embedded:base")):
            once = settle(recipe, files)
            assert settle(once, files).digest() == once.digest()
            assert parse_recipe(once.to_yaml()).digest() == once.digest()


@pytest.mark.parametrize("positions", [8, 32, 64, 159, 160, 511, 512, 4096])
@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_windows_follow_the_positions(tiny: Path, tmp_path: Path, positions: int, key: str) -> None:
    files = files_with(tiny, tmp_path / "m", **{"max_position_embeddings": None, key: positions})
    settled = settle(QuantizeRecipe(method="gptq"), files)
    assert settled.calibration.seq_len == settled.tasks.perplexity.seq_len == min(512, positions)
    assert settled.tasks.fidelity.seq_len == min(512, positions)
    speed = settled.tasks.speed
    assert speed.prompt_tokens + speed.new_tokens == min(160, positions) or positions >= 160
    check_lengths(settled, files)


def test_lengths_that_were_written_are_refused_only_where_they_are_used(tiny: Path, tmp_path: Path) -> None:
    files = files_with(tiny, tmp_path / "m", max_position_embeddings=64)
    text = "kind: quantize\nmethod: gptq\ntasks: {perplexity: {seq_len: 100}, fidelity: {seq_len: 200}}\n"
    recipe = settle(parse_recipe(text), files)
    check_lengths(recipe, files, measured=False)
    with pytest.raises(RecipeError, match="tasks.perplexity.seq_len 100, tasks.fidelity.seq_len 200"):
        check_lengths(recipe, files)
    long = settle(parse_recipe("kind: quantize\nmethod: gptq\ncalibration: {seq_len: 100}\n"), files)
    with pytest.raises(RecipeError, match="calibration.seq_len 100"):
        check_lengths(long, files, measured=False)
    answers = settle(
        parse_recipe("kind: evaluate\nevaluate: [speed]\ntasks: {speed: {new_tokens: 60}}\n"), files
    )
    assert isinstance(answers, EvaluateRecipe) and answers.tasks.speed.prompt_tokens == 4


def test_the_note_names_the_texts_and_how_to_use_ones_own(tiny: Path) -> None:
    gptq, rtn = QuantizeRecipe(method="gptq"), QuantizeRecipe(method="rtn")
    note = note_texts([gptq, rtn], open_files(tiny))
    assert "calib/general.jsonl for calibration" in note and "general.txt for perplexity, fidelity" in note
    assert "--set calibration.source=FILE" in note and note.count("tasks.perplexity.source") == 1
    assert "Korean Text2SQL" in note_texts([gptq], open_files("embedded:base"))
    assert note_texts([rtn], open_files(tiny), measured=False) == ""
    named = parse_recipe(
        "kind: evaluate\nevaluate: [perplexity]\ntasks: {perplexity: {source: general.txt}}\n"
    )
    assert note_texts([named], open_files(tiny)) == ""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_files(write_mixture(tmp_path_factory.mktemp("models") / "mixtral"))


@pytest.mark.parametrize(
    ("text", "format", "static"),
    [
        ("method: gptq\nact_order: true", "compressed-tensors", True),
        ("method: gptq\nact_order: group", "compressed-tensors", False),
        ("method: gptq", "compressed-tensors", False),
        ("method: rtn\nbits: 3", "compressed-tensors", False),
        ("method: awq", "compressed-tensors", False),
        ("method: gptq\nformat: gptq", "gptq", False),  # asked for
        ("method: awq\nformat: awq", "awq", False),
        ("method: awq\nsymmetric: false", "awq", False),  # what compressed-tensors cannot hold
        ("method: bnb-nf4", "bitsandbytes", False),
    ],
)
def test_experts_go_where_transformers_reads_them(
    tiny: Path, mixture: ModelFiles, text: str, format: str, static: bool
) -> None:
    recipe = parse_recipe(f"kind: quantize\n{text}\n")
    settled = settle(recipe, mixture)
    assert isinstance(settled, QuantizeRecipe) and isinstance(recipe, QuantizeRecipe)
    assert (settled.format, settled.static_groups) == (format, static)
    assert bool(settled.ignore) == ("symmetric: false" in text)  # no format holds them asymmetric
    assert settle(recipe, open_files(tiny)).format == recipe.format


def test_the_general_texts() -> None:
    """Both languages, code and queries; long enough; kept apart; nothing that a reader would trip over."""
    texts = read_texts("calib/general.jsonl")
    held = read_texts("general.txt")[0]
    assert set(GENERAL) <= set(bundled_sources())
    joined = "\n\n".join(texts)
    assert len(joined) > 300_000 and len(held) > 90_000
    for text in (joined, held):
        hangul = sum("가" <= c <= "힣" for c in text) / len(text)
        latin = sum(c.isascii() and c.isalpha() for c in text) / len(text)
        assert 0.1 < hangul < 0.3 and 0.4 < latin < 0.8
        assert text.count("SELECT") > 5 and "def " in text and "�" not in text and "\r" not in text
    paragraphs = {p for p in held.split("\n\n") if len(p) > 80}
    assert paragraphs and not any(p in joined for p in paragraphs)
    assert len(set(texts)) == len(texts)
