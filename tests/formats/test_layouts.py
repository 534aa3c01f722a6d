"""Packings round-trip, agree with gptqmodel's own unpacking, and refuse what they cannot hold."""

import pytest
import torch

from quantlab.formats import bits, format_module
from quantlab.registry.formats import FORMATS, PACKING, Contents, common_group_sizes, fitting_widths, misfit


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [32, 96, 352])
def test_bit_stream_round_trips(width: int, count: int) -> None:
    codes = torch.randint(0, 2**width, (count, 7), generator=torch.Generator().manual_seed(count))
    words = bits.pack(codes, width)
    assert words.dtype == torch.int32 and words.shape == (count * width // 32, 7)
    assert torch.equal(bits.unpack(words, width, count), codes.to(torch.int32))
    # The stream read as one long number, column by column.
    for column in range(7):
        stream = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(words[:, column]))
        assert stream == sum(int(c) << width * i for i, c in enumerate(codes[:, column]))


def test_bit_stream_refuses_half_words() -> None:
    with pytest.raises(ValueError, match="do not fill whole"):
        bits.pack(torch.zeros(31, 1, dtype=torch.int64), 4)


def random_layer(
    width: int, group_size: int, zero_min: int, out: int = 64, columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seeded = torch.Generator().manual_seed(width * group_size)
    groups = columns // group_size
    codes = torch.randint(0, 2**width, (out, columns), generator=seeded).to(torch.uint8)
    scales = (torch.rand(out, groups, generator=seeded) + 0.5).to(torch.bfloat16).to(torch.float32) / 64
    zeros = torch.randint(zero_min, 2**width, (out, groups), generator=seeded).to(torch.int32)
    return codes, scales, zeros, torch.arange(columns) // group_size


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_layout_round_trips(name: str, width: int, group_size: int) -> None:
    if width not in FORMATS[name].bits:
        pytest.skip("not held by this layout")
    module = format_module(name)
    codes, scales, zeros, group_of = random_layer(width, group_size, FORMATS[name].zero_min)
    symmetric = name == "compressed-tensors"  # which has no room for zeros
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (width - 1))
    packed = module.pack(
        codes, scales, zeros, group_of, bits=width, group_size=group_size, symmetric=symmetric
    )
    assert set(packed) <= set(FORMATS[name].suffixes) and FORMATS[name].suffixes[0] in packed
    again = module.unpack(packed, bits=width, group_size=group_size)
    for before, after in zip((codes, scales, zeros, group_of), again, strict=True):
        assert torch.equal(before.to(torch.float64), after.to(torch.float64))


def test_gptq_keeps_a_column_order_and_the_others_refuse_it() -> None:
    codes, scales, zeros, group_of = random_layer(4, 32, 1)
    shuffled = group_of[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    packed = format_module("gptq").pack(
        codes, scales, zeros, shuffled, bits=4, group_size=32, symmetric=False
    )
    assert torch.equal(format_module("gptq").unpack(packed, bits=4, group_size=32)[3], shuffled)
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="column order"):
            format_module(name).pack(codes, scales, zeros, shuffled, bits=4, group_size=32, symmetric=True)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gptqmodel_reads_the_same_weights(width: int) -> None:
    """The kernels that transformers uses are the judge of what the bits mean."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    codes, scales, zeros, group_of = random_layer(width, 32, 1)
    packed = format_module("gptq").pack(
        codes, scales, zeros, group_of, bits=width, group_size=32, symmetric=False
    )
    kernel = TorchLinear(
        bits=width, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64, bias=False
    )
    for suffix, tensor in packed.items():
        getattr(kernel, suffix).data.copy_(tensor)
    convert_gptq_v1_to_v2_format_module(kernel, bits=width, pack_dtype=torch.int32)
    read = kernel.dequantize_weight().t().to(torch.float32)
    expected = (codes.to(torch.float32) - zeros[:, group_of]) * scales[:, group_of]
    assert torch.allclose(read, expected, rtol=2e-3, atol=1e-6)


ORDERED = {"act_order": True, "static_groups": False, "damp": 0.01}
SETTINGS = {"symmetric": True, "options": ORDERED, "floating": False, "quantizer": "quantlab:0"}


def test_gptq_names_what_it_leaves_in_the_blocks() -> None:
    """Readers take every linear of a block for quantized, so a router that is not has to be told."""
    layers = {f"model.layers.{i}.{part}": (4, 32) for i in (0, 11) for part in ("attn.q", "mlp.experts.3.up")}
    config = format_module("gptq").config
    settings = SETTINGS | {"bits": 4, "group_size": 32}
    assert "modules_in_block_to_quantize" not in config(Contents(layers, ignore=["lm_head"], **settings))
    routers = [f"model.layers.{i}.mlp.gate" for i in (0, 11)]
    found = config(Contents(layers, ignore=["lm_head", *routers], **settings))
    assert found["modules_in_block_to_quantize"] == [["attn.q", "mlp.experts.3.up"]]
    with pytest.raises(ValueError, match="in every block or in none: mlp.gate"):
        config(Contents(layers | {"model.layers.3.mlp.gate": (4, 32)}, ignore=routers, **settings))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_layouts_of_one_width_refuse_several(name: str) -> None:
    settings = SETTINGS | {"bits": 4, "group_size": 32, "ignore": []}
    for odd in ((3, 32), (4, 64)):
        with pytest.raises(ValueError, match="one width"):
            format_module(name).config(Contents({"a.0.b": (4, 32), "a.0.c": odd}, **settings))


def test_static_groups_are_in_place_for_readers() -> None:
    settings = SETTINGS | {"bits": 4, "group_size": 32, "ignore": []}
    moved = format_module("gptq").config(Contents({"a.0.b": (4, 32)}, **settings))
    in_place = settings | {"options": ORDERED | {"static_groups": True}}
    static = format_module("gptq").config(Contents({"a.0.b": (4, 32)}, **in_place))
    assert (moved["desc_act"], moved["static_groups"]) == (True, False)
    assert (static["desc_act"], static["static_groups"]) == (False, True)


def test_gptqmodel_reads_awq() -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    codes, scales, zeros, group_of = random_layer(4, 32, 0)
    packed = format_module("awq").pack(codes, scales, zeros, group_of, bits=4, group_size=32, symmetric=False)
    read = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, 32).t().to(torch.float32)
    expected = (codes.to(torch.float32) - zeros[:, group_of]) * scales[:, group_of]
    assert torch.allclose(read, expected, rtol=2e-3, atol=1e-6)


def test_shapes_say_what_works() -> None:
    assert misfit("gptq", 4, 128, 256, 256) is None
    reason = misfit("gptq", 4, 128, 352, 128)
    assert reason is not None and "352" in reason and "128" in reason and "16, 32, -1" in reason
    assert misfit("awq", 3, 32, 128, 128) == "the awq format holds 4 bits, not 3"
    assert "40 outputs" in str(misfit("gptq", 3, -1, 64, 40))
    assert misfit("awq", 4, 32, 64, 12) is not None
    assert common_group_sizes({128, 352}) == [16, 32]
    assert misfit("compressed-tensors", 3, 16, 48, 50) is None
    assert "group_size 32" in str(misfit("compressed-tensors", 3, 32, 48, 50))


def test_shapes_say_which_widths_fit() -> None:
    assert fitting_widths("gptq", 32, 128, 256) == (2, 3, 4, 8)
    assert fitting_widths("gptq", 16, 48, 48) == (2, 4, 8)  # 48 codes of 3 bits leave a word half empty
    assert fitting_widths("gptq", 4, 4, 4) == (8,)
    assert fitting_widths("awq", 16, 48, 48) == (4,) and fitting_widths("awq", 16, 48, 50) == ()
    assert fitting_widths("compressed-tensors", 16, 48, 50) == (2, 3, 4, 8)
    assert fitting_widths("compressed-tensors", 32, 48, 50) == ()
    for name in PACKING:  # whatever is said to fit does
        for width in fitting_widths(name, 16, 48, 64):
            zeros = torch.full((64, 3), 2 ** (width - 1), dtype=torch.int32)
            codes = torch.randint(0, 2**width, (64, 48)).to(torch.uint8)
            packed = format_module(name).pack(
                codes,
                torch.ones(64, 3),
                zeros,
                torch.arange(48) // 16,
                bits=width,
                group_size=16,
                symmetric=True,
            )
            assert torch.equal(format_module(name).unpack(packed, bits=width, group_size=16)[0], codes)
