"""A mixture of experts: what is promised of each layout is what plain transformers really does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from quantlab.commands.defaults import settle
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.jobs import Job
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, readers
from quantlab.report.model_card import write_model_card
from tests.conftest import write_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("models") / "mixtral")


def made(mixture: Path, out: Path, **keys: Any) -> dict[str, Any]:
    recipe = QuantizeRecipe.model_validate({"method": "rtn", "bits": 4, "group_size": 32} | keys)
    recipe = settle(recipe, open_files(mixture))
    quantize([Job("x", recipe, out)], str(mixture), progress=Silent(), verify=True)
    found: dict[str, Any] = json.loads((out / "quantlab.json").read_text(encoding="utf-8"))
    return found


def card(out: Path) -> str:
    path = write_model_card(out, None)
    assert path is not None
    return path.read_text(encoding="utf-8")


def test_left_open_it_is_written_for_plain_transformers(mixture: Path, tmp_path: Path) -> None:
    record = made(mixture, tmp_path / "out")
    assert record["recipe"]["format"] == "compressed-tensors" and record["experts"]
    assert record["verification"]["how"] == "transformers" and record["verification"]["passed"]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    said = card(tmp_path / "out")
    assert (
        "Read by transformers, vLLM." in said
        and "pip install transformers accelerate compressed-tensors" in said
    )


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_asked_for_it_says_who_reads_it(mixture: Path, tmp_path: Path, format: str) -> None:
    record = made(mixture, tmp_path / "out", format=format)
    found = record["verification"]
    assert found["how"] == "separated" and found["passed"] and "from random numbers" in found["why"]
    said = card(tmp_path / "out")
    assert "NOT by transformers alone" in said and "AutoModelForCausalLM" not in said
    assert "transformers" not in readers(format, "merged").right
    assert "transformers" in readers(format).right


def test_every_layout_has_readers() -> None:
    for format in FORMATS:
        for unread in ("", "merged", "stacked"):
            found = readers(format, unread)
            assert found.right and found.install
            if not FORMATS[format].types:  # transformers does not open a GGUF file by mistake
                assert bool(found.wrong) == ("transformers" not in found.right)
