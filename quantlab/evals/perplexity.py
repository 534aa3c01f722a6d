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

from quantlab.evals.kv_cache import Caches, logits_of
from quantlab.evals.text_pass import nll_of, run
from quantlab.evals.windows import PROTOCOL, Windows, load_windows, refuse_nan
from quantlab.models.load import LoadedModel
from quantlab.progress import Progress
from quantlab.registry.tasks import PerplexityOptions
from quantlab.runs.run import TaskResult

KEPT_WINDOWS = 4096  # losses of so many windows are kept in the run's record, for paired intervals


def evaluate(
    subject: LoadedModel,
    options: PerplexityOptions,
    *,
    baseline: LoadedModel | None = None,
    progress: Progress,
) -> TaskResult:
    """Metrics of `result`. NotANumber where logits are NaN."""
    windows = load_windows(subject, options.source, options.seq_len, options.max_tokens)
    caches = Caches(subject.model, options.kv_cache)
    with progress.task("perplexity", total=len(windows.ids)) as advance:
        losses, _ = run(subject, windows.ids, caches, advance)
    return result(subject, options, windows, losses, caches.details())


def result(
    subject: LoadedModel,
    options: PerplexityOptions,
    windows: Windows,
    losses: list[float],
    details: dict[str, Any],
) -> TaskResult:
    """Metrics ppl, ppl_stderr, nll, bits_per_byte, tokens, bytes, ppl_protocol, ppl_text from the `losses` of all
    windows, sums over each."""
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
            **({"window_nll": losses} if len(losses) <= KEPT_WINDOWS else {}),
            **details,
        },
    )


def window_nll(model: Any, ids: torch.Tensor, caches: Caches | None = None) -> torch.Tensor:
    """Sum of -log p of tokens 1… of each window, in nats: float64 [windows] for `ids` [windows, seq_len]."""
    return nll_of(logits_of(model, ids, caches or Caches(model, None)), ids)


def mean_and_error(losses: list[float], tokens: int) -> tuple[float, float | None]:
    """Mean loss a token over windows of `tokens` scored tokens, and its standard error (None for one window)."""
    means = [loss / tokens for loss in losses]
    mean = math.fsum(means) / len(means)
    if len(means) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))
