"""Measured sensitivities against the same thing computed with the whole model in memory, and against divergences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.models.blockwise import BlockwiseModel, linears
from quantlab.models.lm_head import head
from quantlab.models.safetensors.files import open_files
from quantlab.quant.mixed_precision.sensitivity import Probe, sensitivities

from ..conftest import write_tiny

ROWS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(3))


def write(folder: Path, kind: str) -> Path:
    """A random model of some architecture, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "initializer_range": 0.15, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": False},
        "gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        "gpt_neox": {},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **common, **own[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(open_files(folder), "cpu", torch.float32)


def whole(folder: Path, rows: torch.Tensor, seed: int) -> dict[str, float]:
    """The same by differentiating the model in one piece."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    for row in rows:
        scores = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        found = torch.autograd.grad(scores.gather(1, labels).sum(), list(outputs.values()))
        for name, gradient in zip(outputs, found, strict=True):
            square = gradient.square().sum().item() / gradient.shape[-1] / 2
            sums[name] = sums.get(name, 0.0) + square / rows.numel()
    return sums


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_block_by_block_is_the_same_as_in_one_piece(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / kind, kind)
    expected = whole(folder, ROWS, 5)
    steps: list[int] = []
    found = sensitivities(opened(folder), ROWS, seed=5, advance=steps.append)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert steps == [1] * 6


def test_nothing_stays_in_memory_and_the_model_can_go_on(tmp_path: Path) -> None:
    model = opened(write(tmp_path / "m", "llama"))
    first = sensitivities(model, ROWS)
    assert all(p.is_meta for p in model.model.parameters())
    assert sensitivities(model, ROWS) == first
    hidden, calls = model.inputs(ROWS)
    assert len(calls) == 3 and hidden.shape == (3, 24, 64)
    assert sensitivities(model, ROWS, seed=1) != first


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_the_head_alone_gives_the_logits_of_the_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / kind, kind)
    model = opened(folder)
    hidden, calls = model.inputs(ROWS)
    probe = Probe(hidden)
    for index, call in enumerate(calls):
        probe.forward(model.block(index), call)
    with head(model) as logits, torch.no_grad():
        found = logits(probe.states[-1])
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ROWS).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_head_of_a_tied_model_in_bfloat16(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tied", tie=True)
    found = sensitivities(BlockwiseModel(open_files(folder), "cpu", torch.bfloat16), ROWS)
    exact = sensitivities(opened(folder), ROWS)
    for name, value in exact.items():  # other labels may be drawn, and squares of gradients are not exact
        assert found[name] == pytest.approx(value, rel=0.5), name


def test_experts_count_by_the_tokens_that_reach_them(tmp_path: Path) -> None:
    model = opened(write(tmp_path / "moe", "mixtral"))
    found = sensitivities(model, ROWS[:1, :3])
    experts = {name: value for name, value in found.items() if "experts" in name}
    assert len(experts) == 3 * 4 * 3
    assert all(value > 0 and math.isfinite(value) for value in found.values())
    names = {
        model.names.on_disk(f"{model.prefix}.{i}.{n}") for i, b in enumerate(model.blocks) for n in linears(b)
    }
    assert found.keys() == names


@torch.no_grad()
def test_it_predicts_the_divergence_that_an_error_causes(tmp_path: Path) -> None:
    """Errors of equal loss, one layer at a time: the divergence follows the sensitivity over orders of magnitude."""
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "m", "llama")
    rows = torch.randint(1, 250, (8, 48), generator=torch.Generator().manual_seed(0))
    measured = sensitivities(opened(folder), rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = model(input_ids=rows).logits.log_softmax(-1)
    noise = torch.Generator().manual_seed(1)
    ratios = []
    for name, sensitivity in measured.items():
        layer = model.get_submodule(name)
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        model(input_ids=rows)
        handle.remove()
        x = seen[0].reshape(-1, layer.in_features)  # [tokens, in]
        weight = layer.weight.detach().clone()
        found = []
        for _ in range(4):
            error = torch.randn(weight.shape, generator=noise)
            loss = (x @ error.t()).square().sum(dim=1).mean()
            error *= (1e-4 / sensitivity / loss).sqrt()  # a loss that should cost 1e-4 nats a token
            layer.weight.copy_(weight + error)
            new = model(input_ids=rows).logits.log_softmax(-1)
            found.append((plain.exp() * (plain - new)).sum(-1).mean().item())
        layer.weight.copy_(weight)
        ratios.append(sum(found) / len(found) / 1e-4)
    assert min(ratios) > 0.4
    assert max(ratios) < 2.5
    assert max(measured.values()) > 10 * min(measured.values())


def test_steps_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    model = opened(write_tiny(tmp_path / "m"))
    hidden, calls = model.inputs(ROWS)
    probe = Probe(hidden)
    with pytest.raises(RuntimeError, match="score comes before"):
        probe.backward(model.block(0), calls[0])


def test_what_overflows_is_refused(tmp_path: Path) -> None:
    model = opened(write(tmp_path / "m", "llama"))
    hidden, calls = model.inputs(ROWS)
    probe = Probe(hidden)
    probe.forward(model.block(0), calls[0])
    # only its gradient is infinite
    probe.score(lambda states: states + (states - states.detach()) * 3e38 * 3e38)
    with pytest.raises(ValueError, match="gradients overflow"):
        probe.backward(model.block(0), calls[0])
    again = Probe(hidden)
    with pytest.raises(ValueError, match="predictions are not finite"):
        again.score(lambda states: states * 1e38 * 1e38)
