"""The compressed-tensors layout against the package itself, and checkpoints of it in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantlab.formats import format_module
from quantlab.quant.grid import Grid, round_to_grid, storable_scales
from quantlab.registry.formats import Contents

pytest.importorskip("compressed_tensors")

CT = format_module("compressed-tensors")
SETTINGS: dict[str, Any] = {
    "options": {"damp": 0.01},
    "floating": False,
    "quantizer": "quantlab:0",
}


def scheme_of(described: dict[str, Any], group: str = "group_0") -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(described).config_groups[group]


def described(layers: dict[str, tuple[int, int]], **more: Any) -> dict[str, Any]:
    bits, size = next(iter(layers.values()))
    settings = SETTINGS | {"symmetric": True, "ignore": ["lm_head"]} | more
    found: dict[str, Any] = CT.config(Contents(layers, bits=bits, group_size=size, **settings))
    return found


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_package_packs_and_unpacks_alike(width: int, group_size: int, dtype: torch.dtype) -> None:
    """48 codes leave half-empty words at most widths; the weights agree to the bit in every type."""
    from compressed_tensors.compressors import BaseCompressor

    seeded = torch.Generator().manual_seed(width)
    weight = torch.randn(50, 48, generator=seeded) * 0.1
    ours = round_to_grid(weight, Grid(width, group_size, True))
    packed = CT.pack(
        ours.codes, ours.scales, ours.zeros, ours.group_of, bits=width, group_size=group_size, symmetric=True
    )
    packed["weight_scale"] = packed["weight_scale"].to(dtype)
    scheme = scheme_of(described({"a": (width, group_size)}))
    package = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = package.decompress(packed, scheme)["weight"]
    expected = (ours.codes.to(torch.float32) - ours.zeros[:, ours.group_of]) * ours.scales[:, ours.group_of]
    assert theirs.dtype == dtype and torch.equal(theirs, expected.to(dtype))
    offset = 2 ** (width - 1)
    again = package.compress(
        {"weight": expected, "weight_scale": ours.scales, "weight_zero_point": (ours.zeros - offset).to(torch.int8)},
        scheme,
    )  # fmt: skip
    for name in packed.keys() - {"weight_scale"}:
        assert torch.equal(again[name], packed[name]), name
    assert again.keys() == packed.keys()
    codes, scales, zeros, group_of = CT.unpack(packed, bits=width, group_size=group_size)
    assert torch.equal(codes, ours.codes) and torch.equal(zeros, ours.zeros)
    assert torch.equal(scales, ours.scales) and torch.equal(group_of, ours.group_of)


def test_the_package_reads_float8_alike() -> None:
    from compressed_tensors.compressors import BaseCompressor

    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    scales = storable_scales(weight.abs().amax(dim=1, keepdim=True) / 448)
    codes = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    zeros = torch.zeros(24, 1, dtype=torch.int32)
    group_of = torch.zeros(40, dtype=torch.int64)
    packed = CT.pack(codes, scales, zeros, group_of, bits=8, group_size=-1, symmetric=True)
    assert packed.keys() == {"weight", "weight_scale"} and packed["weight"].dtype == torch.float8_e4m3fn
    scheme = scheme_of(described({"a": (8, -1)}, floating=True))
    assert scheme.weights.type == "float" and scheme.input_activations is None
    theirs = BaseCompressor.get_value_from_registry("float-quantized").decompress(packed, scheme)["weight"]
    assert torch.equal(theirs, codes.to(torch.float32) * scales)
    for before, after in zip(
        (codes, scales, zeros, group_of), CT.unpack(packed, bits=8, group_size=-1), strict=True
    ):
        assert before.dtype == after.dtype and torch.equal(before.float(), after.float())


def test_a_column_order_is_refused_and_groups_in_place_are_not() -> None:
    with pytest.raises(ValueError, match="column order"):
        described({"a": (4, 32)}, options={"act_order": True})
    static = described({"a": (4, 32)}, options={"act_order": True, "static_groups": True})
    assert scheme_of(static).weights.actorder == "weight"


def test_asymmetric_grids_are_refused() -> None:
    ours = round_to_grid(torch.randn(8, 32), Grid(4, 16, False))
    with pytest.raises(ValueError, match="symmetric grids only"):
        CT.pack(ours.codes, ours.scales, ours.zeros, ours.group_of, bits=4, group_size=16, symmetric=False)
    with pytest.raises(ValueError, match="symmetric grids only"):
        described({"a": (4, 32)}, symmetric=False)


def tiny_model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).to(dtype)
    return model


def write(model: Any, out: Path, kinds: dict[str, tuple[int, int]], floating: bool) -> None:
    """Quantize the named linears into ``out``, and the same in the model, by dequantized weights."""
    config = model.config.to_dict()
    dtype = model.dtype
    stored: dict[str, torch.Tensor] = {}
    for name, (width, size) in kinds.items():
        weight = model.get_submodule(name).weight
        if floating:
            scales = storable_scales(weight.float().abs().amax(dim=1, keepdim=True) / 448)
            codes = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
            zeros, group_of = torch.zeros(len(weight), 1), torch.zeros(weight.shape[1], dtype=torch.int64)
        else:
            ours = round_to_grid(weight.float(), Grid(width, size, True))
            codes, scales, zeros, group_of = ours.codes, ours.scales, ours.zeros, ours.group_of
        packed = CT.pack(codes, scales, zeros, group_of, bits=width, group_size=size, symmetric=True)
        packed["weight_scale"] = packed["weight_scale"].to(dtype)
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        dequantized = (codes.float() - zeros[:, group_of]) * scales[:, group_of]
        weight.data.copy_(dequantized)
    taken = {f"{name}.weight" for name in kinds}
    stored |= {n: p.detach().clone() for n, p in model.state_dict().items() if n not in taken}
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    ignore = [name for name in linears if name not in kinds]
    config["quantization_config"] = described(kinds, floating=floating, ignore=ignore)
    (out / "config.json").write_text(json.dumps(config, default=str))


NAMES = [
    f"model.layers.{block}.{part}"
    for block in range(2)
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
UNIFORM = [(2, 16), (3, 32), (4, 32), (4, -1), (8, -1), (8, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*UNIFORM, "mixed", "float8", "some left"], ids=str)
def test_transformers_computes_with_it(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint loaded by plain transformers gives the logits of the dequantized weights."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(dtype)
    kinds = {name: kind if isinstance(kind, tuple) else (4, 16) for name in NAMES}
    if kind == "mixed":
        kinds = {name: ((2, 3, 4, 8)[i % 4], 16 if i % 3 else -1) for i, name in enumerate(NAMES)}
    elif kind == "float8":
        kinds = dict.fromkeys(NAMES, (8, -1))
    elif kind == "some left":
        kinds = {name: (4, 16) for name in NAMES if not name.endswith("0.mlp.down_proj")}
    write(model, tmp_path / "out", kinds, kind == "float8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert loaded.dtype == dtype
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        theirs, ours = loaded(input_ids=ids).logits, model(input_ids=ids).logits
    for name in NAMES:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight), name
    assert torch.equal(theirs, ours)
