"""One forward pass of a model over windows of a text: its losses, and how far it is from the original.

Perplexity and divergence come from the same logits, which are thrown away after each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from quantlab.evals.kv_cache import Caches, logits_of
from quantlab.evals.windows import batch_rows
from quantlab.models.load import LoadedModel

POSITIONS_AT_ONCE = 512  # converted to float32 at a time, where logits come in half precision


@dataclass(frozen=True)
class Compared:
    """Some windows compared with the original. `kl` in nats, float32, and `same` (the most likely token is), bool, both
    [windows, seq_len - 1]; `nll`: the original's own losses, sums over the window, float64 [windows]."""

    kl: torch.Tensor
    same: torch.Tensor
    nll: torch.Tensor


class Original(Protocol):
    """Where the original's distributions come from. `noise`: how far it is from itself; `form`: how it is held."""

    name: str
    noise: dict[str, Any]
    form: dict[str, Any]

    def compare(self, first: int, ids: torch.Tensor, logits: torch.Tensor) -> Compared:
        """Against the model's `logits` [windows, seq_len, vocabulary] of windows `ids` [windows, seq_len], the first of
        which is window number `first`."""


def run(
    subject: LoadedModel,
    ids: torch.Tensor,
    caches: Caches,
    advance: Callable[[int], None],
    original: Original | None = None,
    count: int = 0,
) -> tuple[list[float], Compared | None]:
    """Losses of the windows `ids` [windows, seq_len], sums over each, and the first `count` windows compared with the
    original. `advance` is told of windows that are done."""
    nll: list[float] = []
    parts: list[Compared] = []
    with torch.inference_mode():
        for batch in ids.split(batch_rows(subject.model, ids.shape[1])):
            here = batch.to(subject.device)
            logits = logits_of(subject.model, here, caches)  # [windows, seq_len, vocabulary]
            first = len(nll)
            nll += nll_of(logits, here).tolist()
            shared = min(len(batch), count - first)
            if original is not None and shared > 0:
                parts.append(original.compare(first, batch[:shared], logits[:shared]))
            del logits  # before the next batch's are made
            advance(len(batch))
    if not parts:
        return nll, None
    kl, same, own = (torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "same", "nll"))
    return nll, Compared(kl, same, own)


def nll_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum of -log p of tokens 1… of each window, in nats: float64 [windows] from `logits` [windows, seq_len,
    vocabulary] of `ids` [windows, seq_len]."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, ids.shape[1] - 1, POSITIONS_AT_ONCE):
        end = min(start + POSITIONS_AT_ONCE, ids.shape[1] - 1)
        part = logits[:, start:end].float()
        targets = ids[:, start + 1 : end + 1].to(part.device)
        # [windows, positions]
        loss = functional.cross_entropy(part.transpose(1, 2), targets, reduction="none")
        total += loss.double().sum(dim=1).cpu()
    return total
