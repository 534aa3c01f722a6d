"""Every architecture of the table: planned and described without reading a weight, quantized, and read back right by
plain transformers; on a GPU as far as that can be told without one; by bitsandbytes for real or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.commands.doctor_model import examine as doctor
from quantlab.commands.doctor_model import lines as doctor_lines
from quantlab.commands.plan import Options, plan
from quantlab.errors import DataError
from quantlab.models import blockwise, finite
from quantlab.models.safetensors import tensors
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.estimate.forecast import MachineSpeed
from quantlab.quant.jobs import selection
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from tests.zoo import builder
from tests.zoo.sweep import examine
from tests.zoo.table import FEW, MANY, Expected

SPEED = MachineSpeed(1e11, 1e11, 1e9, 1e9)


def holds(name: str, expected: Expected, folder: Path) -> None:
    found = examine(name, folder, widths=(8,), methods=("rtn", "gptq"))
    assert found["verdict"] == "right", found
    assert found["formats"]["gptq-8"] == expected.format
    assert len(found["kept"]) == len(expected.kept), found["kept"]
    for part in expected.kept:
        assert any(part in why for why in found["kept"]), found["kept"]


@pytest.mark.parametrize("name", FEW)
def test_few(tmp_path: Path, name: str) -> None:
    holds(name, FEW[name], tmp_path)


@pytest.mark.parametrize("name", MANY)
def test_many(tmp_path: Path, name: str) -> None:
    holds(name, MANY[name], tmp_path)


def test_the_table_is_large_enough() -> None:
    assert len(FEW) >= 12 and len(FEW) + len(MANY) >= 60 and not FEW.keys() & MANY.keys()


@pytest.mark.parametrize("name", FEW)
def test_doctor_and_plan_read_no_weight(saved: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def read(*args: Any, **keys: Any) -> Any:
        raise AssertionError("a weight was read")

    path = str(saved(name))
    for module in (tensors, blockwise, finite):
        for function in ("read_tensor", "read_exactly"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, read)
    found = doctor(path)
    recipes = [(m, QuantizeRecipe.model_validate({"method": m, "bits": 4})) for m in ("rtn", "gptq", "awq")]
    planned = plan(recipes, Options(path, device="cpu"), SPEED)
    assert found["layers"] and any(one["share"] for one in found["formats"].values())
    assert doctor_lines(found)[0].startswith(path)
    assert all(row["layers"][0].split()[1:4] == ["layers", "are", "quantized"] for row in planned["recipes"])
    assert all(row["size_bytes"] < planned["model_bytes"] for row in planned["recipes"])


@pytest.mark.parametrize("name", FEW)
def test_bitsandbytes_quantizes_for_real_or_not_at_all(saved: Any, tmp_path: Path, name: str) -> None:
    """What the selection counts as quantized is what the library packed."""
    files, recipe = open_files(saved(name)), QuantizeRecipe(method="bnb-nf4")
    try:
        chosen = selection(recipe, files)
    except DataError as error:
        assert "would leave the experts" in str(error)
        with pytest.raises(DataError, match="would leave the experts"):
            quantize([Job("q", recipe, tmp_path / "q")], files, device="cpu", progress=Silent())
        return
    assert name not in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
    quantize([Job("q", recipe, tmp_path / "q")], files, device="cpu", progress=Silent())
    packed = {
        name.removesuffix(".weight.absmax")
        for name in open_files(tmp_path / "q").tensors
        if name.endswith(".absmax") and name.startswith(files.block_prefix + ".")
    }
    assert packed == set(chosen.widths)


def test_a_model_is_shrunk_or_refused() -> None:
    with pytest.raises(ValueError, match="is not tiny"):
        builder.build("gemma3")
    model = builder.build("llama")
    assert sum(p.numel() for p in model.parameters()) < builder.LARGEST
    assert torch.equal(builder.build("llama").lm_head.weight, model.lm_head.weight)
