"""Second moments: exact against float64, shared where layers share an input, linked to the norm that feeds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.models.blockwise import BlockwiseModel, linears, run_block
from quantlab.models.safetensors.files import open_files
from quantlab.quant.block_view import norm_offset
from quantlab.quant.hessian import Collector, InputHessian, StopForward


def test_sums_agree_with_float64() -> None:
    seeded = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, 48, generator=seeded) * torch.logspace(-2, 1.5, 48)).to(torch.bfloat16)
    moments = InputHessian(["a"], torch.zeros(48, 48), torch.zeros(48))
    for part in x.split(700):
        moments.add(part[None])
    moments.finish()
    exact = x.double().t() @ x.double() / len(x)
    assert moments.tokens == 4000
    assert ((moments.hessian - exact).norm() / exact.norm()).item() < 1e-5
    assert torch.allclose(moments.magnitude, x.double().abs().mean(dim=0).float(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_in_float32_whatever_the_inputs_are(dtype: torch.dtype) -> None:
    """Wide enough for the products that matrix instructions do: what they round must not be anything."""
    x = torch.randn(6000, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision
    moments = InputHessian.empty("a", 384)
    moments.add(x)
    moments.finish()
    exact = x.double().t() @ x.double() / len(x)
    assert ((moments.hessian - exact).norm() / exact.norm()).item() < 2e-6
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_which_layers_share_is_observed(tiny: Path) -> None:
    opened = BlockwiseModel(open_files(tiny), "cpu", torch.float32)
    rows = torch.randint(1, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    hidden, calls = opened.inputs(rows)
    block = opened.block(1)
    with torch.no_grad(), Collector(linears(block)) as collector:
        for i in range(3):
            run_block(block, hidden[i : i + 1], calls[1])
            collector.next_batch()
    found = {tuple(m.layers): m for m in collector.finish()}
    assert set(found) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }
    assert all(m.tokens == 48 for m in found.values())


def test_a_forward_ends_at_the_last_linear_where_only_inputs_are_wanted(tiny: Path) -> None:
    opened = BlockwiseModel(open_files(tiny), "cpu", torch.float32)
    rows = torch.randint(1, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    hidden, calls = opened.inputs(rows)
    block = opened.block(1)
    found = []
    for inputs_only in (False, True):
        ended, through = 0, []
        handle = block.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: through.append(1))  # noqa: B023
        with torch.no_grad(), Collector(linears(block), inputs_only=inputs_only) as collector:
            for i in range(3):
                try:
                    run_block(block, hidden[i : i + 1], calls[1])
                except StopForward:
                    ended += 1
                collector.next_batch()
        handle.remove()
        # the first tells which is the last
        assert (ended, len(through)) == ((2, 1) if inputs_only else (0, 3))
        found.append(collector.finish())
    for one, other in zip(*found, strict=True):
        assert one.layers == other.layers and one.tokens == other.tokens
        assert torch.equal(one.hessian, other.hessian)


def test_block_by_block_equals_the_whole_model(tiny: Path) -> None:
    """The stubs record what every block is called with: run alone, the blocks compute the model's hidden states."""
    from transformers import AutoModelForCausalLM

    opened = BlockwiseModel(open_files(tiny), "cpu", torch.float32)
    rows = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden, calls = opened.inputs(rows)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=rows, output_hidden_states=True).hidden_states
        assert torch.equal(hidden, expected[0])
        for index in range(len(opened.blocks)):
            block = opened.block(index)
            hidden = run_block(block, hidden, calls[index])
            opened.empty(block)
            if index + 1 < len(opened.blocks):  # the last entry is after the final norm
                assert torch.allclose(hidden, expected[index + 1], atol=1e-5)
    assert all(p.is_meta for p in opened.blocks.parameters())


class OnePlusNorm(nn.Module):
    """As in Gemma: the stored weight is what is added to one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_norms_of_one_plus_weight_are_told_apart() -> None:
    assert norm_offset(OnePlusNorm(16)) == 1.0
    assert norm_offset(nn.LayerNorm(16)) == 0.0
    norm = nn.RMSNorm(16)
    before = norm.weight
    assert norm_offset(norm) == 0.0 and norm.weight is before
