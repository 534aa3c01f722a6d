"""Packings round-trip, agree with gptqmodel's own unpacking, and refuse what they cannot hold."""

import pytest
import torch

from quantlab.formats import FORMATS, bits, layout
from quantlab.formats.shapes import BITS, common_group_sizes, refuse


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96, 352])
def test_bit_stream_round_trips(width: int, count: int) -> None:
    codes = torch.randint(0, 2**width, (count, 7), generator=torch.Generator().manual_seed(count))
    words = bits.pack(codes, width)
    assert words.dtype == torch.int32 and words.shape == (count * width // 32, 7)
    assert torch.equal(bits.unpack(words, width, count), codes.to(torch.int32))


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


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_layout_round_trips(name: str, width: int, group_size: int) -> None:
    if width not in BITS[name]:
        pytest.skip("not held by this layout")
    module = layout(name)
    codes, scales, zeros, group_of = random_layer(width, group_size, module.ZERO_MIN)
    packed = module.pack(codes, scales, zeros, group_of, bits=width)
    assert set(packed) == set(module.SUFFIXES)
    again = module.unpack(packed, bits=width, group_size=group_size)
    for before, after in zip((codes, scales, zeros, group_of), again, strict=True):
        assert torch.equal(before.to(torch.float64), after.to(torch.float64))


def test_gptq_keeps_a_column_order_and_awq_refuses_it() -> None:
    codes, scales, zeros, group_of = random_layer(4, 32, 1)
    shuffled = group_of[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    packed = layout("gptq").pack(codes, scales, zeros, shuffled, bits=4)
    assert torch.equal(layout("gptq").unpack(packed, bits=4, group_size=32)[3], shuffled)
    with pytest.raises(ValueError, match="column order"):
        layout("awq").pack(codes, scales, zeros, shuffled, bits=4)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gptqmodel_reads_the_same_weights(width: int) -> None:
    """The kernels that transformers uses are the judge of what the bits mean."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    codes, scales, zeros, group_of = random_layer(width, 32, 1)
    packed = layout("gptq").pack(codes, scales, zeros, group_of, bits=width)
    kernel = TorchLinear(
        bits=width, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64, bias=False
    )
    for suffix, tensor in packed.items():
        getattr(kernel, suffix).data.copy_(tensor)
    convert_gptq_v1_to_v2_format_module(kernel, bits=width, pack_dtype=torch.int32)
    read = kernel.dequantize_weight().t().to(torch.float32)
    expected = (codes.to(torch.float32) - zeros[:, group_of]) * scales[:, group_of]
    assert torch.allclose(read, expected, rtol=2e-3, atol=1e-6)


def test_gptqmodel_reads_awq() -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    codes, scales, zeros, group_of = random_layer(4, 32, 0)
    packed = layout("awq").pack(codes, scales, zeros, group_of, bits=4)
    read = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, 32).t().to(torch.float32)
    expected = (codes.to(torch.float32) - zeros[:, group_of]) * scales[:, group_of]
    assert torch.allclose(read, expected, rtol=2e-3, atol=1e-6)


def test_shapes_say_what_works() -> None:
    assert refuse("gptq", 4, 128, 256, 256) is None
    reason = refuse("gptq", 4, 128, 352, 128)
    assert reason is not None and "352" in reason and "128" in reason and "16, 32, -1" in reason
    assert refuse("awq", 3, 32, 128, 128) == "the awq layout holds 4 bits, not 3"
    assert "40 outputs" in str(refuse("gptq", 3, -1, 64, 40))
    assert refuse("awq", 4, 32, 64, 12) is not None
    assert common_group_sizes({128, 352}) == [16, 32]
