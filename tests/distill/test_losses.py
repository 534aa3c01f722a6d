"""Divergences from a teacher's top k, against the definitions summed over the vocabulary in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quantlab.distill.logits import top_logprobs
from quantlab.distill.losses import (
    VALUES_AT_ONCE,
    divergence,
    divergence_sum,
    mean_divergence,
    student_buckets,
    teacher_buckets,
)

KINDS = ["forward_kl", "reverse_kl", "jsd"]


def logits(rows: int = 6, vocabulary: int = 12, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale


def brute(
    teacher: torch.Tensor, student: torch.Tensor, kind: str, temperature: float, beta: float
) -> list[float]:
    """From the formulas, one position and one token at a time."""

    def kl(left: list[float], right: list[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True) if p > 0)

    found = []
    for row in range(len(teacher)):
        p = torch.softmax(teacher[row] / temperature, 0).tolist()
        q = torch.softmax(student[row] / temperature, 0).tolist()
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        value = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[kind]
        found.append(value * temperature**2)
    return found


def exact_top(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.log_softmax(teacher / temperature, 1).topk(k, dim=1)
    return values, indices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_all_tokens_known_is_exact(kind: Any, temperature: float, beta: float) -> None:
    teacher, student = logits(), logits(seed=1)
    values, indices = exact_top(teacher, 12, temperature)
    found = divergence(student, values, indices, kind=kind, temperature=temperature, beta=beta)
    assert found.tolist() == pytest.approx(brute(teacher, student, kind, temperature, beta), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fewer_tokens_are_a_lower_bound_that_grows(kind: Any, temperature: float) -> None:
    teacher, student = logits(rows=40), logits(rows=40, seed=1)
    truth = torch.tensor(brute(teacher, student, kind, temperature, 0.5), dtype=torch.float64)
    last = torch.zeros(40, dtype=torch.float64)
    for k in (1, 2, 4, 8, 11, 12):
        values, indices = exact_top(teacher, k, temperature)
        found = divergence(student, values, indices, kind=kind, temperature=temperature)
        assert bool((found >= last - 1e-9).all()) and bool((found <= truth + 1e-9).all())
        last = found
    assert torch.allclose(last, truth, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_where_the_rest_is_distributed_alike(kind: Any) -> None:
    """Eleven tokens and one that is split into many, of equal shares on both sides."""
    teacher, student = logits(), logits(seed=1)
    smallest = teacher.argmin(dim=1, keepdim=True)
    split = [
        torch.cat(
            [x.scatter(1, smallest, -torch.inf), (x.gather(1, smallest) - math.log(5)).expand(-1, 5)], 1
        )
        for x in (teacher, student)
    ]
    values, indices = exact_top(split[0], 11, 1.0)
    found = divergence(split[1], values, indices, kind=kind)
    assert found.tolist() == pytest.approx(brute(teacher, student, kind, 1.0, 0.5), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients(kind: Any, k: int, with_rest: bool, temperature: float) -> None:
    teacher, student = logits(rows=3), logits(rows=3, seed=1).requires_grad_()
    values, indices = exact_top(teacher, k, temperature)
    if with_rest:
        others = (teacher / temperature).scatter(1, indices, -torch.inf)
        rest = torch.logsumexp(others, 1, keepdim=True) - torch.logsumexp(
            teacher / temperature, 1, keepdim=True
        )
        values = torch.cat([values, rest], dim=1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return divergence(x, values, indices, kind=kind, temperature=temperature, beta=0.3)

    assert torch.autograd.gradcheck(loss, (student,))


def test_forward_kl_has_the_gradient_of_soft_labels() -> None:
    """With all tokens known it is q - p at every logit, whatever the temperature does to its size: T (q - p)."""
    teacher, student = logits(), logits(seed=1).requires_grad_()
    values, indices = exact_top(teacher, 12, 2.0)
    divergence(student, values, indices, temperature=2.0).sum().backward()
    expected = 2.0 * (torch.softmax(student.detach() / 2, 1) - torch.softmax(teacher / 2, 1))
    assert torch.allclose(student.grad, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 12])
def test_equal_models_have_none(kind: Any, k: int) -> None:
    teacher = logits().float().requires_grad_()
    values, indices = top_logprobs(teacher.detach(), k)
    found = divergence(teacher, values, indices, kind=kind)
    found.sum().backward()
    assert bool((found.abs() < 1e-5).all()) and bool((teacher.grad.abs() < 1e-5).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_numbers(kind: Any, k: int, dtype: torch.dtype) -> None:
    zero, sure = torch.zeros(12), torch.full((12,), -1e4)
    sure[3] = 1e4
    other = torch.full((12,), -1e4)
    other[7] = 1e4
    masked = torch.zeros(12)
    masked[5] = -torch.inf
    rows = [zero, sure, other, masked]
    teacher = torch.stack([t for t in rows for _ in rows])
    student = torch.stack([s for _ in rows for s in rows]).to(dtype).requires_grad_()
    values, indices = top_logprobs(teacher, k)
    found = divergence(student, values.clamp_min(-65504.0), indices, kind=kind)
    found.sum().backward()
    assert bool(found.isfinite().all()) and bool((found > -1e-4).all())
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_all_zero_logits_are_uniform() -> None:
    teacher, student = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 0] = math.log(9)  # 9/16 against 1/8, and 1/16 each for the others
    values, indices = top_logprobs(teacher, 8)
    expected = math.log(1 / 8 * 16 / 9) / 8 + 7 / 8 * math.log(2)
    assert divergence(student, values, indices).item() == pytest.approx(expected, rel=1e-5)


def test_a_confident_teacher_keeps_its_rest() -> None:
    """A rest of e^-20 is nothing beside 1 in float32; both sides have it from the logits, and the gradient sees it."""
    teacher = torch.tensor([[20.0] + [0.0] * 3])
    student = torch.tensor([[20.0] + [3.0] * 3], requires_grad=True)
    values, indices = top_logprobs(teacher, 1)
    assert values[0, 1].item() == pytest.approx(math.log(3) - 20, rel=1e-6)
    assert student_buckets(student, indices)[0, 1].item() == pytest.approx(math.log(3) - 17, rel=1e-6)
    divergence(student, values, indices, kind="reverse_kl").sum().backward()
    exact = student.detach().double().requires_grad_()
    double = torch.log_softmax(teacher.double(), 1)
    q = torch.log_softmax(exact, 1)
    (q.exp() * (q - double)).sum().backward()
    assert torch.allclose(student.grad.double()[:, 1:], exact.grad[:, 1:], rtol=1e-3)


def test_rounding_cannot_make_a_divergence_negative_or_infinite() -> None:
    """Stored values whose sum is above one: the rest they leave is not nothing."""
    values = torch.log(torch.tensor([[0.6, 0.4001]]))
    indices = torch.tensor([[1, 0]])
    buckets = teacher_buckets(values, indices, 5)
    assert buckets.exp().sum().item() == pytest.approx(1.0) and bool(buckets.isfinite().all())
    for kind in KINDS:
        found = divergence(torch.zeros(1, 5), values, indices, kind=kind)  # type: ignore[arg-type]
        assert 0 <= found.item() < 20


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind: Any) -> None:
    teacher = logits(rows=11).float()
    values, indices = top_logprobs(teacher, 4)
    gradients, sums = [], []
    for size in (1, 4, 11, None):
        student = logits(rows=11, seed=1).float().requires_grad_()
        total = divergence_sum(student, values, indices, kind=kind, positions_at_once=size)
        total.backward()
        gradients.append(student.grad)
        sums.append(total.item())
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-6)
    assert all(torch.allclose(gradients[0], g, atol=1e-7) for g in gradients)


def test_ignored_positions_do_not_count() -> None:
    values, indices = top_logprobs(logits(rows=5).float(), 4)
    student = logits(rows=5, seed=1).float()
    keep = torch.tensor([True, False, True, True, False])
    expected = divergence(student[keep], values[keep], indices[keep]).mean()
    spoiled = student.masked_fill(~keep[:, None], torch.nan).requires_grad_()
    found = mean_divergence(spoiled, values, indices, keep=keep)
    found.backward()
    assert torch.allclose(found, expected)
    assert bool((spoiled.grad[~keep] == 0).all()) and bool((spoiled.grad[keep] != 0).any())


@pytest.mark.parametrize("keep", [torch.zeros(3, dtype=torch.bool), None])
def test_no_position_at_all(keep: torch.Tensor | None) -> None:
    rows = 0 if keep is None else 3
    student = torch.zeros(rows, 7, requires_grad=True)
    found = mean_divergence(student, torch.zeros(rows, 3), torch.zeros(rows, 2, dtype=torch.int64), keep=keep)
    found.backward()
    assert found.item() == 0


def test_memory_is_one_chunk_and_the_logits_own_dtype() -> None:
    """What autograd keeps between forward and backward is what it was given, no float32 copy of it."""
    rows, vocabulary = 64, 4096
    teacher = torch.randn(rows, vocabulary)
    values, indices = top_logprobs(teacher, 8)
    student = torch.randn(rows, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        divergence_sum(student, values, indices, positions_at_once=4)
    assert sum(kept.values()) < rows * vocabulary * 4
    assert VALUES_AT_ONCE * 4 == 128 * 2**20


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "kl"},
        {"temperature": 0.0},
        {"kind": "jsd", "beta": 1.0},
        {"top_logprobs": torch.zeros(2, 5)},
        {"top_indices": torch.zeros(1, 3, dtype=torch.int64)},
        {"student_logits": torch.zeros(2, 2)},
    ],
)
def test_refusals(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "student_logits": torch.zeros(2, 6),
        "top_logprobs": torch.zeros(2, 3),
        "top_indices": torch.zeros(2, 3, dtype=torch.int64),
    }
    with pytest.raises(ValueError):
        divergence(**{**arguments, **change})
