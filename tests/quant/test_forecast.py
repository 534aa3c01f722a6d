"""Forecasts against what is really written, and their shape: more bits, rows or recipes cost more, sharing costs
less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.commands.plan import Options, lines, plan
from quantlab.errors import DataError, RecipeError
from quantlab.formats import format_module
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.estimate.forecast import MachineSpeed, forecast, together
from quantlab.quant.grid import Grid, round_to_grid
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, Linear

from ..conftest import write_tiny

RATES = MachineSpeed(matmul=1e11, exact=1e11, elements=1e9, disk=1e9)
TYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def recipe(method: str, source: Path | str = "", **keys: Any) -> QuantizeRecipe:
    if method in ("gptq", "awq"):
        keys.setdefault("calibration", {"source": str(source), "rows": 8, "seq_len": 32})
    return QuantizeRecipe.model_validate({"method": method, **keys})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("gptq", {"bits": 4, "group_size": 32, "act_order": True}), ("gptq", {"bits": 3, "group_size": 128}),
        ("gptq", {"bits": 8, "group_size": -1}), ("awq", {"bits": 4, "group_size": 64}), ("rtn", {"bits": 2}),
        ("rtn", {"bits": 4, "group_size": 32, "format": "compressed-tensors"}), ("fp8", {}),
    ],
)  # fmt: skip
def test_the_size_is_the_written_size(
    calibration_file: Path, tmp_path: Path, method: str, keys: dict[str, Any], tied: bool
) -> None:
    """To the byte, also from a float32 model, whose plain tensors become float16."""
    model = write_tiny(tmp_path / "model", tie=tied, dtype="float32" if tied else "bfloat16")
    one = recipe(method, calibration_file, **keys)
    quantize([Job("q", one, tmp_path / "q")], str(model), device="cpu", progress=Silent(), verify=False)
    written = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert checkpoint_bytes(one, open_files(model)) == written


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4"])
def test_the_size_through_bitsandbytes(tiny: Path, tmp_path: Path, method: str) -> None:
    for double in (False, True) if method == "bnb-nf4" else (False,):
        one = recipe(method, **({"double_quant": double} if double else {}))
        out = tmp_path / f"q{double}"
        quantize([Job("q", one, out)], str(tiny), device="cpu", progress=Silent(), verify=False)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert checkpoint_bytes(one, open_files(tiny)) == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_entries_are_those_of_the_layouts(name: str, bits: int, group_size: int) -> None:
    if name == "awq" and bits != 4:
        pytest.skip("the layout has 4 bits only")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    q = round_to_grid(weight, Grid(bits, group_size, True, FORMATS[name].zero_min))
    packed = format_module(name).pack(
        q.codes, q.scales, q.zeros, q.group_of, bits=bits, group_size=group_size, symmetric=True
    )
    entries = FORMATS[name].tensors(Linear(64, 96, bits, 1 if group_size == -1 else 96 // group_size, "BF16"))
    assert entries.keys() == packed.keys()
    for key, (dtype, shape) in entries.items():
        assert tuple(packed[key].shape) == shape
        if key != "weight_scale":  # stored in the model's type, whatever it is packed in
            assert packed[key].dtype == TYPES[dtype]


def test_more_costs_more(tiny: Path) -> None:
    files = open_files(tiny)

    def of(method: str = "gptq", **keys: Any) -> Any:
        return forecast(recipe(method, "x", **{"group_size": 32, **keys}), files, RATES)

    assert of(bits=3).size_bytes < of(bits=4).size_bytes < of(bits=8).size_bytes < files.size_bytes
    assert of(group_size=128).size_bytes < of(group_size=32).size_bytes
    longer = {"calibration": {"source": "x", "rows": 64, "seq_len": 128}}
    assert of(**longer).seconds > of().seconds and of(**longer).memory_bytes > of().memory_bytes
    assert of(propagate="quantized").seconds > of().seconds
    assert of(propagate="corrected").seconds > of().seconds
    assert of(propagate="corrected").memory_bytes > of().memory_bytes
    assert of("rtn").seconds < of().seconds < of("awq").seconds
    spilled = forecast(recipe("gptq", "x", group_size=32, **longer), files, RATES, spilled=True)
    kept = of(**longer)
    activations = 64 * 128 * 128 * 2
    assert spilled.memory_bytes == kept.memory_bytes - activations
    assert spilled.disk_bytes == kept.disk_bytes + 2 * activations
    auto = {"bits": "auto", "format": "compressed-tensors"}
    sizes = [of(**auto, target_bits=t).size_bytes for t in (2.0, 3.0, 3.5, 8.0)]
    assert sizes == sorted(sizes)
    exact = of(bits=3, format="compressed-tensors").size_bytes
    assert sizes[1] == pytest.approx(exact, rel=0.002)
    none = forecast(recipe("none"), files, RATES)
    assert (none.size_bytes, none.seconds, none.disk_bytes) == (files.size_bytes, 0.0, 0)


def test_sharing_is_cheaper_and_adds_up(tiny: Path) -> None:
    files = open_files(tiny)
    recipes = [recipe("gptq", "x", bits=b, group_size=32) for b in (3, 4, 8)]
    found, seconds = together(recipes, files, RATES)
    alone = [forecast(r, files, RATES).seconds for r in recipes]
    assert max(alone) < seconds < sum(alone) and seconds == pytest.approx(sum(f.seconds for f in found))
    forwards = forecast(recipes[0], files, RATES).parts["forwards"]
    assert sum(f.parts["forwards"] for f in found) == pytest.approx(forwards)
    faster = MachineSpeed(*(2 * rate for rate in vars(RATES).values()))
    assert together(recipes, files, faster)[1] == pytest.approx(seconds / 2)


def test_the_forwards_are_counted_right(tiny: Path) -> None:
    """Against the count by hand for the tiny Llama: 128 wide, 2 of 4 heads for keys, 256 in the feed-forward, 3
    blocks."""
    block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256
    tokens = 8 * 32
    expected = 3 * (2 * block + 4 * 32 * 128) * tokens
    parts = forecast(recipe("gptq", "x", group_size=32), open_files(tiny), RATES).parts
    assert parts["forwards"] == pytest.approx(expected / RATES.matmul)
    inputs = 3 * 128**2 + 256**2  # q k v, o, gate up; down
    assert parts["second moments"] == pytest.approx(3 * inputs * tokens / RATES.exact)


def test_plan_says_it_in_lines_and_refuses_early(tiny: Path, tmp_path: Path) -> None:
    recipes = [("a", recipe("rtn", group_size=32)), ("b", recipe("none"))]
    summary = plan(recipes, Options(str(tiny), tmp_path / "not" / "there", device="cpu"), RATES)
    assert [row["recipe"] for row in summary["recipes"]] == ["a", "b"]
    text = lines(json.loads(json.dumps(summary)))
    assert text[0].startswith("recipe") and text[1].startswith("a ") and "enough" in text[-1]
    with pytest.raises(RecipeError, match="does not fit"):
        plan(
            [("a", recipe("rtn", group_size=64))], Options(str(write_tiny(tmp_path / "m", hidden=96))), RATES
        )
    with pytest.raises(DataError):
        plan(recipes, Options(str(tmp_path / "nowhere")), RATES)
