"""CUDA tensors without CUDA: refused is what CUDA refuses, and what is computed is what the CPU computes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.device_cases import ALLOWED, REFUSED
from tests.fake_cuda import MixedDevices, OnCuda, device_guard, fake_cuda, to_cuda

# FakeTensorMode lets the first three through, and has no values to answer the others.
UNKNOWN = {"pieces put together", "a pile", "an index of the GPU into the CPU"}
UNKNOWN |= {"an array of numpy", "a question of equality", "a CPU mask as an index", "a list"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_on_two_devices_is_refused(name: str) -> None:
    with fake_cuda(), pytest.raises((MixedDevices, TypeError, RuntimeError)):
        REFUSED[name](to_cuda)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_takes_from_the_cpu_is_taken(name: str) -> None:
    with fake_cuda():
        ALLOWED[name](to_cuda)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu asks CUDA itself")
@pytest.mark.parametrize("name", sorted((REFUSED.keys() | ALLOWED.keys()) - UNKNOWN))
def test_torchs_own_fake_tensors_judge_alike(name: str) -> None:
    with device_guard(), FakeTensorMode():
        if name in ALLOWED:
            ALLOWED[name](lambda tensor: tensor.to("cuda"))
        else:
            with pytest.raises(RuntimeError, match="device"):
                REFUSED[name](lambda tensor: tensor.to("cuda"))


def test_tensors_say_where_they_are_and_views_share_their_memory() -> None:
    with fake_cuda():
        made = torch.zeros(2, 4, device="cuda")
        assert made.is_cuda and str(made.device) == "cuda:0"
        assert torch.tensor([1.0], device="cuda").is_cuda and torch.empty_like(made).is_cuda
        made[:, 1:3] += 1
        assert made.tolist() == [[0, 1, 1, 0]] * 2
        assert made.add_(1) is made
        back = made.cpu()
        made.zero_()
    assert not isinstance(back, OnCuda) and back.tolist() == [[1, 2, 2, 1]] * 2


def test_a_module_moves_there() -> None:
    layer = torch.nn.Linear(4, 2)
    expected = layer(torch.ones(1, 4))
    with fake_cuda(), torch.no_grad():
        layer.to("cuda")
        assert isinstance(layer.weight, OnCuda)
        found = layer(torch.ones(1, 4, device="cuda")).cpu()
        with pytest.raises(MixedDevices):
            layer(torch.ones(1, 4))
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_stays_behind() -> None:
    with fake_cuda():
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert not torch.cuda.is_initialized()
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    assert layer.to(torch.float64).weight is weight
