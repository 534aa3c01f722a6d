"""What must hold on a GPU: the same checkpoints as on the CPU, up to ties in rounding. Skipped without CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.quant.grid import Grid, layer_loss
from quantlab.quant.methods.gptq import solve_gptq
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from tests.device_cases import ALLOWED, REFUSED

READERS = {"fp8": ("compressed_tensors",), "bnb-nf4": ("bitsandbytes",), "bnb-int8": ("bitsandbytes",)}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_solver_agrees_with_the_cpu() -> None:
    seeded = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 512, generator=seeded), torch.randn(4096, 512, generator=seeded)
    hessian, grid = x.t() @ x / len(x), Grid(4, 128, True)
    cpu = solve_gptq(weight, hessian, grid)
    cuda = solve_gptq(weight.cuda(), hessian.cuda(), grid)
    assert (cpu.codes != cuda.codes.cpu()).float().mean() < 0.02
    losses = [layer_loss(weight, q, hessian).item() for q in (cpu.dequantize(), cuda.dequantize().cpu())]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("name", REFUSED)
def test_cuda_refuses_what_the_tests_without_it_take_for_refused(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](lambda tensor: tensor.cuda())


@pytest.mark.parametrize("name", ALLOWED)
def test_cuda_runs_what_the_tests_without_it_take_for_allowed(name: str) -> None:
    ALLOWED[name](lambda tensor: tensor.cuda())


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("rtn", {"group_size": 32}),
        ("gptq", {"group_size": 32}),
        ("gptq", {"group_size": 32, "propagate": "quantized", "act_order": True}),
        ("awq", {"group_size": 32}),
        ("fp8", {}),
        ("bnb-nf4", {}),
        ("bnb-int8", {}),
    ],
)
def test_pipeline(
    tiny: Path, calibration_file: Path, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    for reader in READERS.get(method, ("gptqmodel", "optimum")):
        pytest.importorskip(reader)
    content: dict[str, Any] = {"method": method, **keys}
    if method in ("gptq", "awq"):
        content["calibration"] = {"source": str(calibration_file), "rows": 16, "seq_len": 64}
    recipe = QuantizeRecipe.model_validate(content)
    done = quantize([Job("q", recipe, tmp_path / "q")], str(tiny), device="cuda", progress=Silent())[0]
    assert done.checkpoint is not None
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        original = load_model(tiny, device="cpu", dtype="float32").model(input_ids=ids).logits
        got = load_model(done.checkpoint, device="cuda").model(input_ids=ids.cuda()).logits.float().cpu()
    assert (got - original).norm() / original.norm() < 0.5
