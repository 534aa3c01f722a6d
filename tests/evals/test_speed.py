"""Speed and memory: plausible numbers, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantlab.errors import RecipeError
from quantlab.evals.speed import PeakMemory, evaluate, time_once
from quantlab.progress import Silent
from quantlab.recipe import SpeedOptions


def test_numbers(tiny: Any) -> None:
    options = SpeedOptions(prompt_tokens=32, new_tokens=4, batch_size=2, repeats=3)
    found = evaluate(tiny, options, progress=Silent())
    assert found.metrics["prefill_tok_s"] > found.metrics["decode_tok_s"] > 0
    assert sorted(found.details["decode_runs"])[1] == found.metrics["decode_tok_s"]
    assert len(found.details["prefill_runs"]) == 3
    assert found.metrics["peak_memory_bytes"] > 50 * 2**20


def test_decoding_runs_the_whole_model_for_every_token(tiny: Any) -> None:
    calls: list[int] = []
    hook = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            time_once(tiny.model, torch.zeros((1, 8), dtype=torch.int64), 5)
    finally:
        hook.remove()
    assert calls == [8, 1, 1, 1, 1, 1]


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = PeakMemory("cpu")
    if "measurement" not in memory.what:
        pytest.skip("this system does not let the mark be reset")
    before = memory.read()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    after = memory.read()
    assert before is not None and after is not None
    assert after >= before + 32 * 2**20 or after >= 64 * 2**20
    fresh = PeakMemory("cpu").read()
    assert fresh is not None and fresh <= after


def test_refuses_more_than_the_model_can_attend_to(tiny: Any) -> None:
    with pytest.raises(RecipeError, match="512 positions"):
        evaluate(tiny, SpeedOptions(prompt_tokens=500, new_tokens=32), progress=Silent())
