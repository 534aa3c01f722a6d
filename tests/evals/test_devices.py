"""Measurements with a model that says it is on a GPU: nothing mixes devices, and every number is the CPU's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab.evals import kl_divergence, perplexity
from quantlab.evals.generation import generate
from quantlab.evals.kv_cache import Caches, logits_of
from quantlab.models.load import LoadedModel, load_model
from quantlab.progress import Silent
from quantlab.registry.tasks import FidelityOptions, KvCacheOptions, PerplexityOptions
from tests.fake_cuda import fake_cuda


@pytest.fixture(scope="module")
def here() -> Iterator[LoadedModel]:
    with sdpa_kernel(SDPBackend.MATH):
        yield load_model("embedded:base", device="cpu", dtype="float32")


def text(subject: LoadedModel) -> Any:
    prompts = ["SELECT name FROM", "SELECT COUNT(*)", "다음", "SELECT a, b"] * 4
    return generate(
        subject.model, subject.tokenizer, prompts, batch_size=16, max_new_tokens=12, device=subject.device
    )


def spread(subject: LoadedModel) -> Any:
    options = PerplexityOptions(max_tokens=400, seq_len=96)
    return perplexity.evaluate(subject, options, progress=Silent()).metrics


def fed_through_a_quantized_cache(subject: LoadedModel) -> Any:
    ids = torch.arange(1, 81).view(1, 80).to(subject.device)
    caches = Caches(subject.model, KvCacheOptions(bits=4, group_size=16, residual=32))
    return logits_of(subject.model, ids, caches).cpu().tolist()


def distance(subject: LoadedModel) -> Any:
    options = FidelityOptions(max_tokens=300, seq_len=128)
    return kl_divergence.evaluate(subject, options, baseline=subject, progress=Silent()).metrics


@pytest.mark.parametrize("measured", [text, spread, fed_through_a_quantized_cache, distance])
def test_a_measurement_there_is_the_one_here(
    here: LoadedModel, measured: Callable[[LoadedModel], Any]
) -> None:
    with torch.no_grad():
        expected = measured(here)
    with fake_cuda(), torch.no_grad():
        model = copy.deepcopy(here.model).to("cuda")
        assert measured(dataclasses.replace(here, model=model, device="cuda")) == expected
