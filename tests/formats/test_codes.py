"""Codes on other grids: the same weights to the bit, or none; compared with trying every zero."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantlab.formats import format_module
from quantlab.formats.codes import Codes, refit, rounding_error, spans
from quantlab.formats.gguf.groups import SIMPLE, block_error, blocks_of, codes_of, no_blocks
from quantlab.formats.gguf.pack import Blocks, pack, unpack
from quantlab.registry.block_types import BLOCK_TYPES


def random_codes(
    bits: int, width: int, *, symmetric: bool, seed: int = 0, rows: int = 16, columns: int = 128
) -> Codes:
    seeded = torch.Generator().manual_seed(seed)
    groups = columns // width
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=seeded, dtype=torch.int32)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.rand(rows, groups, generator=seeded) + 0.5).to(torch.float16).to(torch.float32) / 64
    codes = torch.randint(0, 2**bits, (rows, columns), generator=seeded).to(torch.uint8)
    return Codes(codes, scales, zeros, torch.arange(columns) // width, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("to", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zero_min", [0, 1])
def test_refitted_codes_are_the_same_weights_or_none(
    bits: int, to: int, symmetric: bool, zero_min: int
) -> None:
    """Small groups, so that some levels fit; whether a zero does is tried for every zero there is."""
    found = 0
    for seed in range(12):
        held = random_codes(bits, 2, symmetric=symmetric, seed=seed, rows=1, columns=4)
        for wanted in (True, False):
            fitted = refit(held, to, symmetric=wanted, zero_min=zero_min)
            allowed = [2 ** (to - 1)] if wanted else range(zero_min, 2**to)
            levels = held.levels().view(2, 2)
            good = [
                any((group + zero >= 0).all() and (group + zero < 2**to).all() for zero in allowed)
                for group in levels
            ]
            assert (fitted is not None) == all(good)
            if fitted is not None:
                found += 1
                assert torch.equal(fitted.dequantize(), held.dequantize())
                assert int(fitted.zeros.min()) >= zero_min and int(fitted.codes.max()) < 2**to
    assert found or to < bits


def test_a_column_order_is_kept() -> None:
    held = random_codes(4, 32, symmetric=False)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    mixed = held._replace(group_of=held.group_of[order], codes=held.codes[:, order])
    assert not mixed.ordered and held.ordered
    assert torch.equal(mixed.dequantize(), held.dequantize()[:, order])
    assert all(torch.equal(one, other) for one, other in zip(spans(mixed), spans(held), strict=True))
    wider = refit(mixed, 8, symmetric=True)
    assert wider is not None and torch.equal(wider.dequantize(), mixed.dequantize())
    assert "out of order" in no_blocks(mixed)
    with pytest.raises(ValueError, match="act_order"):
        blocks_of(mixed, BLOCK_TYPES["Q5_0"])


@pytest.mark.parametrize(("bits", "symmetric", "exact"), [
    (4, True, "Q4_0 Q5_0 Q8_0"), (3, True, "Q4_0 Q5_0 Q8_0"), (3, False, "Q4_0 Q5_0 Q8_0"),
    (2, False, "Q4_0 Q5_0 Q8_0"),
    (4, False, "Q5_0 Q8_0"), (8, True, "Q8_0"), (8, False, ""),
])  # fmt: skip
@pytest.mark.parametrize("width", [32, 64, 128])
def test_blocks_hold_groups_to_the_bit(bits: int, symmetric: bool, exact: str, width: int) -> None:
    """Through the file's bytes; types with a minimum are exact where float16 holds it, else off by its rounding."""
    held = random_codes(bits, width, symmetric=symmetric)
    for kind in SIMPLE:
        error = block_error(held.scales, held.zeros, *spans(held), kind)
        if not kind.minimum:
            assert (error == 0) == (kind.name in exact.split()) and error in (0, None)
        if error is None:
            with pytest.raises(ValueError, match="beyond the codes"):
                blocks_of(held, kind)
            continue
        again = unpack(pack(blocks_of(held, kind)), kind).dequantize()
        off = (again - held.dequantize()).abs().max().item()
        assert (off == 0) == (error == 0) and error < 2**-11
        assert off <= error * float((held.zeros * held.scales).abs().max())


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q6_K", "Q3_K"])
def test_levels_of_block_types_are_integer_codes(name: str) -> None:
    """Also where scales are negative, as llama.cpp writes them."""
    kind, seeded = BLOCK_TYPES[name], torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2**kind.bits, (4, 512), generator=seeded).to(torch.uint8)
    d = torch.randn(4, 512 // kind.block, generator=seeded).to(torch.float16).to(torch.float32)
    scales = None
    if kind.scale_range:
        low, high = kind.scale_range
        scales = torch.randint(low, high + 1, (4, 512 // kind.group), generator=seeded).to(torch.int16)
    blocks = Blocks(kind, codes, d, None, scales)
    found = codes_of(blocks)
    assert torch.equal(found.dequantize(), blocks.dequantize())
    assert (rounding_error(found.scales, torch.float16) == 0) == (scales is None)


def test_minima_are_zeros_only_where_they_are_whole_steps() -> None:
    held = random_codes(4, 32, symmetric=False)
    small = held._replace(
        scales=held.scales.to(torch.bfloat16).to(torch.float32), zeros=held.zeros.clamp(max=7)
    )
    blocks = blocks_of(small, BLOCK_TYPES["Q4_1"])
    again = codes_of(unpack(pack(blocks), blocks.kind))
    assert torch.equal(again.dequantize(), small.dequantize()) and torch.equal(again.zeros, small.zeros)
    off = Blocks(blocks.kind, blocks.codes, blocks.d, blocks.d * 2.5)
    with pytest.raises(ValueError, match=r"the minima of 100\.0% of its groups are no whole number of steps"):
        codes_of(off)
    with pytest.raises(ValueError, match="no number"):
        codes_of(Blocks(BLOCK_TYPES["Q4_0"], blocks.codes, blocks.d * float("nan")))


def test_groups_that_are_no_blocks_say_why() -> None:
    assert "16 columns" in no_blocks(random_codes(4, 16, symmetric=True))
    assert "48 inputs" in no_blocks(random_codes(4, 48, symmetric=True, columns=48))
    assert no_blocks(random_codes(4, 96, symmetric=True, columns=96)) == ""


def test_rounding_errors_are_relative() -> None:
    assert rounding_error(torch.tensor([0.0, 1.0, -0.5]), torch.float16) == 0
    assert rounding_error(torch.tensor([1 + 2**-12]), torch.float16) == pytest.approx(2**-12, rel=1e-3)
    assert rounding_error(torch.tensor([1e6]), torch.float16) == float("inf")
    assert rounding_error(torch.tensor([1e-12]), torch.float16) == float("inf")


def gptq_tensors(held: Codes) -> dict[str, torch.Tensor]:
    packed = format_module("gptq").pack(*held[:4], bits=held.bits, group_size=held.width, symmetric=False)
    return dict(packed)


def test_gptq_versions_and_damage() -> None:
    read = format_module("gptq").read
    held = random_codes(4, 32, symmetric=False)
    held = held._replace(zeros=held.zeros.clamp(min=1, max=14))
    one = gptq_tensors(held)
    two = gptq_tensors(held._replace(zeros=held.zeros + 1))  # version 2 stores zeros as they are
    for tensors, version in ((one, "gptq"), (two, "gptq_v2")):
        found = read(tensors, {"checkpoint_format": version, "bits": 4}, "a")
        assert torch.equal(found.zeros, held.zeros) and torch.equal(found.codes, held.codes)
    without = {name: tensor for name, tensor in one.items() if name != "g_idx"}
    assert torch.equal(read(without, {"bits": 4}, "a").dequantize(), held.dequantize())
    for damaged, said in (
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"bits": 8}, "of 4 bits, its quantization_config says 8"),
    ):
        with pytest.raises(ValueError, match=said):
            read(one, {"bits": 4} | damaged, "a")
    with pytest.raises(ValueError, match="not of one linear"):
        read(one | {"scales": one["scales"][:, :8]}, {"bits": 4}, "a")
    with pytest.raises(ValueError, match="g_idx goes from 0 to 9"):
        read(one | {"g_idx": one["g_idx"].clone().index_fill(0, torch.tensor([3]), 9)}, {"bits": 4}, "a")
    with pytest.raises(ValueError, match="stored as 15"):
        read(one | {"qzeros": torch.full_like(one["qzeros"], -1)}, {"bits": 4}, "a")


def test_awq_of_others() -> None:
    module = format_module("awq")
    held = random_codes(4, 32, symmetric=False)
    packed = module.pack(*held[:4], bits=4, group_size=32, symmetric=False)
    assert torch.equal(module.read(packed, {"bits": 4}, "a").dequantize(), held.dequantize())
    for described, said in (({"version": "gemv"}, "'gemv'"), ({"bits": 3}, "of 3 bits")):
        with pytest.raises(ValueError, match=said):
            module.read(packed, {"bits": 4} | described, "a")
    with pytest.raises(ValueError, match="not of one linear"):
        module.read(packed | {"qzeros": packed["qzeros"][:1]}, {"bits": 4}, "a")


@pytest.mark.parametrize(("bits", "symmetric", "rows"), itertools.product([3, 4, 8], [True, False], [16, 20]))
def test_compressed_tensors_as_its_package_packs(bits: int, symmetric: bool, rows: int) -> None:
    """Zeros and codes packed by the package itself, whose readers are the judge."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    module = format_module("compressed-tensors")
    held = random_codes(bits, 32, symmetric=symmetric, rows=rows)
    middle = 2 ** (bits - 1)
    tensors = {
        "weight_packed": helpers.pack_to_int32((held.codes.to(torch.int16) - middle).to(torch.int8), bits),
        "weight_scale": held.scales,
        "weight_shape": torch.tensor(held.codes.shape),
    }
    if not symmetric:
        signed = (held.zeros - middle).to(torch.int8)
        tensors["weight_zero_point"] = helpers.pack_to_int32(signed, bits, packed_dim=0).contiguous()
    weights = {"num_bits": bits, "type": "int", "group_size": 32}
    described = {"config_groups": {"group_0": {"targets": ["re:.*a$"], "weights": weights}}}
    assert torch.equal(module.read(tensors, described, "x.a").dequantize(), held.dequantize())
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    moved = tensors | {"weight_g_idx": held.group_of[order].to(torch.int32)}
    assert torch.equal(module.read(moved, described, "x.a").group_of, held.group_of[order])
    with pytest.raises(ValueError, match="no group of the quantization_config is for x.b"):
        module.read(tensors, described, "x.b")
    with pytest.raises(ValueError, match="not of a linear of"):
        module.read(tensors | {"weight_packed": tensors["weight_packed"][:, :-1]}, described, "x.a")
    active = {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"x": 1}}
        }
    }
    with pytest.raises(ValueError, match="activations are quantized too"):
        module.read(tensors, active, "x.a")
