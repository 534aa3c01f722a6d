"""Divergences between a teacher's next-token distribution and a student's, from the teacher's top-k only.

Forward KL, KL(P || Q), and reverse KL, KL(Q || P), with P the teacher and Q the student; and the generalised
Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649, eq. 1):

    JSD_b(P || Q) = b KL(P || M) + (1 - b) KL(Q || M),   M = b P + (1 - b) Q

Only the K most likely tokens of the teacher are known, so both distributions are looked at through K + 1 buckets: those
tokens, and everything else together. That is a function of the token, hence by the data-processing inequality the
divergence over the buckets is at most the one over the vocabulary, and equal to it where K = V, or where both
distribute the rest alike. It is zero only where the student agrees on every bucket: unlike a top-k that is renormalised
to one, it does not let the student keep mass on tokens that the teacher rules out.

The mass of the rest is never computed as 1 - sum: near a confident teacher float32 has no digits left for it, and its
gradient would be noise. The student's comes from a logsumexp over the other logits, the teacher's from the store, which
has it from the same computation.

With a temperature T both distributions are softmax(logits / T), and the result is multiplied by T², so that gradients
keep their size as T grows (Hinton et al. 2015, arXiv:1503.02531, section 2.1). The teacher's values must have been
taken at the same T: they cannot be re-tempered afterwards (see `logits.py`).

Not covered: sampling from the student during training (the on-policy half of GKD).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
VALUES_AT_ONCE = 2**25  # logits in float32 at a time: 128 MiB, and a copy of them without the top k


def divergence(
    student_logits: torch.Tensor,
    top_logprobs: torch.Tensor,
    top_indices: torch.Tensor,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """The divergence at every position, in nats, times temperature².

    Args:
        student_logits: [N, V], any floating dtype; computed in float32 at least.
        top_logprobs: the teacher's log-probabilities at `temperature`, [N, K], or [N, K + 1] with that of the rest in
            the last column. Without it the rest is 1 - sum, as exact as that can be.
        top_indices: the tokens they belong to, integer [N, K], distinct within a row.
        beta: the teacher's share of the mixture of `jsd`, between 0 and 1.

    Returns:
        [N], with gradients to `student_logits`. Reverse KL is infinite where the student gives mass to a bucket
        of which the teacher says exactly 0.

    Raises:
        ValueError: shapes that do not fit together, an unknown kind, temperature or beta out of range.
    """
    _check(student_logits, top_logprobs, top_indices, kind, temperature, beta)
    exact = torch.promote_types(student_logits.dtype, torch.float32)
    teacher = teacher_buckets(top_logprobs.to(exact), top_indices, student_logits.shape[1])
    student = student_buckets(student_logits.to(exact) / temperature, top_indices)
    if kind == "forward_kl":
        per_position = _kl(teacher, student)
    elif kind == "reverse_kl":
        per_position = _kl(student, teacher)
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        per_position = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return per_position * temperature**2


def divergence_sum(
    student_logits: torch.Tensor,
    top_logprobs: torch.Tensor,
    top_indices: torch.Tensor,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    keep: torch.Tensor | None = None,
    positions_at_once: int | None = None,
) -> torch.Tensor:
    """The sum of `divergence` over positions, a scalar, without a float32 copy of all logits.

    Chunks of positions are computed one after the other and again in the backward pass, so what is held at a time is
    one chunk in float32 besides `student_logits` and its gradient, in its own dtype.

    Args:
        keep: bool [N]; positions where it is False are ignored: no loss, no gradient, whatever stands there.
        positions_at_once: default, as many as make `VALUES_AT_ONCE` logits.
    """
    if keep is not None and not bool(keep.all()):
        student_logits, top_logprobs, top_indices = (
            values[keep] for values in (student_logits, top_logprobs, top_indices)
        )
    _check(student_logits, top_logprobs, top_indices, kind, temperature, beta)
    count, vocabulary = student_logits.shape
    if not count:
        return (student_logits * 0).sum(dtype=torch.float32)  # still connected: backward() must not fail

    def part(logits: torch.Tensor, logprobs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return divergence(logits, logprobs, indices, kind=kind, temperature=temperature, beta=beta).sum()

    size = positions_at_once or max(1, VALUES_AT_ONCE // vocabulary)
    # split, not slices: the backward of each slice would fill a gradient of the whole size with zeros
    chunks = zip(student_logits.split(size), top_logprobs.split(size), top_indices.split(size), strict=True)
    sums = [checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum()


def mean_divergence(
    student_logits: torch.Tensor,
    top_logprobs: torch.Tensor,
    top_indices: torch.Tensor,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    keep: torch.Tensor | None = None,
    positions_at_once: int | None = None,
) -> torch.Tensor:
    """`divergence_sum` over the number of positions that are kept; 0 where there is none."""
    total = divergence_sum(
        student_logits,
        top_logprobs,
        top_indices,
        kind=kind,
        temperature=temperature,
        beta=beta,
        keep=keep,
        positions_at_once=positions_at_once,
    )
    return total / max(1, len(student_logits) if keep is None else int(keep.sum()))


def teacher_buckets(top_logprobs: torch.Tensor, top_indices: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Log-probabilities of the top k and of the rest, which sum to one: [N, K + 1], or [N, K] where K = V.

    What rounding of stored values has added or lost is taken out by scaling all buckets alike. A rest that has to be
    computed as 1 - sum counts as at least the dtype's epsilon: less it cannot tell from nothing.
    """
    top = top_indices.shape[1]
    if top == vocabulary:
        buckets = top_logprobs[:, :top]
    elif top_logprobs.shape[1] > top:
        buckets = top_logprobs
    else:
        inside = torch.logsumexp(top_logprobs, dim=1, keepdim=True)
        rest = -torch.expm1(inside.clamp(max=0.0))
        buckets = torch.cat([top_logprobs, rest.clamp_min(torch.finfo(rest.dtype).eps).log()], dim=1)
    return buckets - torch.logsumexp(buckets, dim=1, keepdim=True)


def student_buckets(logits: torch.Tensor, top_indices: torch.Tensor) -> torch.Tensor:
    """The same buckets of softmax(logits), all finite: [N, K + 1], or [N, K] where K = V, for `logits` [N, V]."""
    indices = top_indices.to(torch.int64)
    lowest = torch.finfo(logits.dtype).min
    whole = torch.logsumexp(logits, dim=1, keepdim=True)
    # a masked logit of -inf would make NaN gradients
    chosen = logits.gather(1, indices).clamp_min(lowest / 4)
    if indices.shape[1] == logits.shape[1]:
        return chosen - whole
    others = logits.scatter(1, indices, lowest)
    return torch.cat([chosen, torch.logsumexp(others, dim=1, keepdim=True)], dim=1) - whole


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL(left || right) over buckets in log-probabilities, [N, buckets] → [N]; 0 log 0 = 0, also in the gradient."""
    possible = left > -torch.inf
    difference = torch.where(possible, left, 0.0) - torch.where(possible, right, 0.0)
    return (left.exp() * difference).sum(dim=1)


def _check(
    logits: torch.Tensor,
    logprobs: torch.Tensor,
    indices: torch.Tensor,
    kind: str,
    temperature: float,
    beta: float,
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta {beta} is not between 0 and 1")
    count, vocabulary = logits.shape
    top = indices.shape[1]
    fits = len(indices) == len(logprobs) == count and logprobs.shape[1] in (top, top + 1)
    if not fits or not 0 < top <= vocabulary:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits.shape)}, log-probabilities {tuple(logprobs.shape)}, "
            f"indices {tuple(indices.shape)}"
        )
