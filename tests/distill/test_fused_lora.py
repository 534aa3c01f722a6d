"""LoRA as one product: peft's numbers and gradients, only where it fits, and gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from quantlab.distill.fused_lora import one_product
from quantlab.distill.student import open_student, probe


class Net(nn.Module):
    """Two linears, one with a bias, and something between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(24, 40, bias=False)
        self.second = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(**options: Any) -> Any:
    torch.manual_seed(2)
    wishes: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["first", "second"]} | options
    model = get_peft_model(Net(), LoraConfig(**wishes))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft begins with B = 0, where A has no gradient
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach().float(), found, x.grad


@pytest.mark.parametrize("shape", [(64, 24), (3, 50, 24)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    model, x = adapted(), torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    wanted, wanted_gradients, wanted_x = gradients(model, x)
    with one_product(model) as count:
        assert count == 2
        found, found_gradients, found_x = gradients(model, x)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(found_x, wanted_x, rtol=1e-4, atol=1e-4)
    assert set(found_gradients) == set(wanted_gradients) and len(wanted_gradients) == 4
    for name, gradient in wanted_gradients.items():
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-4, atol=1e-3), name


def test_in_bfloat16_it_is_no_further_from_the_truth_than_peft() -> None:
    """Both round; what counts is the distance to float32."""
    model, x = adapted(), torch.randn(256, 24, generator=torch.Generator().manual_seed(4))
    _, truth, _ = gradients(model, x)
    errors = {}
    for how in ("peft", "one product"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if how == "peft":
                _, found, _ = gradients(model, x)
            else:
                with one_product(model):
                    _, found, _ = gradients(model, x)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        errors[how] = max(float((found[n] - g).norm() / g.norm()) for n, g in truth.items())
    assert errors["one product"] < max(2 * errors["peft"], 0.02)


def test_the_gradient_survives_checking_by_differences() -> None:
    model = adapted().double()
    x = torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with one_product(model):
        _, found, _ = gradients(model, x)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            flat = parameter.data.view(-1)
            for index in (0, flat.numel() // 2, flat.numel() - 1):
                kept, step = float(flat[index]), 1e-5
                flat[index] = kept + step
                above = float(model(x).detach().square().sum())
                flat[index] = kept - step
                below = float(model(x).detach().square().sum())
                flat[index] = kept
                wanted = (above - below) / (2 * step)
                assert float(found[name].view(-1)[index]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_short_batches_are_left_to_peft() -> None:
    """2 · in · out < T · (in + out) decides: T > 30 for 24 × 40, and T > 22.9 for 40 × 16."""
    model = adapted()
    for tokens, taken in ((22, 0), (23, 1), (30, 1), (31, 2)):
        with one_product(model):
            kinds = names_of_backward(model(torch.randn(tokens, 24)))
        assert kinds.count("_OneProductBackward") == taken, tokens


def names_of_backward(y: Tensor) -> list[str]:
    found, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["second"]}]
)
def test_what_it_does_not_compute_is_left_to_peft(options: dict[str, Any]) -> None:
    with one_product(adapted(**options)) as count:
        assert count == 0


def test_switched_off_and_merged_adapters_stay_so() -> None:
    model, x = adapted(), torch.randn(64, 24)
    plain, with_adapter = Net()(x), model(x)
    with one_product(model), torch.no_grad():
        with model.disable_adapter():
            assert torch.allclose(model(x), plain, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(x), with_adapter, atol=1e-5)


def test_afterwards_the_layers_are_as_they_were() -> None:
    model = adapted()
    with pytest.raises(RuntimeError, match="stop"), one_product(model):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_student_in_bfloat16_holds_its_frozen_weights_in_it(tiny: Path) -> None:
    student = open_student(str(tiny), mode="lora", r=4, alpha=8, device="cpu", precision="bfloat16")
    kinds = {p.requires_grad: p.dtype for p in student.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    whole = open_student(str(tiny), mode="full", device="cpu", precision="bfloat16")
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    assert probe(whole.model).dtype == torch.float32
