"""What is peculiar about a layer is found on the skeleton, by running and reading the model's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantlab.models.blockwise import layers_of
from quantlab.models.layers import as_weight, is_layer, is_transposed, matrix
from quantlab.models.safetensors.files import open_files
from tests.conftest import byte_tokenizer
from tests.zoo import builder

# Model type: the ends of names, and what is found there.
PECULIAR: dict[str, dict[str, set[str]]] = {
    "gpt2": {"attn.c_attn": {"transposed", "read by itself"}, "mlp.c_fc": {"transposed", "read by itself"}},
    "falcon": {"dense_h_to_4h": {"subclass", "read by itself"}},
    "ctrl": {"ffn.0": {"numbered"}},
    "nanochat": {"o_proj": {"read by its block"}, "q_proj": set()},
    "mamba2": {"out_proj": {"read by its block", "read when run"}, "in_proj": set()},
    "llama": {"q_proj": set(), "down_proj": set()},
}


@pytest.mark.parametrize("name", PECULIAR)
def test_traits(tmp_path: Path, name: str) -> None:
    layers = layers_of(open_files(builder.write(tmp_path, name, byte_tokenizer())))
    for end, expected in PECULIAR[name].items():
        found = {frozenset(layers.traits.get(n, ())) for n in layers.shapes if n.endswith("." + end)}
        assert found == {frozenset(expected)}, end
    if not any(PECULIAR[name].values()):
        assert not layers.traits


def test_layers_are_as_they_were_afterwards(tmp_path: Path) -> None:
    """Looking at them takes their weights away for a moment."""
    from quantlab.models.blockwise import BlockwiseModel

    opened = BlockwiseModel(
        open_files(builder.write(tmp_path, "nanochat", byte_tokenizer())), "cpu", torch.float32
    )
    kinds = [type(m) for m in opened.model.modules()]
    assert opened.layers.traits and [type(m) for m in opened.model.modules()] == kinds
    block = opened.block(0)
    assert all(m.weight.device.type == "cpu" for m in block.modules() if is_layer(m))  # type: ignore[union-attr]


def test_a_transposed_layer_is_the_same_matrix() -> None:
    from transformers.pytorch_utils import Conv1D

    layer, plain = Conv1D(3, 5), torch.nn.Linear(5, 3)
    assert is_transposed(layer) and is_layer(layer) and not is_transposed(plain)
    assert matrix(layer).shape == matrix(plain).shape == (3, 5)
    value = torch.randn(3, 5)
    layer.weight.data = as_weight(layer, value)
    assert torch.equal(matrix(layer), value) and torch.equal(as_weight(plain, value), value)
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), x @ value.t() + layer.bias)
