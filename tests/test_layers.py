"""`quantlab layers`: a layer that is made to hurt is named first; what is suggested can be pasted into the recipe."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantlab.commands import layers as verb
from quantlab.errors import DataError, RecipeError
from quantlab.progress import Silent
from quantlab.quant.hessian import InputHessian
from quantlab.quant.layer_facts import layer_facts, outliers
from quantlab.quant.mixed_precision.overrides import LayerRecord, kin, read_records, shares, suggest
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.load import load_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.report.layer_map import colour, heat_map

from .conftest import write_tiny

PLANTED = "model.layers.1.mlp.down_proj"
LOUD = 100.0


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that computes what a random one does, with one layer that is hard to round: in each of its groups of
    inputs one channel is made silent and its weights loud, so that they take the group's range."""
    folder = write_tiny(tmp_path_factory.mktemp("planted") / "model", dtype="float32")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PLANTED}.weight"][:, ::32] *= LOUD
    tensors[f"{PLANTED.replace('down', 'up')}.weight"][::32] /= LOUD
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    lines = [
        json.dumps({"text": f"{n} small birds sang about rain and bread number {n * 7} " * 12})
        for n in range(12)
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def recipe(text: Path, **keys: Any) -> QuantizeRecipe:
    calibration = {"source": str(text), "rows": 8, "seq_len": 64}
    content = {
        "method": "gptq",
        "bits": 3,
        "group_size": 32,
        "act_order": "group",
        "calibration": calibration,
    }
    return QuantizeRecipe.model_validate(content | keys)


def made(model: Path, out: Path, wish: QuantizeRecipe, **settings: Any) -> dict[str, Any]:
    quantize([Job("r", wish, out)], str(model), device="cpu", progress=Silent(), **settings)
    found = json.loads((out / "quantlab.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def checkpoint(planted: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    made(planted, out, recipe(text))
    return out


def test_a_planted_layer_is_named_first(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb.run(str(checkpoint), verb.Options(budget="30%"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    first = found["layers"][0]
    assert (first["name"], first["block"], first["projection"]) == (PLANTED, 1, "mlp.down_proj")
    assert first["share"] > 0.5 and first["suggested"] and len(found["layers"]) == 21
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    stored = sum(
        row["weights"] * (3 + 16 / 32) / 8 for row in found["layers"]
    )  # bytes, scales of groups of 32 included
    assert stored * 0.2 < found["suggestion"]["extra_bytes"] <= stored * 0.3
    assert next(iter(found["suggestion"]["overrides"])) == PLANTED
    assert found["suggestion"]["saved"] > 0.5 and found["divergence"] > 0


def test_what_is_suggested_is_a_piece_of_the_recipe_that_helps(
    planted: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    record = verb.record_of(str(checkpoint), verb.Options(), Silent())
    found = verb.examine(str(checkpoint), record, verb.Options(), 0.3)
    piece = yaml.safe_load(found["suggestion"]["yaml"])
    assert piece["format"] == "compressed-tensors"  # gptq is read with one width for all layers
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(text).content() | piece), encoding="utf-8")
    wish = load_recipe(file)
    assert isinstance(wish, QuantizeRecipe)
    after = made(planted, tmp_path / "out", wish)
    assert after["layers"][PLANTED]["bits"] == 8
    assert after["loss"][PLANTED] < record["loss"][PLANTED] / 20
    widened = sum(one["bits"] == 8 for one in after["layers"].values())
    assert widened == len(found["suggestion"]["overrides"])


def test_a_recipe_is_tried_without_leaving_anything(
    planted: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    file = tmp_path / "r.yaml"
    file.write_text(recipe(text).to_yaml(), encoding="utf-8")
    options = verb.Options(model=str(planted), budget="30%", plot=tmp_path / "map.svg", top=3)
    verb.run(str(file), options)
    said = capsys.readouterr().out
    first = next(line for line in said.splitlines() if "model.layers" in line)
    assert f"* {PLANTED}" in first and "overrides:\n" in said and f"  {PLANTED}: {{bits: 8}}" in said
    assert sum("│" in line for line in said.splitlines()) == 3
    assert not list(scratch.iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == [
        "map.svg",
        "r.yaml",
        "scratch",
    ]


def test_the_record_is_what_the_layer_does(planted: Path, checkpoint: Path) -> None:
    """Losses, outputs and sensitivities of the record against the whole model in memory."""
    from quantlab.models.load import load_model

    record = json.loads((checkpoint / "quantlab.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    model = load_model(planted, device="cpu", dtype="float32")
    wish = QuantizeRecipe.model_validate(record["recipe"])
    from quantlab.models.safetensors.files import open_files
    from quantlab.quant.pipeline import calibration_rows

    rows, _ = calibration_rows([Job("r", wish, checkpoint)], open_files(planted), False)
    outputs = []
    layer = model.model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with torch.no_grad():
        model.model(input_ids=rows)
    handle.remove()
    power = outputs[0].double().square().sum(-1).mean().item()
    assert record["layers"][name]["output"] == pytest.approx(power, rel=1e-3)
    assert record["layers"][name]["weights"] == 128 * 128 and record["layers"][name]["bits"] == 3
    one = next(r for r in read_records(record) if r.name == name)
    assert one.relative_error == pytest.approx(math.sqrt(record["loss"][name] / power), rel=1e-3)


def test_auto_widths_are_recorded(planted: Path, text: Path, tmp_path: Path) -> None:
    wish = recipe(text, bits="auto", target_bits=3.5, format="compressed-tensors")
    record = made(planted, tmp_path / "out", wish)
    assert {n: one["bits"] for n, one in record["layers"].items()} == record["widths"]["layers"]
    found = verb.examine("x", record, verb.Options(average_bits=4.0), 0.05)
    assert yaml.safe_load(found["suggestion"]["yaml"]).keys() == {"target_bits"}
    assert found["suggestion"]["overrides"] == {}


def test_a_killed_run_keeps_what_it_recorded(planted: Path, text: Path, tmp_path: Path) -> None:
    """Facts of blocks written before are there after a run goes on."""
    from quantlab.quant.checkpoint import CheckpointWriter

    key = {"recipe": "r"}
    writer = CheckpointWriter(tmp_path / "out", "model.layers", 2, torch.float16, key, resume=False)
    facts = {"q": {"output": 2.0, "outliers": 0, "largest": []}}
    writer.write_block(0, {"q.weight": torch.zeros(2, 2)}, {"q": 1.0}, facts=facts)
    again = CheckpointWriter(tmp_path / "out", "model.layers", 2, torch.float16, key, resume=True)
    assert again.facts == {"model.layers.0.q": facts["q"]} and again.losses == {"model.layers.0.q": 1.0}


def test_a_run_that_measured_no_costs_says_so(
    planted: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record = made(planted, out, recipe(text), memory_limit=2**30)
    assert all("sensitivity" not in one and one["output"] > 0 for one in record["layers"].values())
    found = verb.examine(str(out), record, verb.Options(), 0.05)
    assert found["suggestion"] is None and found["missing"] == ["divergence"]
    verb.run(str(out), verb.Options())
    assert f"quantlab layers RECIPE --model {planted}" in capsys.readouterr().out


def test_what_cannot_be_told_is_refused(checkpoint: Path, planted: Path, tmp_path: Path) -> None:
    options, silent = verb.Options(), Silent()
    with pytest.raises(DataError, match=r"no quantlab\.json"):
        verb.record_of(str(planted), options, silent)
    with pytest.raises(RecipeError, match="which model"):
        verb.record_of("gptq-int4", options, silent)
    with pytest.raises(RecipeError, match="rtn calibrates on nothing"):
        verb.record_of("rtn-int4", verb.Options(model=str(planted)), silent)
    with pytest.raises(RecipeError, match="no such recipe"):
        verb.record_of("gptq-int5", options, silent)
    with pytest.raises(RecipeError, match="--model goes with a recipe"):
        verb.record_of(str(checkpoint), verb.Options(model=str(planted)), silent)
    with pytest.raises(RecipeError, match="--set changes a recipe"):
        verb.record_of(str(checkpoint), verb.Options(overrides=("bits=4",)), silent)
    record = json.loads((checkpoint / "quantlab.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    (old / "quantlab.json").write_text(json.dumps({k: v for k, v in record.items() if k != "layers"}))
    with pytest.raises(DataError, match="neither their outputs nor") as caught:
        verb.record_of(str(old), options, silent)
    assert caught.value.hint is not None and "--model" in caught.value.hint
    (old / "quantlab.json").write_text(json.dumps(record | {"loss": {}, "recipe": {"method": "rtn"}}))
    with pytest.raises(DataError, match="rtn recorded no layer's output error"):
        verb.record_of(str(old), options, silent)
    for budget in ("5", "-1%", "0%", "five"):
        with pytest.raises(RecipeError, match=re.escape(f"--budget {budget}")):
            verb.percent(budget)
    for wrong in (verb.Options(bits=3), verb.Options(average_bits=3.0)):
        with pytest.raises(RecipeError, match="--bits 3|--average-bits 3"):
            verb.examine("x", record, wrong, 0.05)


def layer(name: str, weights: int, cost: float, bits: int = 4) -> LayerRecord:
    return LayerRecord(name, weights, bits, loss=cost, output=1.0, sensitivity=1.0)


def test_the_budget_is_kept_and_spent_where_it_saves_most() -> None:
    records = [layer("a", 100, 8.0), layer("b", 100, 1.0), layer("c", 10, 0.9), layer("d", 100, 0.0)]
    found = suggest(records, 4 * 110)
    assert found.names == ("c", "a") and found.extra_bits == 440
    assert found.saved == pytest.approx((8 + 0.9) * (1 - 1 / 256) / 9.9)
    assert found.weights == pytest.approx(110 / 310) and found.average_bits == pytest.approx(4 + 440 / 310)
    assert suggest(records, 39).names == () and suggest(records, 40).names == ("c",)
    assert "d" not in suggest(records, 10_000).names  # what costs nothing is left as it is
    assert suggest(records, 400, tied=[["a", "b"]]).names == ("c",)  # the pair takes 800
    assert set(suggest(records, 800, tied=[["a", "b"]]).names) == {"a", "b"}
    assert suggest([layer("w", 10, 1.0, bits=8), records[0]], 10_000).names == ("a",)
    with pytest.raises(ValueError, match="what e costs"):
        suggest([LayerRecord("e", 4, 4, loss=1.0)], 1)
    assert shares(records)["a"] == pytest.approx(8 / 9.9)


def test_experts_are_widened_together() -> None:
    names = [f"m.0.mlp.experts.{n}.{leaf}" for n in range(2) for leaf in ("up", "down")] + ["m.0.q"]
    assert kin(names, whole=True) == [names[:4]]
    assert kin(names, whole=False) == [[names[0], names[2]], [names[1], names[3]]]


def test_outlier_channels() -> None:
    power = torch.ones(64)
    power[5], power[9], power[11] = 100.0, 10_000.0, 0.0  # 10 and 100 times the median, and dead
    assert outliers(power) == (2, [[9, 100.0], [5, 10.0]])
    assert outliers(torch.zeros(8)) == (0, [])
    torch.manual_seed(0)
    x, weight = torch.randn(50, 8), torch.randn(3, 8)
    hessian = InputHessian.empty("a", 8)
    hessian.add(x)
    hessian.finish()
    found = layer_facts({"a": weight, "b": weight}, [hessian, InputHessian.empty("b", 8)])
    assert found.keys() == {"a"}
    assert found["a"]["output"] == pytest.approx((x @ weight.t()).square().sum(1).mean().item(), rel=1e-5)


def test_the_heat_map_shows_every_layer_once() -> None:
    rows: list[dict[str, Any]] = [
        {"block": b, "projection": p, "share": 0.1 * (b + 1), "relative_error": None, "suggested": b == 1}
        for b in range(3)
        for p in ("a<b", "mlp.experts.0.up", "mlp.experts.1.up")
    ]
    rows.append({"block": None, "projection": "lm_head", "share": 0.1, "relative_error": None})
    tree = ElementTree.fromstring(heat_map(rows, "a & b"))
    cells = [e for e in tree.iter("{http://www.w3.org/2000/svg}rect") if len(e)]
    assert len(cells) == 6  # the experts share a row
    said = [str(cell[0].text) for cell in cells]
    assert "block 2, mlp.experts.*.up: 60.00%" in said
    assert sum("an override is suggested" in words for words in said) == 2
    assert colour(1.0, 1.0) == "#96143c" and colour(0.0, 1.0) == colour(1e-9, 1.0) == "#f7f7f2"


def test_a_gguf_recipe_gets_a_type() -> None:
    """Sizes are those of the block types: 4.5 bits a weight of Q4_K, 8.5 of Q8_0."""
    wish = QuantizeRecipe.model_validate(
        {"method": "gptq", "format": "gguf", "overrides": {"o": {"type": "Q6_K"}}}
    )
    layers = {
        f"m.layers.{n}.{leaf}": {
            "bits": 4,
            "group_size": 32,
            "type": "Q4_K",
            "weights": 25_600,
            "divergence": (1.0 + n) * weight,
        }
        for n in range(4)
        for leaf, weight in (("q", 1.0), ("k", 1.5))
    }
    record = {"recipe": wish.content(), "parent": "m", "layers": layers, "loss": dict.fromkeys(layers, 1.0)}
    growth = 4 * 25_600 / (8 * 25_600 * 4.5)
    found = verb.examine("m", record, verb.Options(), growth)["suggestion"]
    assert len(found["overrides"]) == 1 and found["extra_bytes"] == 25_600 * 4 // 8
    piece = yaml.safe_load(found["yaml"])
    assert list(piece) == ["overrides"]
    assert list(piece["overrides"].items()) == [("m.layers.3.k", {"type": "Q8_0"}), ("o", {"type": "Q6_K"})]
    assert not verb.examine("m", record, verb.Options(), growth * 0.99)["suggestion"]["overrides"]
    with pytest.raises(RecipeError, match="the wider type is Q8_0"):
        verb.examine("m", record, verb.Options(bits=6), growth)
