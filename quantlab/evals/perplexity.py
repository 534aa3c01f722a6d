"""Perplexity by the GPTQ protocol, and bits per byte.

Over non-overlapping windows (see `windows.py`) the mean negative log-likelihood of each token given those
before it in its window, in nats; perplexity is its exponential. Every window has the same number of scored
tokens, so the mean over tokens is the mean over windows. `bits_per_byte` divides the same sum by the bytes
of text those tokens stand for. The standard error treats windows as independent (delta method for the
perplexity).

With a quantized cache (`tasks.kv_cache`) a window is fed step by step, see `kv_cache.py`.

Not covered: sliding windows with overlap, whose numbers are lower and do not compare with these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from quantlab.evals.kv_cache import Caches, logits_of
from quantlab.evals.windows import PROTOCOL, batch_rows, load_windows, refuse_nan
from quantlab.models.load import LoadedModel
from quantlab.progress import Progress
from quantlab.registry.tasks import PerplexityOptions
from quantlab.runs.run import TaskResult

POSITIONS_AT_ONCE = 512  # converted to float32 at a time, where logits come in half precision


def evaluate(
    subject: LoadedModel,
    options: PerplexityOptions,
    *,
    baseline: LoadedModel | None = None,
    progress: Progress,
) -> TaskResult:
    """Metrics ppl, ppl_stderr, nll, bits_per_byte, tokens, bytes, ppl_protocol, ppl_text."""
    windows = load_windows(subject, options.source, options.seq_len, options.max_tokens)
    rows = batch_rows(subject.model, options.seq_len)
    caches = Caches(subject.model, options.kv_cache)
    losses: list[float] = []
    with progress.task("perplexity", total=len(windows.ids)) as advance, torch.inference_mode():
        for batch in windows.ids.split(rows):
            losses += window_nll(subject.model, batch.to(subject.device), caches).tolist()
            advance(len(batch))
    refuse_nan("perplexity", subject, torch.tensor(losses))
    nll, error = mean_and_error(losses, options.seq_len - 1)
    ppl = math.exp(nll) if nll < 700 else math.inf
    return TaskResult(
        "perplexity",
        {
            "ppl": ppl,
            "ppl_stderr": ppl * error if error is not None else None,
            "nll": nll,
            "bits_per_byte": sum(losses) / math.log(2) / windows.scored_bytes
            if windows.scored_bytes
            else None,
            "tokens": windows.scored_tokens,
            "bytes": windows.scored_bytes,
            "ppl_protocol": f"{PROTOCOL}-{options.seq_len}",
            "ppl_text": windows.name,
        },
        details={
            "source": options.source,
            "text_digest": windows.text_digest,
            "seq_len": options.seq_len,
            "windows": len(windows.ids),
            "unknown_tokens": windows.unknown_tokens,
            **caches.details(),
        },
    )


def window_nll(model: Any, ids: torch.Tensor, caches: Caches | None = None) -> torch.Tensor:
    """Sum of -log p of tokens 1… of each window, in nats: float64 [windows] for `ids` [windows, seq_len]."""
    logits = logits_of(model, ids, caches or Caches(model, None))  # [windows, seq_len, vocabulary]
    total = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, ids.shape[1] - 1, POSITIONS_AT_ONCE):
        end = min(start + POSITIONS_AT_ONCE, ids.shape[1] - 1)
        part = logits[:, start:end].float()
        targets = ids[:, start + 1 : end + 1].to(part.device)
        # [windows, positions]
        loss = functional.cross_entropy(part.transpose(1, 2), targets, reduction="none")
        total += loss.double().sum(dim=1).cpu()
    return total


def mean_and_error(losses: list[float], tokens: int) -> tuple[float, float | None]:
    """Mean loss a token over windows of `tokens` scored tokens, and its standard error (None for one window)."""
    means = [loss / tokens for loss in losses]
    mean = math.fsum(means) / len(means)
    if len(means) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))
