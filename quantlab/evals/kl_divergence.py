"""How far a model has moved from the one it was made from, token by token.

On the same windows of text both models give a distribution over the next token. Reported are the
Kullback-Leibler divergence KL(original || model) in nats, mean and 99th percentile over positions, and how
often the most likely token is the same. With `tasks.kv_cache` the changed model runs on a quantized cache, the original
never does. Unlike accuracy it needs no questions, and it sees every token.
Both models run on the same batch and the logits are thrown away at once: nothing grows with the length of
the text but one float a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from quantlab.errors import DataError, RecipeError
from quantlab.evals.kv_cache import Caches, logits_of
from quantlab.evals.windows import batch_rows, load_windows, refuse_nan
from quantlab.models.load import LoadedModel
from quantlab.progress import Progress
from quantlab.registry.tasks import FidelityOptions
from quantlab.runs.run import TaskResult

POSITIONS_AT_ONCE = 256


def evaluate(
    subject: LoadedModel, options: FidelityOptions, *, baseline: LoadedModel | None = None, progress: Progress
) -> TaskResult:
    """Metrics kl_mean, kl_stderr (windows taken as independent), kl_p99, kl_max, top1_agreement, kl_text, tokens."""
    if baseline is None:
        raise RecipeError("fidelity needs the original to compare with", hint="name it with --baseline")
    windows = load_windows(subject, options.source, options.seq_len, options.max_tokens)
    check_same_tokens(subject, baseline, windows.ids[0])
    rows = batch_rows(subject.model, options.seq_len)
    caches = Caches(subject.model, options.kv_cache)
    divergences, agreements = [], []
    with progress.task("fidelity", total=len(windows.ids)) as advance, torch.inference_mode():
        for batch in windows.ids.split(rows):
            divergence, agreement = compare_models(
                baseline.model, subject.model, batch.to(baseline.device), batch.to(subject.device), caches
            )
            divergences.append(divergence)
            agreements.append(agreement)
            advance(len(batch))
    kl, same = torch.cat(divergences), torch.cat(agreements)
    refuse_nan("fidelity", subject, kl)
    return TaskResult(
        "fidelity",
        {
            "kl_mean": float(kl.double().mean()),
            "kl_stderr": _stderr(kl.view(len(windows.ids), -1).double().mean(dim=1)),
            "kl_p99": percentile(kl, 0.99),
            "kl_max": float(kl.max()),
            "top1_agreement": float(same.double().mean()),
            "kl_text": windows.name,
            "tokens": len(kl),
        },
        details={
            "baseline": baseline.name,
            "source": options.source,
            "seq_len": options.seq_len,
            **caches.details(),
        },
    )


def compare_models(
    original: Any,
    changed: Any,
    original_ids: torch.Tensor,
    changed_ids: torch.Tensor,
    caches: Caches | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and top-1 agreement at every scored position of one batch; float32 and bool [windows * (seq_len - 1)]."""
    left = original(input_ids=original_ids, use_cache=False).logits
    right = logits_of(changed, changed_ids, caches or Caches(changed, None))
    if left.shape[-1] != right.shape[-1]:
        raise DataError(
            f"the models have {left.shape[-1]} and {right.shape[-1]} tokens in their vocabularies: nothing to compare"
        )
    divergences, agreements = [], []
    for start in range(0, left.shape[1] - 1, POSITIONS_AT_ONCE):
        end = min(start + POSITIONS_AT_ONCE, left.shape[1] - 1)
        divergence, agreement = compare_logits(left[:, start:end], right[:, start:end].to(left.device))
        divergences.append(divergence.cpu())
        agreements.append(agreement.cpu())
    return torch.cat(divergences, dim=1).flatten(), torch.cat(agreements, dim=1).flatten()


def compare_logits(original: torch.Tensor, changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(softmax(original) || softmax(changed)) in nats, and whether the argmax agrees; [..., vocabulary] → [...]."""
    log_p = torch.log_softmax(original.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    # A token the original rules out (p = 0) adds nothing, whatever the other model thinks of it.
    terms = torch.where(log_p == -torch.inf, torch.zeros_like(terms), terms)
    # The divergence is never negative; rounding is.
    return terms.sum(dim=-1).clamp_min(0.0), original.argmax(dim=-1) == changed.argmax(dim=-1)


def _stderr(means: torch.Tensor) -> float | None:
    """Standard error of the mean of windows' means [windows]; None for one window."""
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None


def percentile(values: torch.Tensor, share: float) -> float:
    """Nearest-rank percentile: the smallest value with at least `share` of all values at or below it."""
    rank = max(1, math.ceil(share * len(values)))
    return float(values.kthvalue(rank).values)


def check_same_tokens(subject: LoadedModel, baseline: LoadedModel, ids: torch.Tensor) -> None:
    """DataError unless both tokenizers read the same text off the same tokens."""
    tokens = ids.tolist()
    if subject.tokenizer.convert_ids_to_tokens(tokens) != baseline.tokenizer.convert_ids_to_tokens(tokens):
        raise DataError(f"{subject.name} and {baseline.name} do not share a tokenizer")
