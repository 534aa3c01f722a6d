"""Verification: real checkpoints pass in a fresh process, both ways; checkpoints damaged in small ways that load do
not; and nothing is left behind when the process is killed or too slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import MachineError, QuantlabError
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.block import BlockResult
from quantlab.quant.pipeline import Job, quantize
from quantlab.quant.verify.reference_logits import (
    Expected,
    ReferencePass,
    expected_of,
    probe_rows,
    streamed_logits,
)
from quantlab.quant.verify.reload import Check, compare, raise_if_failed, tolerance, verify
from quantlab.recipe.quantize import QuantizeRecipe

ROWS = probe_rows(None, 257, tokens=32)
NOTHING = Expected(torch.zeros(2, 32, 256), torch.zeros(2, 32, 256))  # one column too few
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32, "act_order": True},
    "awq": {"method": "awq", "group_size": 32},
    "three": {"method": "rtn", "bits": 3, "group_size": 32, "symmetric": False},
    "packed": {"method": "rtn", "group_size": 32, "format": "compressed-tensors"},
    "float": {"method": "fp8"},
}


@pytest.fixture(scope="module")
def made(tiny: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    source = {"source": str(calibration_file), "rows": 8, "seq_len": 32}
    recipes = {
        name: QuantizeRecipe.model_validate(
            keys | ({"calibration": source} if keys["method"] in ("gptq", "awq") else {})
        )
        for name, keys in KINDS.items()
    }
    jobs = [Job(name, one, folder / name) for name, one in recipes.items()]
    quantize(jobs, str(tiny), device="cpu", progress=Silent(), verify=False)
    return {name: folder / name for name in KINDS}


def test_the_probe_is_the_model(tiny: Path) -> None:
    """With nothing quantized, the probe's walk over borrowed weights gives the logits of the model loaded whole."""
    files = open_files(tiny)
    probe = ReferencePass(files, ROWS, "cpu", torch.bfloat16)
    hidden = probe.start()
    for index in range(3):
        hidden = probe.through(index, hidden, BlockResult())
    whole = load_model(tiny, device="cpu", dtype="float32").model
    with torch.no_grad():
        expected = whole(input_ids=ROWS).logits
    assert compare(expected, probe.logits(hidden).logits)[1] < 1e-6
    assert compare(expected, streamed_logits(tiny, ROWS))[1] < 1e-6


def test_rounding_is_measured_on_the_model(tiny: Path, made: dict[str, Path]) -> None:
    """What rounding inputs to bfloat16 does lies near what computing everything in bfloat16 does, whichever way it is
    measured, and the exact half is untouched by it."""
    for path in (tiny, made["gptq"]):
        found = expected_of(path, ROWS)
        assert compare(found.logits, streamed_logits(path, ROWS))[1] < 1e-6
        _, rounded, _, _ = compare(found.logits, found.rounded)
        assert 1e-3 < rounded < 0.05
    whole = load_model(tiny, device="cpu", dtype="bfloat16").model
    with torch.no_grad():
        everything = compare(expected_of(tiny, ROWS).logits, whole(input_ids=ROWS).logits.float())[1]
    rounded = compare(*vars(expected_of(tiny, ROWS)).values())[1]
    assert rounded < everything < 4 * rounded


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    from ..conftest import write_tiny

    model = write_tiny(tmp_path / "m", tie=True)
    with torch.no_grad():
        expected = load_model(model, device="cpu", dtype="float32").model(input_ids=ROWS).logits
    assert compare(expected, streamed_logits(model, ROWS))[1] < 1e-6
    probe = ReferencePass(open_files(model), ROWS, "cpu", torch.bfloat16)
    hidden = probe.start()
    for index in range(3):
        hidden = probe.through(index, hidden, BlockResult())
    assert compare(expected, probe.logits(hidden).logits)[1] < 1e-6


def intended(tiny: Path, checkpoint: Path) -> torch.Tensor:
    """Logits of the original model with the checkpoint's weights written into it, loaded whole: another way to the same
    numbers."""
    from quantlab.formats import format_module
    from quantlab.quant.verify.reference_logits import packed_linears
    from quantlab.registry.formats import FORMATS

    files = open_files(checkpoint)
    config = files.quantized
    assert config is not None
    stored: dict[str, torch.Tensor] = {}
    for file in files.weight_files:
        stored |= load_file(file)
    model = load_model(tiny, device="cpu", dtype="float32").model
    state = model.state_dict()
    reader = format_module(config["quant_method"])
    for name in packed_linears(files):
        parts = {
            s: stored[f"{name}.{s}"]
            for s in FORMATS[config["quant_method"]].suffixes
            if f"{name}.{s}" in stored
        }
        groups = config.get("config_groups")
        told = groups["group_0"]["weights"] if groups else config
        bits, size = told["num_bits" if groups else "bits"], told["group_size"] or -1
        codes, scales, zeros, group = reader.unpack(parts, bits=bits, group_size=size)
        state[f"{name}.weight"].copy_((codes.float() - zeros[:, group]) * scales[:, group])
    for name, tensor in stored.items():
        if name in state and tensor.shape == state[name].shape and tensor.dtype == torch.bfloat16:
            state[name].copy_(tensor)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS).logits
    return Expected(found, expected_of(checkpoint, ROWS).rounded)


def test_all_kinds_are_verified_both_ways(tiny: Path, made: dict[str, Path]) -> None:
    claims = [Check(path, intended(tiny, path), name) for name, path in made.items()]
    for limit, how in ((None, "transformers"), (1000, "streamed")):
        for claim, found in zip(claims, verify(claims, ROWS, memory_limit=limit), strict=True):
            raise_if_failed(found, claim.label)
            assert found.how == how, (claim.label, found.why)
            assert found.relative < (1e-5 if how == "streamed" else 3e-2), claim.label
            assert found.tolerance.relative < 0.1
            assert (found.rows, found.tokens) == tuple(ROWS.shape) and found.top1 > 0.95
            record = json.loads(json.dumps(found.record()))
            assert record["passed"] is True and record["how"] == how
            assert ("why" in record) == (how == "streamed")


DAMAGE = ("a scale", "a zero", "rows swapped", "another norm", "codes of one layer")


@pytest.mark.parametrize("how", ["streamed", "transformers"])
def test_small_damage_is_found(tiny: Path, made: dict[str, Path], tmp_path: Path, how: str) -> None:
    """The files are sound and load; one thing in one of three blocks is not what was meant."""
    expected = intended(tiny, made["gptq"])
    claims = []
    for kind in ("nothing", *DAMAGE):
        shutil.copytree(made["gptq"], tmp_path / kind)
        damage(tmp_path / kind / "model-00002-of-00004.safetensors", kind)
        claims.append(Check(tmp_path / kind, expected, kind))
    whole, *damaged = verify(claims, ROWS, memory_limit=1000 if how == "streamed" else None)
    raise_if_failed(whole, "nothing")
    for found, kind in zip(damaged, DAMAGE, strict=True):
        assert found.how == how and not found.passed and found.relative > 0.03, kind
        with pytest.raises(
            QuantlabError, match=r"q: reloaded .* does not compute what was intended"
        ) as caught:
            raise_if_failed(found, "q", tmp_path / "q.failed")
        assert "q.failed" in caught.value.hint


def damage(file: Path, kind: str) -> None:
    tensors, layer = load_file(file), "model.layers.1.mlp.down_proj"
    if kind == "a scale":  # all scales of one layer by an eighth
        tensors[f"{layer}.scales"] *= 1.125
    elif kind == "a zero":  # one step off, as when a reader adds one too many
        tensors[f"{layer}.qzeros"] += 0x11111111
    elif kind == "rows swapped":
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"].flip(0).contiguous()
    elif kind == "another norm":
        tensors["model.layers.1.input_layernorm.weight"] *= 1.25
    elif kind == "codes of one layer":
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"].roll(1, 0)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_cannot_be_loaded_is_said(tiny: Path, made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "q"
    shutil.copytree(made["gptq"], broken)
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantlabError, match=r"label: the finished checkpoint cannot be loaded: .*layers\.3"):
        verify([Check(broken, NOTHING, "label")], ROWS, memory_limit=1000)
    with pytest.raises(QuantlabError, match="returns logits"):
        verify([Check(made["gptq"], NOTHING, "label")], ROWS, memory_limit=1000)


def test_no_process_is_left_behind(made: dict[str, Path]) -> None:
    with pytest.raises(MachineError, match="took more than"):
        verify([Check(made["gptq"], NOTHING, "q")], ROWS, seconds=0.5)
    assert not [
        p for p in psutil.Process().children(recursive=True) if "verify.worker" in " ".join(p.cmdline())
    ]


def test_nan_never_passes() -> None:
    logits = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    bad = logits.clone()
    bad[0, 0, 0] = float("nan")
    for one, other in ((logits, bad), (bad, logits)):
        _, relative, _, kl = compare(one, other)
        for how in ("streamed", "transformers"):
            for expected in (Expected(logits, logits), Expected(logits, bad), Expected(bad, bad)):
                allowed = tolerance(how, expected)
                assert not (relative <= allowed.relative and kl <= allowed.kl)
    assert compare(logits, logits + 3.0)[1] < 1e-6  # a constant is nothing to softmax


def test_solved_blocks_are_what_the_probe_follows(tiny: Path, made: dict[str, Path]) -> None:
    """Fed with a block's result in memory, the probe's states equal those through the checkpoint's own block."""
    from quantlab.models.blockwise import linears
    from quantlab.quant.grid import Grid, round_to_grid

    files = open_files(tiny)
    opened = BlockwiseModel(files, "cpu", torch.bfloat16)
    probe = ReferencePass(files, ROWS, "cpu", torch.bfloat16)
    hidden = probe.start()
    grid = Grid(3, 32, False)
    for index in range(3):
        block = opened.block(index)
        solved = {n: round_to_grid(m.weight.detach().float(), grid) for n, m in linears(block).items()}
        norm = "input_layernorm.weight"
        replaced = {norm: block.get_parameter(norm) * 2}
        before = hidden
        hidden = probe.through(index, hidden, BlockResult(solved, replaced))
        assert not torch.allclose(hidden, probe.through(index, before, BlockResult(solved)))
        opened.empty(block)
    subject = load_model(tiny, device="cpu", dtype="float32").model
    for block in subject.model.layers:
        for layer in linears(block).values():
            layer.weight.data = round_to_grid(layer.weight.detach(), grid).dequantize()
        block.input_layernorm.weight.data *= 2
    with torch.no_grad():
        expected = subject(input_ids=ROWS).logits
    assert compare(expected, probe.logits(hidden).logits)[1] < 1e-6
