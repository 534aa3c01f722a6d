"""bitsandbytes through transformers: what is saved after an evaluation is what was saved before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantlab.models.load import keep_bnb_storage, load_model
from quantlab.models.precision import cpu_multiplies
from quantlab.progress import Silent
from quantlab.quant.methods.bnb import bnb_config
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe

from ..conftest import write_tiny


def saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_saving_after_evaluation_changes_nothing(tiny: Path, tmp_path: Path, kind: str) -> None:
    subject = load_model(tiny, device="cpu", dtype="bfloat16", quantization=bnb_config(kind))
    subject.model.save_pretrained(tmp_path / "before")
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        first = subject.model(input_ids=ids).logits
    subject.model.save_pretrained(tmp_path / "after")
    before, after = saved(tmp_path / "before"), saved(tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    subject.tokenizer.save_pretrained(tmp_path / "after")
    again = load_model(tmp_path / "after", device="cpu", dtype="bfloat16")
    with torch.no_grad():
        second = again.model(input_ids=ids).logits
    if cpu_multiplies(torch.bfloat16):
        assert torch.allclose(second, first, atol=0.05)
    # elsewhere the same sums come in an order that may differ
    assert torch.dist(second, first) < 0.03 * first.float().norm()


def test_the_guard_is_what_prevents_it(tiny: Path, tmp_path: Path) -> None:
    """Without the guard, on a CPU that has the fast path, saving after a forward pass loses the weights."""
    subject = load_model(tiny, device="cpu", dtype="bfloat16", quantization=bnb_config("bnb-nf4"))
    switches = [m for m in subject.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert switches and not any(m.support_avx512bf16_for_cpu for m in switches)
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never repacks")
    subject.model.save_pretrained(tmp_path / "before")
    for module in switches:
        module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        subject.model(input_ids=torch.arange(1, 65)[None])
    try:
        subject.model.save_pretrained(tmp_path / "after")
        before, after = saved(tmp_path / "before"), saved(tmp_path / "after")
        damaged = before.keys() != after.keys() or any(not torch.equal(before[n], after[n]) for n in before)
    except (RuntimeError, ValueError):
        damaged = True
    if not damaged:
        pytest.skip("this bitsandbytes no longer repacks in place: the guard can go")
    keep_bnb_storage(subject.model)
    assert not any(m.support_avx512bf16_for_cpu for m in switches)


@pytest.mark.parametrize("double", [False, True])
def test_pipeline_writes_loadable_checkpoints(tiny: Path, tmp_path: Path, double: bool) -> None:
    recipe = QuantizeRecipe.model_validate({"method": "bnb-nf4", "double_quant": double})
    done = quantize([Job("q", recipe, tmp_path / "q")], str(tiny), device="cpu", progress=Silent())[0]
    assert done.checkpoint is not None
    subject = load_model(done.checkpoint, device="cpu")
    config = subject.model.config.quantization_config
    assert config.bnb_4bit_use_double_quant is double and config.bnb_4bit_quant_type == "nf4"
    assert subject.params == load_model(tiny, device="cpu").params
    assert not (tmp_path / "q.partial").exists() and (tmp_path / "q" / "quantlab.json").is_file()


def test_double_quantization_is_smaller(tmp_path: Path) -> None:
    """On matrices of half a megabyte and more; below that its own tables cost more than they save."""
    wide = write_tiny(tmp_path / "wide", layers=1, hidden=512)
    sizes = []
    for double in (False, True):
        recipe = QuantizeRecipe.model_validate({"method": "bnb-nf4", "double_quant": double})
        out = tmp_path / str(double)
        quantize([Job("q", recipe, out)], str(wide), device="cpu", progress=Silent())
        sizes.append(sum(f.stat().st_size for f in out.glob("*.safetensors")))
    assert sizes[1] < sizes[0]
