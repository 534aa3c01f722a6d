"""Opening, merging and saving a student: what was trained is what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.distill.student import (
    linear_weight,
    merged,
    open_student,
    probe,
    save_adapted,
    save_merged,
    settle,
    trainable,
)
from quantlab.errors import DataError
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe


@pytest.fixture(scope="module")
def stored(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in three quantized formats."""
    folder = tmp_path_factory.mktemp("stored")
    jobs = [
        Job("nf4", QuantizeRecipe(method="bnb-nf4", double_quant=True), folder / "nf4"),
        Job("rtn3", QuantizeRecipe(method="rtn", bits=3, group_size=32), folder / "rtn3"),
    ]
    quantize(jobs, str(tiny), device="cpu", progress=Silent())
    return {job.name: job.out for job in jobs}


def trained(ref: Path | str, mode: str, **options: Any) -> Any:
    """A student whose adapters are far from zero, as after a long training."""
    student = open_student(str(ref), mode=mode, r=8, alpha=16, device="cpu", precision="float32", **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return student


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_merged_and_unmerged_logits_agree(tiny: Path, mode: str) -> None:
    student = trained(tiny, mode)
    before = probe(settle(student))
    plain = merged(student)
    assert not any("lora" in name or "quant" in name for name, _ in plain.named_parameters())
    assert float((probe(plain) - before).abs().max()) < 1e-3
    untouched = load_model(tiny, device="cpu", dtype="float32").model
    assert float((probe(untouched) - before).abs().max()) > 0.1  # the adapters do say something


def test_qlora_merges_into_the_weights_it_was_trained_against(tiny: Path) -> None:
    """The 4-bit values plus B A, not the original plus B A."""
    student = trained(tiny, "qlora")
    name = "model.layers.1.mlp.up_proj"
    layer = student.model.get_base_model().get_submodule(name)
    four_bit, _ = linear_weight(layer.base_layer)
    delta = layer.get_delta_weight("default")
    original = load_model(tiny, device="cpu", dtype="float32").model.get_submodule(name).weight.detach()
    assert float((four_bit - original).abs().max()) > 1e-3
    assert torch.allclose(merged(student).get_submodule(name).weight, four_bit + delta, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "rtn3"])
def test_a_quantized_checkpoint_can_be_merged_too(stored: dict[str, Path], name: str) -> None:
    student = trained(stored[name], "lora")
    before = probe(settle(student))
    assert float((probe(merged(student)) - before).abs().max()) < 2e-2 if name == "rtn3" else 1e-3


def test_the_saved_student_is_an_ordinary_model_directory(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = trained(tiny, "lora")
    before = probe(settle(student))
    save_merged(merged(student), student, tmp_path / "s", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s").eval()
    assert float((probe(loaded) - before).abs().max()) < 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "s").eos_token == "</s>"
    assert open_files(tmp_path / "s").params == open_files(tiny).params
    assert loaded.config.use_cache


@pytest.mark.parametrize("name", ["nf4", "rtn3", "plain"])
def test_an_adapter_beside_its_quantized_base_loads_as_one_model(
    stored: dict[str, Path], tiny: Path, tmp_path: Path, name: str
) -> None:
    ref = tiny if name == "plain" else stored[name]
    student = trained(ref, "qlora")
    before = probe(settle(student))
    save_adapted(student, tmp_path / "s")
    files = open_files(tmp_path / "s")
    assert files.quantized is not None
    assert files.size_bytes > (open_files(ref).size_bytes if name != "plain" else 0)
    subject = load_model(tmp_path / "s", device="cpu", dtype="float32")
    found = probe(subject.model)
    assert float((found - before).abs().max()) < 0.05 * float(before.abs().max())
    without = load_model(ref, device="cpu", dtype="float32").model
    assert float((probe(without) - before).abs().max()) > 0.1


def test_only_adapters_are_trained_and_in_float32(tiny: Path) -> None:
    for mode in ("lora", "qlora"):
        student = open_student(str(tiny), mode=mode, r=4, device="cpu")
        assert {p.dtype for p in student.model.parameters() if p.requires_grad} == {torch.float32}
        assert all("lora_" in n for n, p in student.model.named_parameters() if p.requires_grad)
    whole = open_student(str(tiny), mode="full", device="cpu")
    assert trainable(whole.model) == open_files(tiny).params


def test_the_same_seed_gives_the_same_adapters(tiny: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        student = open_student(str(tiny), mode="lora", r=4, device="cpu", seed=seed)
        return next(p for n, p in student.model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_a_quantized_model_cannot_be_trained_whole(stored: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="stored quantized"):
        open_student(str(stored["nf4"]), mode="full", device="cpu")


def test_targets_that_no_layer_has_are_refused(tiny: Path) -> None:
    with pytest.raises(DataError, match="no adapter fits"):
        open_student(str(tiny), mode="lora", targets=["nothing_proj"], device="cpu")


def test_a_layer_is_read_by_what_it_does() -> None:
    layer = nn.Linear(5, 3)
    weight, bias = linear_weight(layer)
    assert torch.equal(weight, layer.weight) and bias is not None and torch.equal(bias, layer.bias)

    class Strange(nn.Linear):
        pass

    strange = Strange(5, 3)
    weight, bias = linear_weight(strange)
    assert torch.allclose(weight, strange.weight, atol=1e-6) and bias is not None
    assert torch.allclose(bias, strange.bias, atol=1e-6)
