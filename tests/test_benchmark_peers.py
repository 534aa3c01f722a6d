"""The side-by-side benchmarks without any peer: the model they make, the readers, the errors, the settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    """The benchmarks are scripts: their folder is the first on the path when they run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def tiny(**changes: Any) -> Any:
    from random_llama import Shape

    return replace(Shape(hidden=64, blocks=2, heads=4, kv_heads=2, ffn=96, vocab=50, positions=64), **changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- the random model


def test_shards_change_no_value(tmp_path: Path) -> None:
    from random_llama import build

    build(tmp_path / "one", tiny())
    build(tmp_path / "many", tiny(shard_bytes=1))  # a file for every tensor
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == len(many) == len(one)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])
    build(tmp_path / "other", tiny(seed=1))
    assert not torch.equal(tensors(tmp_path / "other")["lm_head.weight"], one["lm_head.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_was_described(tmp_path: Path, tied: bool) -> None:
    from random_llama import build, parameters

    from quantlab.models.safetensors.files import open_files

    shape = tiny(tied=tied, shard_bytes=20000)
    model = loaded(build(tmp_path / "m", shape))
    assert (
        sum(p.numel() for p in model.parameters()) == parameters(shape) == open_files(tmp_path / "m").params
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert 0.019 < model.model.embed_tokens.weight.std() < 0.021
    assert bool((model.model.layers[0].input_layernorm.weight == 1).all())
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_outliers_are_the_same_channels_everywhere(tmp_path: Path) -> None:
    from random_llama import OUTLIER_FACTOR, build

    found = tensors(build(tmp_path / "m", tiny(outliers=3)))
    norms = [v for k, v in found.items() if "layers" in k and v.dim() == 1]
    assert len(norms) == 4 and all(torch.equal(norms[0], n) for n in norms)
    assert int((norms[0] == OUTLIER_FACTOR).sum()) == 3 and int((norms[0] == 1).sum()) == 61


def test_text_of_rows_gives_the_same_rows_to_quantlab(tmp_path: Path) -> None:
    from random_llama import build, random_rows, text_of_rows

    from quantlab.calibration import read_texts, token_rows
    from quantlab.models.load import load_tokenizer
    from quantlab.models.safetensors.files import open_files

    tokenizer = load_tokenizer(open_files(build(tmp_path / "m", tiny())))
    rows = random_rows(50, 7, 16, seed=3)
    assert rows.min() >= 3 and rows.max() < 50
    (tmp_path / "rows.txt").write_text(text_of_rows(rows), encoding="utf-8")
    for seed in (0, 1):  # all rows are drawn, so whatever the seed they come in order
        texts = read_texts(str(tmp_path / "rows.txt"))
        assert torch.equal(token_rows(texts, tokenizer, rows=7, seq_len=16, seed=seed), rows)


# --- reading checkpoints


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_compressed_tensors_as_the_package_packs_them(bits: int, ordered: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import pack_to_int32
    from peers.checkpoints import dequantize

    torch.manual_seed(0)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (16, 64), dtype=torch.int8)
    zeros = torch.randint(-half, half, (16, 4), dtype=torch.int8)
    scales = torch.rand(16, 4).to(torch.bfloat16)
    group_of = torch.arange(64) // 16
    packed = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scales,
        "weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0),
        "weight_shape": torch.tensor([16, 64]),
    }
    if ordered:
        group_of = group_of[torch.randperm(64)]
        packed["weight_g_idx"] = group_of.to(torch.int32)
    expected = (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]
    assert torch.equal(dequantize("compressed-tensors", packed), expected)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    from peers.checkpoints import Checkpoint
    from random_llama import build

    model = loaded(build(tmp_path / "m", tiny()))
    other = Checkpoint(build(tmp_path / "other", tiny(blocks=1)))
    with pytest.raises(ValueError, match="does not hold the parameters"):
        other.install(model)
    again = Checkpoint(build(tmp_path / "again", tiny(seed=5)))
    again.install(model)
    assert torch.equal(model.lm_head.weight, again.tensor("lm_head.weight").float())


# --- errors


def changed_copy(source: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    found = tensors(source)
    change(found)
    save_file(found, target / "model.safetensors")
    (target / "config.json").write_text(
        (source / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    return target


def test_errors_against_brute_force(tmp_path: Path) -> None:
    from peers.checkpoints import Checkpoint
    from peers.errors import measure
    from random_llama import build, random_rows

    source = build(tmp_path / "m", tiny(dtype="float32"))
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"]

    def noise(found: dict[str, torch.Tensor]) -> None:
        for name in names:
            found[name] = found[name] + 0.01 * torch.randn(found[name].shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    noisy = changed_copy(source, tmp_path / "noisy", noise)
    model, rows = loaded(source), random_rows(50, 5, 12, seed=1)
    checkpoints = {"same": Checkpoint(source), "noisy": Checkpoint(noisy)}
    found = measure(model, rows, checkpoints, block_rows=5, layerwise={"same", "noisy"})
    assert all(value == 0 for value in found["same"].values())

    inputs: dict[str, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        expected = model(rows).logits
        wanted = 0.0
        for name in names:
            error = model.get_parameter(name) - Checkpoint(noisy).tensor(name)
            wanted += float((inputs[name] @ error.t()).square().sum() / rows.numel())
        got = loaded(noisy)(rows).logits
    assert found["noisy"]["layer_error"] == pytest.approx(wanted, rel=1e-4)
    assert found["noisy"]["logits_mse"] == pytest.approx(float((expected - got).square().mean()), rel=1e-4)
    # Each block alone is wrong on the original's inputs: put the noisy blocks in one at a time.
    total = 0.0
    for index in range(2):
        alone = loaded(source)
        part = Checkpoint(noisy).weights(f"model.layers.{index}")
        alone.model.layers[index].load_state_dict(part)
        kept: list[torch.Tensor] = []
        alone.model.layers[index].register_forward_hook(
            lambda m, args, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            alone(rows)
        total += float((kept[0] - outputs[index]).square().sum() / rows.numel())
    assert found["noisy"]["block_error"] == pytest.approx(total, rel=1e-4)


def test_scales_folded_into_a_norm_are_no_block_error(tmp_path: Path) -> None:
    from peers.checkpoints import Checkpoint
    from peers.errors import measure
    from random_llama import build, random_rows

    source = build(tmp_path / "m", tiny(dtype="float32"))
    scale = 2.0 ** torch.randint(-2, 3, (64,), generator=torch.Generator().manual_seed(0))

    def fold(found: dict[str, torch.Tensor]) -> None:
        found["model.layers.0.input_layernorm.weight"] /= scale
        for leaf in "qkv":
            found[f"model.layers.0.self_attn.{leaf}_proj.weight"] *= scale

    folded = changed_copy(source, tmp_path / "folded", fold)
    rows = random_rows(50, 3, 12)
    found = measure(loaded(source), rows, {"f": Checkpoint(folded)}, block_rows=2, layerwise=set())["f"]
    assert found["layer_error"] is None
    assert found["block_error_relative"] < 1e-9 and found["logits_mse"] < 1e-9


# --- settings and reports


def test_every_recipe_is_one_that_quantlab_takes() -> None:
    from peers.variants import own_variants, peer_variants
    from quantize_vs_peers import entries

    from quantlab.recipe.load import parse_recipe
    from quantlab.recipe.quantize import QuantizeRecipe

    recipes = [r for entry in entries(128).values() for r in entry.recipes.values()]
    variants = list(own_variants(32))
    recipes += [v.recipe for v in variants if v.recipe is not None]
    assert len(recipes) == 8 + 20 and len({v.name for v in [*variants, *peer_variants(32, True)]}) == 20 + 11
    for recipe in recipes:
        assert isinstance(parse_recipe(json.dumps({"kind": "quantize", **recipe})), QuantizeRecipe)


def test_the_same_settings_for_everybody() -> None:
    from quantize_vs_peers import entries

    for entry in entries(64).values():
        if entry.tool != "quantlab":
            own = entries(64)[f"quantlab-{entry.kind}"].recipes[f"{entry.kind}4"]
            for key in ("bits", "group_size", "symmetric"):
                assert entry.settings[key] == own[key], key
            assert entry.settings["damp"] == own.get("damp", 0.01) and entry.settings["act_order"] == "none"


def test_peers_are_pinned_exactly_and_torch_comes_first(tmp_path: Path) -> None:
    from peers import environments

    for name, pins in environments.PINS.items():
        assert all(pin.count("==") == 1 for pin in (*environments.FIRST, *pins))
        assert not any(pin.startswith("torch==") for pin in pins) and environments.FIRST[0].startswith(
            "torch=="
        )
        assert not environments.is_ready(tmp_path, name)
        marker = tmp_path / name / environments.MARKER
        marker.parent.mkdir()
        marker.write_text('["torch==0"]', encoding="utf-8")
        assert not environments.is_ready(tmp_path, name)  # made with other versions
        marker.write_text(json.dumps([*environments.FIRST, *pins]), encoding="utf-8")
        assert environments.is_ready(tmp_path, name)


def test_points_say_no_where_a_peer_is_better_and_nothing_where_it_is_missing() -> None:
    from quantize_vs_peers import merge, points, show

    laps = {"quantize": 1.0}
    runs = [{"seconds": s, "peak_bytes": 9e8, "idle_bytes": 4e8, "laps": laps} for s in (5.0, 3.0, 4.0)]
    own = merge(runs)
    assert own["seconds"] == 4.0 and own["all_seconds"] == [5.0, 3.0, 4.0]
    assert merge([runs[0], {"error": "no"}]) == {"error": "no"}
    peer = dict(runs[0], seconds=6.0, peak_bytes=8e8)
    found = {"quantlab-gptq": own, "llmcompressor-gptq": peer, "gptqmodel-gptq": {"error": "broke"}}
    errors = {"quantlab-gptq": {"layer_error": 1.0}, "llmcompressor-gptq": {"layer_error": 1.1}}
    claims = {c["claim"]: c for c in points(found, errors)}
    assert len(claims) == 3
    assert not claims["GPTQ: seconds / llmcompressor-gptq"]["holds"]
    assert claims["GPTQ: layer error / llmcompressor-gptq"]["holds"]
    assert not claims["peak memory: largest of quantlab's / smallest of the peers'"]["holds"]
    table = show(found, errors, cuda=False)
    assert "failed" in table and "1.50" in table and len({len(line) for line in table.splitlines()}) == 1


def test_a_missing_tool_is_a_result_and_not_a_crash(tmp_path: Path) -> None:
    job = {
        "tool": "autoawq",
        "device": "cpu",
        "result": str(tmp_path / "r.json"),
        "rows": "",
        "model": "",
        "bits": 4,
    }
    (tmp_path / "spec.json").write_text(
        json.dumps({"jobs": [job, job | {"tool": "nonesuch"}]}), encoding="utf-8"
    )
    worker = [sys.executable, str(BENCHMARKS / "peers" / "worker.py"), str(tmp_path / "spec.json")]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 1, done.stderr
    assert "nonesuch" in json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["error"]


def test_quantlab_through_the_worker(tmp_path: Path) -> None:
    """The whole way of one measurement: model, rows, a fresh process, what it saved, and its errors."""
    from peers.checkpoints import Checkpoint
    from peers.errors import measure
    from quantize_vs_peers import gptq
    from random_llama import Shape, build, random_rows, text_of_rows

    shape = Shape(hidden=64, blocks=1, heads=4, kv_heads=2, ffn=96, vocab=50, positions=64)
    model, rows = build(tmp_path / "m", shape), random_rows(50, 4, 32)
    save_file({"ids": rows}, tmp_path / "rows.safetensors")
    (tmp_path / "rows.txt").write_text(text_of_rows(rows), encoding="utf-8")
    spec = {
        "tool": "quantlab", "model": str(model), "rows": str(tmp_path / "rows.safetensors"), "device": "cpu",
        "text": str(tmp_path / "rows.txt"), "out": str(tmp_path / "out"), "result": str(tmp_path / "r.json"),
        "recipes": {"four": gptq(4, 32), "eight": gptq(8, 32)},
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    worker = [sys.executable, str(BENCHMARKS / "peers" / "worker.py"), str(tmp_path / "spec.json")]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["seconds"] == pytest.approx(sum(result["laps"].values()))
    assert 0 < result["idle_bytes"] <= result["peak_bytes"]
    checkpoints = {name: Checkpoint(tmp_path / "out" / name) for name in ("four", "eight")}
    found = measure(loaded(model), rows, checkpoints, block_rows=4, layerwise={"four", "eight"})
    # 16 times finer: 256 times smaller
    assert 0 < found["eight"]["layer_error"] < found["four"]["layer_error"] / 50
