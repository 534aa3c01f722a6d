"""What a layer's error costs, against the divergence that it causes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.safetensors.files import open_files
from quantlab.quant.mixed_precision.error_cost import Seen, without_correction
from quantlab.quant.mixed_precision.sensitivity import sensitivities

from ..conftest import write_tiny

ROWS = torch.randint(1, 250, (8, 48), generator=torch.Generator().manual_seed(0))


def costs(folder: Path, errors: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
    """Of the ``errors`` [out, in] of layers, by their names in the files."""
    opened = BlockwiseModel(open_files(folder), "cpu", torch.float32)
    found: dict[str, float] = {}

    @torch.no_grad()
    def watch(index: int, block: nn.Module, seen: Seen) -> None:
        prefix = f"{opened.prefix}.{index}."
        mine = {name.removeprefix(prefix): e for name, e in errors.items() if name.startswith(prefix)}
        weights = ((name, block.get_submodule(name).weight + e) for name, e in mine.items())
        found.update({prefix + name: cost for name, cost in seen.costs(block, weights, ROWS.numel()).items()})

    measured = sensitivities(opened, ROWS, seed=seed, watch=watch)
    assert measured == sensitivities(opened, ROWS, seed=seed)  # what is watched changes nothing
    return found


@torch.no_grad()
def test_it_is_the_divergence_that_the_error_causes_alone(tmp_path: Path) -> None:
    """Errors of three sizes, whose divergences lie powers of ten apart. Errors of values are alike at all tokens, and
    attention adds them up, which is not counted."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny(tmp_path / "m", dtype="float32", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    generator = torch.Generator().manual_seed(1)
    errors = {}
    for number, (name, layer) in enumerate(sorted(layers.items())):
        out_features, in_features = layer.weight.shape
        one = torch.randn(out_features, in_features, generator=generator)
        errors[name] = one * layer.weight.norm() / one.norm() * 10 ** -(1 + number % 3)
    before = model(input_ids=ROWS).logits.log_softmax(-1).double()
    divergences = []
    found = [costs(folder, errors, seed) for seed in range(4)]
    for name, layer in layers.items():
        layer.weight += errors[name]
        after = model(input_ids=ROWS).logits.log_softmax(-1).double()
        layer.weight -= errors[name]
        divergence = (before.exp() * (before - after)).sum(-1).mean().item()
        mean = sum(one[name] for one in found) / len(found)
        least = 0.2 if "v_proj" in name else 0.4
        assert least < mean / divergence < 2.5, (name, mean, divergence)
        divergences.append(divergence)
    assert max(divergences) > 1000 * min(divergences)


def test_a_conv1d_counts_the_same(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain, turned = nn.Linear(6, 4, bias=False), Conv1D(4, 6)
    turned.weight.data.copy_(plain.weight.t())
    x, gradient, error = torch.randn(1, 5, 6), torch.randn(1, 5, 4), torch.randn(4, 6)
    found = []
    for layer, weight in ((plain, plain.weight + error), (turned, turned.weight + error.t())):
        seen = Seen(1)
        seen.add("up", x, gradient)
        with torch.no_grad():
            found.append(seen.costs(nn.ModuleDict({"up": layer}), [("up", weight)], 5)["up"])
    expected = ((x @ error.t()) * gradient).sum(-1).square().sum().item() / 10
    assert found == pytest.approx([expected, expected], rel=1e-5)


def test_a_layer_that_no_token_reached_costs_nothing() -> None:
    layer = nn.Linear(3, 2)
    assert Seen(1).costs(nn.ModuleDict({"up": layer}), [("up", layer.weight + 1)], 7) == {"up": 0.0}


def test_what_was_moved_on_purpose_is_no_cost_of_rounding() -> None:
    assert without_correction(2.0, {}, 1.0) == 2.0
    assert without_correction(2.0, {"error": 4.0}, 1.0) == 0.5
    assert without_correction(2.0, {"error": 1.0}, 4.0) == 2.0
