"""Layers that aim at the original's output on what quantized layers before them give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.calibration import read_texts, token_rows
from quantlab.errors import RecipeError
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import open_files
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.progress import Silent
from quantlab.quant.drift import Drift, KeptInputs, inputs_of, is_expert, rows_paired, stages, widest
from quantlab.quant.hessian import InputHessian
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.load import parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from tests.zoo.builder import write


def pairs(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    seeded = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, size, generator=seeded) @ torch.randn(size, size, generator=seeded)
    return x, x + 0.2 * torch.randn(tokens, size, generator=seeded)


@pytest.mark.parametrize("damp", [1e-6, 0.01, 1.0])
def test_the_target_is_the_ridge_regression_on_the_pairs(damp: float) -> None:
    before, after = pairs(500, 12)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    drift = Drift.empty(12)
    for rows in (slice(0, 300), slice(300, 500)):
        drift.add(before[rows], after[rows])
    # min |W' x' - W x|^2 + l |W' - W|^2, as least squares over stacked rows
    ridge = (damp * after.double().square().sum(dim=0).mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    left = torch.cat([after.double(), ridge])
    right = torch.cat([before.double() @ weight.double().t(), ridge @ weight.double().t()])
    truth = torch.linalg.lstsq(left, right).solution.t()
    assert torch.allclose(drift.target(weight, damp).double(), truth, rtol=1e-3, atol=1e-4)


def test_nothing_drifted_and_nothing_seen_leave_the_weight_as_it_is() -> None:
    weight = torch.randn(5, 12).to(torch.bfloat16)
    assert torch.equal(Drift.empty(12).target(weight), weight.float())
    drift = Drift.empty(12)
    drift.add(pairs(50, 12)[0], pairs(50, 12)[0])
    assert torch.equal(drift.target(weight), weight.float())
    drift.own[0, 0] = float("inf")
    assert torch.equal(drift.target(weight), weight.float())


def test_stages_are_inputs_in_order_and_experts_of_one_kind_together() -> None:
    names = [
        ["attn.q", "attn.k"],
        ["attn.o"],
        ["mlp.experts.0.up"],
        ["mlp.experts.0.down"],
        ["mlp.experts.1.up"],
    ]
    found = stages([InputHessian(one, torch.zeros(1, 1), torch.zeros(1)) for one in names])
    assert [[m.layers[0] for m in stage] for stage in found] == [
        ["attn.q"], ["attn.o"], ["mlp.experts.0.up", "mlp.experts.1.up"], ["mlp.experts.0.down"],
    ]  # fmt: skip
    assert is_expert("experts.3.w1") and not is_expert("mlp.shared_experts.up")
    assert widest({"attn.q": (8, 4), "mlp.experts.0.up": (8, 64)}) == 4
    assert [rows_paired(n, 512, 576) for n in (1, 32, 128, 130)] == [1, 9, 32, 33]
    assert rows_paired(128, 512, 14336) == 128


def test_inputs_are_kept_and_caught_alike() -> None:
    first, second = nn.Linear(4, 6), nn.Linear(6, 3)
    hidden = torch.randn(5, 7, 4)  # rows of seven tokens
    ran: list[int] = []

    def run(rows: slice) -> None:
        second(first(hidden[rows]))
        ran.append(1)

    layers = {"first": first, "second": second}
    kept = KeptInputs(rows=3, tokens=7)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        seen = inputs_of(lambda rows=rows: run(rows), layers)  # type: ignore[misc]
        assert seen["first"].shape == (7 * (rows.stop - rows.start), 4)
        kept.keep(seen | {"experts.0.up": seen["first"]}, rows)
    assert not ran  # the last one's input is known before it is computed with
    for part in (slice(0, 1), slice(1, 3)):
        found = kept.of(layers, part)
        assert torch.equal(found["first"], hidden[part].flatten(0, 1))
        assert torch.equal(found["second"], first(hidden[part]).flatten(0, 1))
    assert not kept.of({"experts.0.up": first}, slice(0, 1))


def recipe(**keys: Any) -> QuantizeRecipe:
    found = {"method": "gptq", "bits": 3, "group_size": 32, "evaluate": []} | keys
    return QuantizeRecipe(**{key: value for key, value in found.items() if value is not None})


GGUF = {"format": "gguf", "type": "Q3_K", "bits": None, "group_size": None}


@pytest.mark.parametrize(("name", "keys"), [("llama", {}), ("gpt2", {}), ("olmo2", {}), ("llama", GGUF)])
def test_the_model_comes_closer_to_the_original(
    tmp_path: Path, calibration_file: Path, name: str, keys: dict[str, Any]
) -> None:
    from tests.conftest import byte_tokenizer

    write(tmp_path / "m", name, byte_tokenizer())
    calibration = {"source": str(calibration_file), "rows": 16, "seq_len": 32, "seed": 0}
    jobs = [
        Job(way, recipe(propagate=way, calibration=calibration, **keys), tmp_path / way)
        for way in ("original", "corrected")
    ]
    for outcome in quantize(jobs, str(tmp_path / "m"), device="cpu", progress=Silent()):
        assert outcome.checkpoint is not None
    ids = token_rows(read_texts(str(calibration_file)), byte_tokenizer(), rows=16, seq_len=32, seed=0)
    with torch.no_grad():
        logits = {
            way: load_model(tmp_path / way, device="cpu", dtype="float32").model(input_ids=ids).logits
            for way in ("m", "original", "corrected")
        }
    error = {way: float((logits[way] - logits["m"]).norm()) for way in logits}
    # Little adds up over two blocks; in a GPT-2, whose random blocks change little, least.
    assert 0 < error["corrected"] < (1.05 if name == "gpt2" else 1) * error["original"], error


def test_inputs_that_are_the_hidden_states_are_kept_before_these_move_on(
    tmp_path: Path, calibration_file: Path
) -> None:
    """In an OLMo 2 no norm lies before q, k and v: what they get is overwritten by what the block gives."""
    from tests.conftest import byte_tokenizer

    write(tmp_path / "m", "olmo2", byte_tokenizer())
    calibration = {"source": str(calibration_file), "rows": 16, "seq_len": 32, "seed": 0}
    losses = {}
    for limit in (None, 2**31):  # with a limit the originals' inputs are computed again
        job = Job("q", recipe(propagate="corrected", calibration=calibration), tmp_path / str(limit))
        (found,) = quantize([job], str(tmp_path / "m"), device="cpu", progress=Silent(), memory_limit=limit)
        losses[limit] = found.loss
    assert losses[None] == pytest.approx(losses[2**31], rel=0.1)


def test_experts_are_solved_without_pairs(tmp_path: Path, calibration_file: Path) -> None:
    """Where tokens go is decided anew in the quantized model; attention still makes up for what was lost before it."""
    from tests.conftest import byte_tokenizer

    write(tmp_path / "m", "mixtral", byte_tokenizer())
    calibration = {"source": str(calibration_file), "rows": 16, "seq_len": 32, "seed": 0}
    ways = ("original", "corrected")
    jobs = [Job(w, recipe(propagate=w, calibration=calibration), tmp_path / w) for w in ways]
    quantize(jobs, str(tmp_path / "m"), device="cpu", progress=Silent())
    one, other = (open_files(tmp_path / way).tensors for way in ways)
    same = {n for n in one if torch.equal(read_tensor(one[n]), read_tensor(other[n]))}
    assert one.keys() == other.keys() and {n for n in one if ".experts." in n} <= same
    assert "model.layers.0.self_attn.q_proj.qweight" in same  # nothing lies before it
    assert not {n for n in same if "layers.1.self_attn" in n and n.endswith("qweight")}


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("{kind: quantize, method: awq, propagate: corrected}", "awq looks at all layers of a block at once"),
        (
            "{kind: quantize, method: gptq, bits: auto, target_bits: 3.5, propagate: corrected}",
            "fit those of one",
        ),
    ],
)
def test_what_cannot_be_corrected(recipe: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        parse_recipe(recipe)
