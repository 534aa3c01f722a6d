"""LoRA over quantized layers: the gradients are those of the same adapters over the dequantized weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.formats import gptq
from quantlab.models.load import keep_bnb_storage, load_model
from quantlab.progress import Silent
from quantlab.quant.grid import Quantized
from quantlab.quant.methods.bnb import bnb_config
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 65)[None]


def with_adapters(model: Any) -> Any:
    """LoRA on every linear, the same random A and B for models of the same shapes (B not zero: A's gradient counts)."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=LINEARS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapted.train()


def gradient(model: Any) -> torch.Tensor:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in sorted(model.named_parameters()) if "lora_" in n])


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(left.double(), right.double(), dim=0))


def evaluated(model: Any) -> Any:
    """What the trainer does in the middle of a training."""
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    return model.train()


def plain_copy(tiny: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> Any:
    """The original in float32, with the matrices of its blocks replaced."""
    model = load_model(tiny, device="cpu", dtype="float32").model
    for name, weight in weights:
        module = model.get_submodule(name)
        assert not torch.equal(module.weight, weight)  # quantization did change it
        module.weight.data = weight.clone()
    return model


def bnb_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes.functional import dequantize_4bit

    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            yield name, dequantize_4bit(module.weight.data, module.weight.quant_state).float()


@pytest.fixture(scope="module", params=[False, True], ids=["nf4", "nf4-dq"])
def nf4(tiny: Path, request: pytest.FixtureRequest) -> tuple[Any, torch.Tensor]:
    """A model in NF4 without adapters, and the gradient of adapters over its dequantized copy."""
    config = bnb_config("bnb-nf4", double_quant=request.param, compute_dtype=torch.float32)
    model = load_model(tiny, device="cpu", dtype="float32", quantization=config).model
    return model, gradient(with_adapters(plain_copy(tiny, bnb_weights(model))))


def test_nf4_before_and_after_an_evaluation(nf4: tuple[Any, torch.Tensor]) -> None:
    model, expected = nf4
    adapted = with_adapters(copy.deepcopy(model))
    keep_bnb_storage(adapted)  # what load_model has done already; copies carry it or not
    assert cosine(gradient(adapted), expected) > 0.999
    assert cosine(gradient(evaluated(adapted)), expected) > 0.999


def test_without_the_guard_an_evaluation_spoils_them(nf4: tuple[Any, torch.Tensor]) -> None:
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never repacks")
    model, expected = nf4
    adapted = with_adapters(copy.deepcopy(model))
    for module in adapted.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    assert cosine(gradient(adapted), expected) > 0.999
    try:
        spoiled = cosine(gradient(evaluated(adapted)), expected)
    except RuntimeError:
        return  # refusing is as good as telling
    if spoiled > 0.999:
        pytest.skip("this bitsandbytes no longer repacks in place: the guard can go")
    assert spoiled < 0.9


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True)])
def test_gptq_layout_before_and_after_an_evaluation(
    tiny: Path, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    from safetensors.torch import load_file

    recipe = QuantizeRecipe.model_validate(
        {"method": "rtn", "bits": bits, "group_size": 32, "symmetric": symmetric}
    )
    quantize([Job("q", recipe, tmp_path / "q")], str(tiny), device="cpu", progress=Silent())
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "q").glob("*.safetensors"):
        stored |= load_file(file)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
            parts = {suffix: stored[f"{name}.{suffix}"] for suffix in FORMATS["gptq"].suffixes}
            yield name, Quantized(*gptq.unpack(parts, bits=bits, group_size=32), bits).dequantize()

    expected = gradient(with_adapters(plain_copy(tiny, weights())))
    # By name: peft's "all-linear" does not know gptqmodel's layers.
    adapted = with_adapters(load_model(tmp_path / "q", device="cpu").model)
    assert cosine(gradient(adapted), expected) > 0.999  # the kernels compute in bfloat16
    assert cosine(gradient(evaluated(adapted)), expected) > 0.999
