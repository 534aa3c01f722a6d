"""Experts, however their files hold them: statistics are those of the tokens routed to each, checkpoints hold each
expert by itself, and a killed run ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.layers import linears
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.checkpoint_paths import state_path
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.hessian import Collector, InputHessian, fill_up
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from tests.conftest import WORDS
from tests.zoo import builder

from .test_kill import content

SHAPES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3")
IDS = torch.randint(1, 257, (3, 32), generator=torch.Generator().manual_seed(0))


def routed(module: Any, args: tuple[torch.Tensor, ...], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert of transformers' merged module multiplies: tokens [n, hidden] and what its second layer gets
    [n, width], by a plain loop over the module's own parameters."""
    down = module.down_proj[expert]
    if len(args) == 1:  # Llama 4: every token once for each expert, zeros where it is not routed there
        tokens = args[0].view(module.num_experts, -1, args[0].shape[-1])[expert]
        tokens = tokens[tokens.abs().sum(dim=-1) > 0]
    else:
        tokens = args[0][(args[1] == expert).any(dim=-1)]
    inner = module.gate_up_proj[expert]
    transposed = inner.shape[0] == tokens.shape[-1] and down.shape[1] == tokens.shape[-1] and len(args) != 0
    transposed = transposed and (getattr(module, "is_transposed", False) or len(args) == 1)
    both = tokens @ inner if transposed else tokens @ inner.t()
    if hasattr(module, "gate_up_proj_bias"):
        both = both + module.gate_up_proj_bias[expert]
    if hasattr(module, "_apply_gate"):
        return tokens, module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return tokens, module.act_fn(gate) * up


@pytest.mark.parametrize("name", SHAPES)
def test_statistics_are_those_of_the_tokens_routed_to_each_expert(saved: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    opened = BlockwiseModel(open_files(saved(name)), "cpu", torch.float32)
    hidden, calls = opened.inputs(IDS)
    index = len(opened.blocks) - 1
    model = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32).eval()
    theirs = model.get_submodule(f"{opened.prefix}.{index}")
    (path,) = [n for n, m in theirs.named_modules() if n.split(".")[-1] == "experts"]
    merged: Any = theirs.get_submodule(path)
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = merged.register_forward_pre_hook(
        lambda m, args, keys: seen.append((*args, *(v for v in keys.values()))), with_kwargs=True
    )
    block = opened.block(index)
    collector = Collector(linears(block))
    with torch.no_grad(), collector:
        for row in range(len(IDS)):
            run_block(block, hidden[row : row + 1], calls[index], rows=slice(row, row + 1))
            collector.next_batch()
            run_block(theirs, hidden[row : row + 1], calls[index], rows=slice(row, row + 1))
    handle.remove()
    found = {layer: m for m in collector.finish() for layer in m.layers}
    count = len(block.get_submodule(path))  # type: ignore[arg-type]
    roles = block.get_submodule(path)[0].roles  # type: ignore[index]
    for expert in range(count):
        with torch.no_grad():
            parts = [routed(merged, args, expert) for args in seen]
        for which, role in ((0, roles[0]), (1, roles[-1])):
            x = torch.cat([part[which] for part in parts])
            mine = found[f"{path}.{expert}.{role}"]
            assert mine.tokens == len(x)
            if len(x):
                torch.testing.assert_close(mine.hessian, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(mine.magnitude, x.abs().mean(dim=0), rtol=1e-4, atol=1e-5)
    assert sum(found[f"{path}.{e}.{roles[0]}"].tokens for e in range(count)) >= IDS.numel()


def moment(layer: str, tokens: int, size: int = 4) -> InputHessian:
    x = torch.randn(max(tokens, 1), size, generator=torch.Generator().manual_seed(tokens))
    found = InputHessian.empty(layer, size)
    if tokens:
        found.add(x)
    return found.finish()


def test_experts_with_few_tokens_are_filled_up_from_their_kin() -> None:
    names = [f"mlp.experts.{e}.{part}" for part in ("w1", "w2") for e in range(3)]
    moments = [moment(name, tokens) for name, tokens in zip(names, (8, 2, 0, 8, 8, 8), strict=True)]
    moments.append(moment("mlp.shared.w1", 1))  # no expert: left alone
    before = [(m.hessian.clone(), m.magnitude.clone(), m.tokens) for m in moments]
    starved = fill_up(moments)
    assert starved == {"mlp.experts.1.w1": 2, "mlp.experts.2.w1": 0}
    mean = (8 * before[0][0] + 2 * before[1][0]) / 10
    torch.testing.assert_close(moments[1].hessian, (2 * before[1][0] + 2 * mean) / 4)
    torch.testing.assert_close(moments[2].hessian, mean)
    torch.testing.assert_close(moments[2].magnitude, (8 * before[0][1] + 2 * before[1][1]) / 10)
    for number in (0, 3, 4, 5, 6):
        assert torch.equal(moments[number].hessian, before[number][0])
    assert fill_up([moment("mlp.experts.0.w1", 0), moment("mlp.experts.1.w1", 0)]) == {}  # nobody saw any


def recipe(text: Path, **keys: Any) -> QuantizeRecipe:
    calibration = {"source": str(text), "rows": 6, "seq_len": 48}
    asked = {"method": "gptq", "bits": 4, "group_size": 32, "format": "compressed-tensors"}
    return QuantizeRecipe.model_validate(asked | {"calibration": calibration} | keys)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join(WORDS.split() * 40), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_hold_each_expert_by_itself(saved: Any, text: Path, tmp_path: Path, name: str) -> None:
    """Named in the recipe, compressed-tensors holds every expert; the run's own verification reads it back, by plain
    transformers where that can. Routers, gates and biases are what they were, byte for byte."""
    files = open_files(saved(name))
    quantize([Job("q", recipe(text), tmp_path / "q")], files, device="cpu", progress=Silent(), verify=True)
    made = open_files(tmp_path / "q")
    record = json.loads((tmp_path / "q" / "quantlab.json").read_text(encoding="utf-8"))
    assert record["verification"]["passed"]
    assert record["verification"]["how"] == ("separated" if name == "gpt_oss" else "transformers")
    assert record["experts_unread"] == ("stacked" if name == "gpt_oss" else "")
    assert made.size_bytes == checkpoint_bytes(recipe(text), files)
    packed = [n for n in made.tensors if n.endswith("weight_packed") and ".experts." in n]
    assert len({n.partition(".experts.")[2].partition(".")[0] for n in packed}) == builder.EXPERTS
    assert not [n for n in made.tensors if n.endswith(("gate_up_proj", "experts.down_proj"))]
    original = load_model(saved(name), device="cpu", dtype="float32").model.state_dict()
    subject = load_model(tmp_path / "q", device="cpu", dtype="float32").model.state_dict()
    routers = [n for n in original if "router" in n or ".gate.weight" in n or "correction_bias" in n]
    assert routers
    for router in routers:
        torch.testing.assert_close(subject[router], original[router].to(torch.float16).float())


def test_ignored_experts_stay_in_their_tensor(saved: Any, text: Path, tmp_path: Path) -> None:
    files = open_files(saved("gpt_oss"))
    one = recipe(text, format="gptq", ignore=[r"re:\.experts\.\d+\."])
    quantize([Job("q", one, tmp_path / "q")], files, device="cpu", progress=Silent(), verify=True)
    made = open_files(tmp_path / "q")
    assert {n for n in files.tensors if "experts" in n} == {n for n in made.tensors if "experts" in n}
    assert made.size_bytes == checkpoint_bytes(one, files)
    record = json.loads((tmp_path / "q" / "quantlab.json").read_text(encoding="utf-8"))
    assert record["verification"]["how"] == "transformers" and record["verification"]["passed"]


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_killed_and_resumed_it_ends_in_the_same_bytes(
    saved: Any, text: Path, tmp_path: Path, name: str
) -> None:
    """With one block done and the activations in files; the resumed run propagates what the block on disk holds."""
    keys = {"source": str(text), "rows": "6", "seq_len": "48"}
    sets = [part for key, value in keys.items() for part in ("--set", f"calibration.{key}={value}")]
    sets += ["--set", "group_size=32", "--set", "format=compressed-tensors", "--set", "static_groups=true"]
    sets += ["--set", "propagate=quantized", "--no-eval", "--no-verify", "--memory-limit", "2G"]
    command = [sys.executable, "-m", "quantlab", "quantize", "gptq-int4", "--model", str(saved(name)), *sets]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, "--out", str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    first = cut.with_name("cut.partial") / "model-00001-of-00003.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert state_path(cut).exists()
    subprocess.run([*command, "--out", str(cut), "--resume"], check=True, capture_output=True)
    assert content(cut) == content(whole)


def test_no_block_but_one_is_in_memory(saved: Any) -> None:
    """Experts that are one tensor are read one by one, and only those of the block at hand."""
    opened = BlockwiseModel(open_files(saved("gpt_oss")), "cpu", torch.float32)
    block = opened.block(1)
    assert all(p.device.type == "cpu" for p in block.parameters())
    assert all(p.device.type == "meta" for p in opened.blocks[0].parameters())
    layer = block.get_submodule("mlp.experts.2.up_proj")
    stored = open_files(saved("gpt_oss")).tensors["model.layers.1.mlp.experts.gate_up_proj"]
    from quantlab.models.safetensors.tensors import read_tensor

    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, read_tensor(stored)[2].t()[1::2].float())
    opened.empty(block)
    assert all(p.device.type == "meta" for p in opened.model.parameters())


def test_under_a_memory_limit_few_kernels_are_kept(saved: Any, tmp_path: Path) -> None:
    """Routed tokens come in another number each time; see `keep_few_kernels`. What the user has set stays."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from quantlab.progress import Silent; from quantlab.quant.pipeline import Job, quantize\n"
        "from quantlab.recipe.quantize import QuantizeRecipe\n"
        "quantize([Job('q', QuantizeRecipe(method='rtn', group_size=32), Path(sys.argv[2]))], sys.argv[1],\n"
        "    device='cpu', progress=Silent(), memory_limit=2**31)\n"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])\n"
    )
    for number, (given, wanted) in enumerate([({}, "8"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "99"}, "99")]):
        arguments = [sys.executable, "-c", code, str(saved("mixtral")), str(tmp_path / str(number))]
        done = subprocess.run(arguments, env=os.environ | given, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [wanted]
