"""Perplexity against transformers' own loss, and the counting around it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.errors import DataError, RecipeError
from quantlab.evals.perplexity import evaluate, mean_and_error, window_nll
from quantlab.evals.windows import make_windows
from quantlab.progress import Silent
from quantlab.registry.tasks import PerplexityOptions

STORY = "Once upon a time there was a little girl named Lily. She liked to play outside in the sun. " * 40


def own_loss(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(model(input_ids=ids[None], labels=ids[None]).loss)


@pytest.mark.parametrize("which", ["tiny", "baby"])
def test_agrees_with_transformers_own_loss(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    subject = request.getfixturevalue(which)
    (tmp_path / "t.txt").write_text(STORY, encoding="utf-8")
    options = PerplexityOptions(source=str(tmp_path / "t.txt"), seq_len=64)
    found = evaluate(subject, options, progress=Silent())
    windows = make_windows(subject.tokenizer, STORY, 64).ids
    losses = [own_loss(subject.model, row) for row in windows]
    assert found.metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.metrics["ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.metrics["tokens"] == len(windows) * 63
    assert found.metrics["ppl_protocol"] == "gptq-windows-64"
    if which == "baby":  # trained on such stories: far better than chance, which is 105
        assert found.metrics["ppl"] < 4


def test_a_half_precision_model_is_scored_in_float32(tiny: Any) -> None:
    ids = make_windows(tiny.tokenizer, STORY, 64).ids[:2]
    with torch.inference_mode():
        full = window_nll(tiny.model, ids)
        try:
            half = window_nll(tiny.model.bfloat16(), ids)
        finally:
            tiny.model.float()
    assert half.dtype == torch.float64
    assert torch.allclose(full, half, rtol=0.02)


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens(tiny: Any) -> None:
    text = "선수 이름을 모두 보여줘. " * 20
    windows = make_windows(tiny.tokenizer, text, 16)
    spans = [tiny.tokenizer.decode(row[1:].tolist()) for row in windows.ids]
    exact = sum(len(span.encode()) for span in spans if "\ufffd" not in span)
    assert windows.scored_bytes >= exact
    assert windows.scored_bytes == pytest.approx(len(text.encode()) * 15 / 16, rel=0.1)
    ascii_windows = make_windows(tiny.tokenizer, STORY, 16)
    assert ascii_windows.scored_bytes == sum(
        len(tiny.tokenizer.decode(row[1:].tolist())) for row in ascii_windows.ids
    )


def test_windows_do_not_overlap_and_the_rest_is_dropped(tiny: Any) -> None:
    ids = tiny.tokenizer(STORY)["input_ids"]
    windows = make_windows(tiny.tokenizer, STORY, 50)
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 50 * 50]
    assert len(make_windows(tiny.tokenizer, STORY, 50, max_tokens=120).ids) == 2
    assert len(make_windows(tiny.tokenizer, STORY, 50, max_tokens=1).ids) == 1


def test_documents_are_joined_by_a_blank_line(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in ("A b c. " * 30, "D e f. " * 30)))
    one = evaluate(tiny, PerplexityOptions(source=str(path), seq_len=32), progress=Silent())
    joined = tmp_path / "d.txt"
    joined.write_text("A b c. " * 30 + "\n\n" + "D e f. " * 30)
    two = evaluate(tiny, PerplexityOptions(source=str(joined), seq_len=32), progress=Silent())
    name = one.metrics.pop("ppl_text"), two.metrics.pop("ppl_text")
    assert name[0] != name[1] and one.metrics == two.metrics
    assert one.details["text_digest"] == two.details["text_digest"]


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match="fewer than one window of 64"):
        evaluate(tiny, PerplexityOptions(source=str(tmp_path / "short.txt"), seq_len=64), progress=Silent())
    with pytest.raises(RecipeError, match="512 positions of tiny"):
        evaluate(tiny, PerplexityOptions(source=str(tmp_path / "short.txt"), seq_len=1024), progress=Silent())
    with pytest.raises(DataError, match="no such file"):
        evaluate(tiny, PerplexityOptions(source="nowhere.txt", seq_len=64), progress=Silent())


def test_standard_error() -> None:
    assert mean_and_error([10.0, 20.0, 30.0], 10) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([10.0], 10) == (1.0, None)
