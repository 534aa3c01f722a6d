"""Which layers a recipe quantizes, and what stays in 16 bits: by name, by shape, by what readers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.commands.defaults import settle
from quantlab.errors import DataError, RecipeError
from quantlab.models.blockwise import layers_of
from quantlab.models.layers import Layers
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.progress import Silent
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.pipeline import Job, quantize
from quantlab.quant.selection import IGNORED, Selection, Width, matches, select, summary
from quantlab.recipe.load import parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from tests.conftest import WORDS, write_mixture, write_tiny

IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def recipe(**keys: Any) -> QuantizeRecipe:
    return QuantizeRecipe.model_validate({"method": "rtn", "bits": 4} | keys)


def layers(shapes: dict[str, tuple[int, int]], **more: Any) -> Layers:
    named = {f"model.layers.{i}.{n}": shape for i in range(2) for n, shape in shapes.items()}
    return Layers("M", "model.layers", 2, named, {}, frozenset({"lm_head"}), **more)


PLAIN = {"attn.q": (64, 128), "mlp.up": (256, 128), "mlp.down": (128, 320), "mlp.odd": (64, 48)}


def sizes(chosen: Selection) -> dict[str, int]:
    first = "model.layers.0."
    return {n.removeprefix(first): w.group_size for n, w in chosen.widths.items() if n.startswith(first)}


def test_auto_takes_one_size_for_all_where_a_format_has_one() -> None:
    chosen = select(recipe(), layers(PLAIN), "m")
    assert sizes(chosen) == {"attn.q": 64, "mlp.up": 64, "mlp.down": 64} and chosen.sizes() == [64]
    assert set(chosen.kept) == {"model.layers.0.mlp.odd", "model.layers.1.mlp.odd"}
    assert "48 inputs are not divisible by 32" in chosen.kept["model.layers.0.mlp.odd"]


def test_auto_takes_the_largest_for_each_layer_where_a_format_holds_several() -> None:
    chosen = select(recipe(format="compressed-tensors"), layers(PLAIN), "m")
    assert sizes(chosen) == {"attn.q": 128, "mlp.up": 128, "mlp.down": 64}


def test_experts_share_a_size() -> None:
    shapes = {"attn.q": (64, 128), "experts.0.w1": (96, 128), "experts.0.w2": (128, 96)}
    experts = frozenset(f"model.layers.{i}.experts.0.{w}" for i in range(2) for w in ("w1", "w2"))
    one = layers(shapes, experts=experts)
    chosen = select(recipe(format="compressed-tensors"), one, "m")
    assert sizes(chosen) == {"attn.q": 128, "experts.0.w1": 32, "experts.0.w2": 32}


def test_a_size_that_was_written_is_kept_to() -> None:
    with pytest.raises(RecipeError, match=r"mlp.down does not fit: .*320 inputs.*group_size 128") as caught:
        select(recipe(group_size=128), layers(PLAIN), "m")
    assert "group_size: auto" in caught.value.hint
    with pytest.raises(RecipeError, match="mlp.odd does not fit"):
        select(recipe(group_size=64), layers(PLAIN), "m")
    assert not select(recipe(group_size=16), layers(PLAIN), "m").kept


@pytest.mark.parametrize(
    ("pattern", "name", "means"),
    [
        ("mlp.up", "model.layers.1.mlp.up", True),
        ("up", "model.layers.1.mlp.up", True),
        ("up", "model.layers.1.mlp.gate_up", False),  # the end of a name after a dot
        ("model.layers.1", "model.layers.1.mlp.up", True),
        ("model.layers.1", "model.layers.11.mlp.up", False),
        (r"re:layers\.(0|1)\..*up$", "model.layers.1.mlp.up", True),
        (r"re:^mlp", "model.layers.1.mlp.up", False),
    ],
)
def test_what_a_pattern_means(pattern: str, name: str, means: bool) -> None:
    assert matches(pattern, name) == means


def test_ignored_and_overridden() -> None:
    asked = recipe(format="compressed-tensors", ignore=["down"], overrides={
        "re:layers.1.*up": {"bits": 8, "group_size": 32}, "q": {"method": "rtn"}, "odd": {"bits": 16}})  # fmt: skip
    chosen = select(asked, layers(PLAIN), "m")
    assert (
        chosen.widths["model.layers.1.mlp.up"] == Width(8, 32)
        and chosen.widths["model.layers.0.mlp.up"][0] == 4
    )
    assert chosen.widths["model.layers.0.attn.q"] == Width(4, 128, "rtn")
    assert set(chosen.kept.values()) == {IGNORED} and len(chosen.kept) == 4


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"ignore": ["mlp.upp"]}, "ignore: 'mlp.upp' is the name of no layer", "model.layers.0.attn.q"),
        ({"overrides": {"no": {"bits": 8}}}, "overrides: 'no' is the name of no layer", "re:"),
        ({"ignore": ["re:."]}, "no layer of M is left to quantize", ""),
        (
            {"ignore": ["model.layers.0.attn.q"]},
            "leaves attn.q out in every block or in none",
            "compressed-tensors",
        ),
        ({"overrides": {"q": {"bits": 8}}}, "one width and group size for all layers", "compressed-tensors"),
        ({"format": "awq", "overrides": {"q": {"group_size": 32}}}, "for all layers", "compressed-tensors"),
    ],
)
def test_refused_before_work(keys: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        select(recipe(**keys), layers(PLAIN), "m")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ignore: ['re:(']", "ignore: 're:(' is no regular expression"),
        ("ignore: ['']", "ignore: an empty name"),
        ("overrides: {q: {bits: 5}}", "bits"),
        ("overrides: {q: {group_size: 24}}", "group_size: expected auto"),
        ("overrides: {q: {method: fp8}}", "method: expected rtn or gptq"),
        ("overrides: {q: {metod: rtn}}", "metod"),
        ("format: awq\noverrides: {q: {bits: 8}}", "the awq format holds 4 bits"),
        ("bits: auto\ntarget_bits: 3\noverrides: {q: {bits: 8}}", "bits: auto chooses the widths itself"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_when_it_is_read(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"kind: quantize\nmethod: gptq\n{text}\n")
    assert message in str(caught.value)


def test_keys_of_layers_are_in_the_digest_only_where_they_say_something() -> None:
    plain = parse_recipe("kind: quantize\nmethod: gptq\n")
    assert (
        parse_recipe("kind: quantize\nmethod: gptq\nignore: []\noverrides: {}\n").digest() == plain.digest()
    )
    assert parse_recipe("kind: quantize\nmethod: gptq\ngroup_size: auto\n").digest() == plain.digest()
    assert parse_recipe("kind: quantize\nmethod: gptq\nignore: [q]\n").digest() != plain.digest()
    other = parse_recipe("kind: quantize\nmethod: gptq\noverrides: {q: {bits: 8}}\n")
    assert parse_recipe(other.to_yaml()).digest() == other.digest() != plain.digest()


def test_layers_that_no_reader_finds_stay() -> None:
    odd = layers(PLAIN | {"mlp.odd": (64, 64)}, traits={"model.layers.1.mlp.odd": frozenset({"subclass"})})
    chosen = select(recipe(), odd, "m")  # gptq leaves a name out in every block
    assert chosen.kept["model.layers.0.mlp.odd"].startswith("as in another block: optimum")
    assert not select(recipe(format="awq", symmetric=True), odd, "m").kept
    every = layers(PLAIN, traits={n: frozenset({"transposed"}) for n in layers(PLAIN).shapes})
    with pytest.raises(RecipeError, match="no layer of M is left .*Conv1D") as caught:
        select(recipe(format="compressed-tensors"), every, "m")
    assert caught.value.hint == "format: gptq"


def test_bitsandbytes_is_not_let_near_merged_experts() -> None:
    nf4 = QuantizeRecipe(method="bnb-nf4")
    with pytest.raises(DataError, match="would leave the experts of M in 16 bits"):
        select(nf4, layers(PLAIN, merged=True), "m")
    with pytest.raises(DataError, match="would leave the experts"):  # whatever is loaded for it (Llama 4)
        select(nf4, layers(PLAIN, held_in={"a": ("b",)}, apart=frozenset({"bitsandbytes"})), "m")
    some = layers(PLAIN, traits={"model.layers.0.mlp.up": frozenset({"subclass"})})
    assert list(select(nf4, some, "m").kept) == ["model.layers.0.mlp.up"]


def test_the_summary_counts_what_stays() -> None:
    said = summary(select(recipe(), layers(PLAIN), "m"), layers(PLAIN), 2 * 10**5)
    assert said[0].startswith("6 layers are quantized (groups of 64)")
    assert said[1] == "model.layers.*.mlp.odd stays in 16 bits (2): its 48 inputs are not divisible by 32"


# Written and read back


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_files(write_tiny(tmp_path_factory.mktemp("models") / "tiny", dtype="float32"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join(WORDS.split() * 40), encoding="utf-8")
    return path


READ_BACK: dict[str, dict[str, Any]] = {
    "gptq": {"ignore": ["o_proj", "mlp.up_proj"]},
    "gptq-method": {"overrides": {"down_proj": {"method": "rtn"}, "q_proj": {"bits": 16}}},
    "awq": {"ignore": ["model.layers.1.self_attn.k_proj", "re:layers.0.mlp"], "format": "awq"},
    "awq-method": {
        "overrides": {"v_proj": {"method": "gptq"}, "up_proj": {"method": "rtn"}},
        "format": "awq",
    },
    "ct": {
        "ignore": ["model.layers.2"],
        "overrides": {
            "down_proj": {"bits": 8, "group_size": 64},
            "model.layers.0.self_attn": {"group_size": 32},
        },
        "format": "compressed-tensors",
    },
}


@pytest.mark.parametrize("name", READ_BACK)
def test_plain_transformers_reads_what_was_chosen(
    model: ModelFiles, text: Path, tmp_path: Path, name: str
) -> None:
    """The run verifies itself against the weights that were meant, and the plan's size is the size, to the byte."""
    from transformers import AutoModelForCausalLM

    asked: dict[str, Any] = {"method": "awq" if name.startswith("awq") else "gptq", "bits": 4}
    asked |= {"calibration": {"source": str(text), "rows": 6, "seq_len": 48}} | READ_BACK[name]
    one = settle(QuantizeRecipe.model_validate(asked), model)
    quantize([Job("q", one, tmp_path / "q")], model, device="cpu", progress=Silent(), verify=True)
    record = json.loads((tmp_path / "q" / "quantlab.json").read_text(encoding="utf-8"))
    assert record["verification"]["how"] == "transformers" and record["verification"]["passed"]
    made = open_files(tmp_path / "q")
    chosen = select(one, layers_of(model), "m")
    plain = {n.removesuffix(".weight") for n in made.tensors if n.endswith("proj.weight")}
    assert plain == set(chosen.kept) == set(record["kept"])
    assert made.size_bytes == checkpoint_bytes(one, model)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_method_of_its_own_is_that_method(model: ModelFiles, text: Path, tmp_path: Path) -> None:
    """Layers that rtn rounds inside a gptq recipe are those that rtn makes; the others those of gptq."""
    from safetensors.torch import load_file

    calibration = {"source": str(text), "rows": 6, "seq_len": 48}
    common: dict[str, Any] = {"bits": 4, "group_size": 32}
    jobs = [
        Job(name, QuantizeRecipe.model_validate(common | keys), tmp_path / name)
        for name, keys in {
            "rtn": {"method": "rtn"},
            "gptq": {"method": "gptq", "calibration": calibration},
            "both": {
                "method": "gptq",
                "calibration": calibration,
                "overrides": {"v_proj": {"method": "rtn"}},
            },
        }.items()
    ]
    quantize(jobs, model, device="cpu", progress=Silent())
    held = {job.name: load_file(job.out / "model-00001-of-00004.safetensors") for job in jobs}
    for key, tensor in held["both"].items():
        same = "rtn" if ".v_proj." in key else "gptq"
        assert torch.equal(tensor, held[same][key]), key
    assert not torch.equal(held["rtn"]["model.layers.0.self_attn.v_proj.qweight"],
                           held["gptq"]["model.layers.0.self_attn.v_proj.qweight"])  # fmt: skip


def test_experts_of_several_widths_are_refused_where_they_are_merged(tmp_path: Path) -> None:
    files = open_files(write_mixture(tmp_path / "m"))
    with pytest.raises(RecipeError, match="one width and group size for all experts"):
        settle(recipe(group_size=32, overrides={"w2": {"bits": 8}}), files)


def test_in_company_a_recipe_gives_what_it_gives_alone(model: ModelFiles, text: Path, tmp_path: Path) -> None:
    """What one recipe leaves out or treats differently does not move the scales of another in the same pass."""
    common = {"method": "awq", "bits": 4, "group_size": 32, "format": "awq"}
    common |= {"calibration": {"source": str(text), "rows": 6, "seq_len": 48}}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "ignoring": {"ignore": ["k_proj"]},
        "overridden": {"overrides": {"v_proj": {"method": "gptq"}, "up_proj": {"method": "rtn"}}},
    }
    recipes = {name: QuantizeRecipe.model_validate(common | change) for name, change in changes.items()}
    jobs = [Job(name, one, tmp_path / "together" / name) for name, one in recipes.items()]
    quantize(jobs, model, device="cpu", progress=Silent())
    for name, one in recipes.items():
        quantize([Job(name, one, tmp_path / "alone" / name)], model, device="cpu", progress=Silent())
        for file in sorted((tmp_path / "alone" / name).glob("*.safetensors")):
            assert file.read_bytes() == (tmp_path / "together" / name / file.name).read_bytes(), (
                name,
                file.name,
            )


def test_a_pattern_that_backtracks_for_ever_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"takes longer than 1 s on a{60}!"):
        matches("re:^(a|aa)+$", "a" * 60 + "!")
