"""Divergence between two models: against the definition, and at its edges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.errors import DataError, RecipeError
from quantlab.evals.kl_divergence import compare_logits, evaluate, percentile
from quantlab.models.load import LoadedModel
from quantlab.progress import Silent
from quantlab.registry.tasks import FidelityOptions

STORY = "Once upon a time there was a little girl named Lily. She liked to play outside in the sun. " * 20


@pytest.fixture
def options(tmp_path: Path) -> FidelityOptions:
    (tmp_path / "t.txt").write_text(STORY)
    return FidelityOptions(source=str(tmp_path / "t.txt"), seq_len=32)


def test_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 5, 11, generator=generator), torch.randn(3, 5, 11, generator=generator)
    divergence, same = compare_logits(left, right)
    p, q = left.double().softmax(-1), right.double().softmax(-1)
    assert torch.allclose(divergence.double(), (p * (p / q).log()).sum(-1), atol=1e-6)
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))
    assert compare_logits(left, left)[0].abs().max() == 0


def test_a_token_the_original_rules_out_adds_nothing() -> None:
    left = torch.tensor([[0.0, 0.0, -torch.inf]])
    divergence, _ = compare_logits(left, torch.tensor([[0.0, 0.0, 0.0]]))
    assert divergence.item() == pytest.approx(torch.log(torch.tensor(1.5)).item())
    same, _ = compare_logits(left, left)
    assert same.item() == 0


def test_a_model_against_itself_and_against_a_damaged_copy(tiny: Any, options: FidelityOptions) -> None:
    itself = evaluate(tiny, options, baseline=tiny, progress=Silent()).metrics
    assert itself["kl_mean"] == itself["kl_p99"] == 0.0
    assert itself["top1_agreement"] == 1.0
    last = {"kl_mean": 0.0}
    for noise in (0.002, 0.02):
        damaged = copy.copy(tiny)
        damaged.model = copy.deepcopy(tiny.model)
        torch.manual_seed(0)
        for weight in damaged.model.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=noise)
        found = evaluate(damaged, options, baseline=tiny, progress=Silent()).metrics
        assert last["kl_mean"] < found["kl_mean"] < found["kl_p99"] <= found["kl_max"]
        assert found["top1_agreement"] < 1.0
        last = found


def test_refusals(tiny: Any, options: FidelityOptions) -> None:
    with pytest.raises(RecipeError, match="needs the original"):
        evaluate(tiny, options, progress=Silent())
    stranger = LoadedModel(tiny.model, _Renamed(), "cpu", "stranger", Path("x"), 1, 1)
    with pytest.raises(DataError, match="do not share a tokenizer"):
        evaluate(tiny, options, baseline=stranger, progress=Silent())


class _Renamed:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"token {index}" for index in ids]


def test_percentile_is_nearest_rank() -> None:
    values = torch.arange(1.0, 201.0).flip(0)
    assert percentile(values, 0.99) == 198.0
    assert percentile(values[:1], 0.99) == 200.0
