"""What may be moved inside a block: found by trying, checked here by really moving it, with scales that are no powers
of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.models.blockwise import BlockInputs, BlockwiseModel, linears, run_block
from quantlab.models.safetensors.files import open_files
from quantlab.models.scale_folding import ScaleFolds, fold_is_exact, probe_inputs, signature, structure
from quantlab.models.scaled import scaled_activations
from tests.models.tiny_architectures import ARCHITECTURES, MIXTURES, write_architecture

ROWS = torch.randint(1, 257, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The last block of an architecture, with what it is called with, its structure, and the model it belongs to."""
    folder: Path = tmp_path_factory.mktemp("structures")
    known: dict[str, Any] = {}

    def find(name: str) -> tuple[nn.Module, torch.Tensor, BlockInputs, ScaleFolds, BlockwiseModel]:
        if name not in known:
            model = BlockwiseModel(open_files(write_architecture(folder / name, name)), "cpu", torch.float32)
            hidden, calls = probe_inputs(model, ROWS)
            block = model.block(len(model.blocks) - 1)
            known[name] = (block, hidden, calls[-1], structure(block, hidden, calls[-1]), model)
        return known[name]

    return find


def scales(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) * 2 + 0.3


def multiply(block: nn.Module, name: str, by: torch.Tensor, dim: int) -> None:
    """Multiply rows (0) or columns (1) of a weight, and the bias with the rows."""
    module = block.get_submodule(name)
    weight = module._parameters["weight"]
    assert weight is not None
    weight.data = weight.data * (by[:, None] if dim == 0 and weight.dim() == 2 else by)
    bias = module._parameters.get("bias")
    if dim == 0 and bias is not None:
        bias.data = bias.data * by


class Restored:
    """Puts every parameter of a block back."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __enter__(self) -> None:
        self.before = {n: p.data for n, p in self.block.named_parameters()}

    def __exit__(self, *_: object) -> None:
        for n, p in self.block.named_parameters():
            p.data = self.before[n]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folds_into_norms_change_nothing(opened: Any, name: str) -> None:
    """Gemma's norms multiply by 1 + weight: there the norm is given the weight that amounts to the division."""
    block, hidden, call, found, _ = opened(name)
    assert found.norms
    with torch.no_grad():
        before = run_block(block, hidden, call)
        for fold in found.norms:
            norm = block.get_submodule(fold.norm)
            s = scales(len(norm.weight))
            with Restored(block):
                if "gemma" in name:
                    norm.weight.data = (1 + norm.weight.data) / s - 1
                else:
                    multiply(block, fold.norm, 1 / s, 0)
                for layer in (*fold.layers, *fold.others):
                    multiply(block, layer, s, 1)
                torch.testing.assert_close(run_block(block, hidden, call), before, rtol=1e-4, atol=1e-4)
                if fold.others:  # a router left as it is
                    multiply(block, fold.others[0], 1 / s, 1)
                    assert not torch.allclose(run_block(block, hidden, call), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folds_into_linears_change_nothing(opened: Any, name: str) -> None:
    block, hidden, call, found, _ = opened(name)
    with torch.no_grad():
        before = run_block(block, hidden, call)
        for pair in found.pairs:
            weight = block.get_submodule(pair.producer).weight
            by_row = scales(len(weight))
            rows = torch.ones(len(weight))
            rows[pair.rows] = 1 / by_row[pair.rows]
            with Restored(block):
                multiply(block, pair.producer, rows, 0)
                multiply(block, pair.consumer, by_row[pair.rows], 1)
                torch.testing.assert_close(run_block(block, hidden, call), before, rtol=1e-4, atol=1e-4)


QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj"}
EXPERTS = {f"mlp.experts.{i}.{w}" for i in range(4) for w in ("w1", "w3")}
GROUPS = [*range(16), *range(16), *range(16, 32), *range(16, 32)]  # heads of 16, two query heads a value head
EXPECTED: dict[str, tuple[list[tuple[str, set[str], set[str]]], list[tuple[str, str, list[int]]]]] = {
    "llama": (
        [("input_layernorm", QKV, set()), ("post_attention_layernorm", MLP, set())],
        [
            ("self_attn.v_proj", "self_attn.o_proj", GROUPS),
            ("mlp.up_proj", "mlp.down_proj", list(range(128))),
        ],
    ),
    "gemma2": (  # the outputs of post_attention_layernorm and post_feedforward_layernorm join the residual
        [("input_layernorm", QKV, set()), ("pre_feedforward_layernorm", MLP, set())],
        [
            ("self_attn.v_proj", "self_attn.o_proj", GROUPS),
            ("mlp.up_proj", "mlp.down_proj", list(range(128))),
        ],
    ),
    "phi": (
        [("input_layernorm", QKV | {"mlp.fc1"}, set())],
        [("self_attn.v_proj", "self_attn.dense", list(range(64)))],
    ),
    "phi3": (
        [("input_layernorm", {"self_attn.qkv_proj"}, set()), ("post_attention_layernorm", {"mlp.gate_up_proj"}, set())],
        [
            ("self_attn.qkv_proj", "self_attn.o_proj", [96 + i for i in GROUPS]),
            ("mlp.gate_up_proj", "mlp.down_proj", list(range(128, 256))),
        ],
    ),
    "gpt_neox": (  # rows: for each head queries, keys, values
        [
            ("input_layernorm", {"attention.query_key_value"}, set()),
            ("post_attention_layernorm", {"mlp.dense_h_to_4h"}, set()),
        ],
        [("attention.query_key_value", "attention.dense", [h * 48 + 32 + i for h in range(4) for i in range(16)])],
    ),
    "mixtral": (
        [("input_layernorm", QKV, set()), ("post_attention_layernorm", EXPERTS, {"mlp.gate"})],
        [
            ("self_attn.v_proj", "self_attn.o_proj", GROUPS),
            *((f"mlp.experts.{i}.w3", f"mlp.experts.{i}.w2", list(range(128))) for i in range(4)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_known_architectures(opened: Any, name: str) -> None:
    found = opened(name)[3]
    norms, pairs = EXPECTED[name]
    assert [(f.norm, set(f.layers), set(f.others)) for f in found.norms] == norms
    assert sorted((p.producer, p.consumer, p.rows.tolist()) for p in found.pairs) == sorted(pairs)


@pytest.mark.parametrize(
    ("name", "norm", "layers", "exact"),
    [
        ("llama", "input_layernorm", QKV, True),
        ("llama", "input_layernorm", QKV - {"self_attn.k_proj"}, False),
        ("llama", "input_layernorm", QKV | {"mlp.up_proj"}, False),
        ("phi", "input_layernorm", QKV, False),
        ("phi", "input_layernorm", QKV | {"mlp.fc1"}, True),
        ("mixtral", "post_attention_layernorm", EXPERTS, False),
        ("mixtral", "post_attention_layernorm", EXPERTS | {"mlp.gate"}, True),
        ("gemma2", "post_feedforward_layernorm", QKV, False),
        ("gemma2", "pre_feedforward_layernorm", MLP, True),
    ],
)  # fmt: skip
def test_a_fold_is_exact_only_with_every_reader(
    opened: Any, name: str, norm: str, layers: set[str], exact: bool
) -> None:
    block, hidden, call, _, _ = opened(name)
    assert fold_is_exact(block, hidden, call, norm, sorted(layers)) is exact


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "mixtral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_blocks_have_the_same_structure(opened: Any, name: str, dtype: torch.dtype) -> None:
    model = BlockwiseModel(opened(name)[4].files, "cpu", dtype)
    hidden, calls = probe_inputs(model, ROWS)
    block = model.block(len(model.blocks) - 1)
    found, expected = structure(block, hidden, calls[-1]), opened(name)[3]
    assert found.norms == expected.norms
    assert [(p.producer, p.consumer, p.rows.tolist()) for p in found.pairs] == [
        (p.producer, p.consumer, p.rows.tolist()) for p in expected.pairs
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_no_token_reached_are_counted(opened: Any, name: str) -> None:
    """A router that never chooses the last expert: its linears still read the norm, and are a pair."""
    block, hidden, call, found, _ = opened(name)
    router = getattr(block.mlp, "gate", None) or block.mlp.router
    plain, reached = router.forward, []
    first = linears(block)["mlp.experts.3." + block.mlp.experts[3].roles[0]]
    handle = first.register_forward_pre_hook(lambda m, args: reached.append(len(args[0])))
    router.forward = lambda x: _without_last(plain, x)
    try:
        again = structure(block, hidden, call)
    finally:
        del router.forward
        handle.remove()
    assert reached and set(reached) == {0}
    assert [set(f.layers) for f in again.norms] == [set(f.layers) for f in found.norms]
    assert len(again.pairs) == len(found.pairs)


def _without_last(plain: Any, x: torch.Tensor) -> Any:
    """What a router says, but expert 0 wherever it chose expert 3."""
    logits, weights, chosen = plain(x)
    return logits, weights, torch.where(chosen == 3, 0, chosen)


def test_blocks_of_one_signature_have_one_structure(opened: Any) -> None:
    model = opened("deepseek_v3")[4]
    first, last = model.blocks[0], model.blocks[1]
    assert signature(first) != signature(last)  # a dense block before those with experts
    llama = opened("llama")[4]
    assert signature(llama.blocks[0]) == signature(llama.blocks[1])


def test_probing_leaves_the_block_as_it_was(opened: Any) -> None:
    block, hidden, call, _, _ = opened("mixtral")
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    out = run_block(block, hidden, call)
    structure(block, hidden, call)
    assert all(torch.equal(before[n], p) for n, p in block.named_parameters())
    assert torch.equal(run_block(block, hidden, call), out)
    assert not [m for m in block.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_activations_that_awq_readers_scale(opened: Any) -> None:
    block = opened("gpt_neox")[0]
    assert scaled_activations(block, "gpt_neox") == {"mlp.act.scales": 128}
    assert scaled_activations(block, "llama") == {}
