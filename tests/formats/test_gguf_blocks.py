"""Block types of GGUF: bytes as the gguf package has them, and scales that are not worse than llama.cpp's own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantlab.formats.gguf.encode import encode
from quantlab.formats.gguf.pack import Blocks, pack, unpack
from quantlab.formats.gguf.plain_rounding import TYPES, round_plainly
from quantlab.registry.block_types import BLOCK_TYPES, BlockType

# A directory with SmolLM2-135M-Instruct.
REAL = Path(os.environ.get("QUANTLAB_SMOLLM2", "none")) / "model.safetensors"
KINDS = list(BLOCK_TYPES.values())
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def random_bytes(kind: BlockType, rows: int, blocks: int) -> torch.Tensor:
    """Rows of any codes and scales, but for d and dmin, which are finite."""
    generator = torch.Generator().manual_seed(kind.number)
    packed = torch.randint(0, 256, (rows, blocks, kind.bytes), generator=generator, dtype=torch.uint8)
    at = 0
    for name, size in kind.fields:
        if name in ("d", "dmin"):
            values = torch.randn(rows, blocks, generator=generator).half()
            packed[..., at : at + 2] = values.view(torch.uint8).view(rows, blocks, 2)
        at += size
    return packed.view(rows, -1)


@by_kind
def test_any_bytes_decode_as_the_package_decodes_them(kind: BlockType) -> None:
    number = gguf.GGMLQuantizationType(kind.number)
    assert (number.name, gguf.GGML_QUANT_SIZES[number]) == (kind.name, (kind.block, kind.bytes))
    packed = random_bytes(kind, 5, 3)
    blocks = unpack(packed, kind)
    expected = gguf.quants.dequantize(packed.numpy(), number)
    assert np.array_equal(blocks.dequantize().numpy().view(np.int32), expected.view(np.int32))
    assert torch.equal(pack(blocks), packed)
    halves = blocks.split([2, 3])
    assert torch.equal(torch.cat([pack(half) for half in halves]), packed)


@pytest.mark.parametrize("name", TYPES)
def test_plain_rounding_gives_the_packages_bytes(name: str) -> None:
    weight = 0.02 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) ** 3
    weight[0], weight[1, :32], weight[2, ::2] = 0, 3.0, -weight[2, ::2].abs()
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(pack(round_plainly(weight, BLOCK_TYPES[name])).numpy(), expected)


def test_plain_rounding_is_of_types_of_32_columns() -> None:
    with pytest.raises(ValueError, match="Q4_K has no plain rounding"):
        round_plainly(torch.zeros(1, 256), BLOCK_TYPES["Q4_K"])


def cases(rows: int = 24) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Weights [rows, columns] and importance [columns]: normal, heavy tails, on a grid, with outlying channels."""
    generator = torch.Generator().manual_seed(2)
    normal = 0.02 * torch.randn(rows, 512, generator=generator)
    channels = torch.randn(512, generator=generator).exp() ** 2
    outlying = normal * (1 + 20 * (torch.rand(512, generator=generator) > 0.98))
    grid = torch.randint(0, 16, (rows, 512), generator=generator) * 0.01 - 0.07
    return [
        ("normal", normal, channels),
        ("heavy", 20 * normal * normal.abs(), channels.flip(0)),
        ("grid", grid, channels),
        ("outlying", outlying, torch.rand(512, generator=generator)),
    ]


def squared_error(weight: torch.Tensor, blocks: Blocks, importance: torch.Tensor | None) -> float:
    error = (blocks.dequantize() - weight).double().square()
    return float((error if importance is None else error * importance).sum())


@pytest.mark.parametrize("name", TYPES)
def test_the_search_is_not_worse_than_the_plain_range(name: str) -> None:
    kind = BLOCK_TYPES[name]
    for called, weight, _ in cases():
        plain = squared_error(weight, round_plainly(weight, kind), None)
        assert squared_error(weight, encode(weight, kind), None) <= plain, called


@by_kind
def test_importance_lowers_the_error_it_weighs(kind: BlockType) -> None:
    _, weight, importance = cases()[0]
    weighed = squared_error(weight, encode(weight, kind, importance), importance)
    assert weighed < squared_error(weight, encode(weight, kind), importance)


def test_weights_on_a_types_own_grid_come_back() -> None:
    for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "Q8_0", "Q4_0", "Q5_0"):
        kind = BLOCK_TYPES[name]
        generator = torch.Generator().manual_seed(3)
        codes = torch.randint(
            kind.bottom, kind.top + 1, (4, kind.block // kind.group, kind.group), generator=generator
        )
        codes[..., 0], codes[..., 1] = kind.bottom, kind.top  # the whole range is in use
        weight = ((codes + kind.low) * 2.0**-7).view(4, -1)
        found = encode(weight, kind).dequantize()
        if kind.scale_range is None:
            assert torch.equal(found, weight), name
        else:  # d times a small integer is not just any number
            assert torch.allclose(found, weight, rtol=0, atol=2e-3 * float(weight.abs().max())), name


@by_kind
def test_edges(kind: BlockType) -> None:
    weight = torch.zeros(4, 512)
    weight[1, 40] = 5.0
    weight[2] = 1e-9  # below what float16 holds of it
    weight[3] = -2.0
    blocks = encode(weight, kind, torch.zeros(512))
    assert torch.equal(unpack(pack(blocks), kind).dequantize(), blocks.dequantize())
    assert blocks.dequantize()[0].abs().max() == 0 and torch.isfinite(blocks.dequantize()).all()
    assert torch.allclose(blocks.dequantize()[3], weight[3], rtol=0.01)
    dead = torch.ones(512)
    dead[:256] = 0
    kept = encode(weight[3:], kind, dead)  # channels that never fire keep their weights all the same
    assert torch.allclose(kept.dequantize(), weight[3:], rtol=0.01)
    with pytest.raises(ValueError, match="not whole blocks"):
        encode(torch.zeros(1, kind.block + 1), kind)
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode(torch.full((1, 256), float("nan")), kind)
    with pytest.raises(ValueError, match="more than"):
        encode(torch.linspace(-1e9, 1e9, 256)[None], kind)


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, importance = cases()[1]
    for name in ("Q4_K", "Q5_0"):
        whole = pack(encode(weight, BLOCK_TYPES[name], importance))
        with monkeypatch.context() as small:
            small.setattr("quantlab.formats.gguf.encode.TILE", 256 * 64)
            assert torch.equal(pack(encode(weight, BLOCK_TYPES[name], importance)), whole)


@pytest.fixture(scope="session")
def theirs() -> Callable[[torch.Tensor, BlockType, torch.Tensor | None], Blocks]:
    """llama.cpp's own quantizer, from the library of llama-cpp-python."""
    found = find_spec("llama_cpp")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(Path(found.submodule_search_locations[0]) / "lib" / "libggml-base.so"))
    floats, count = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        floats,
        ctypes.c_void_p,
        count,
        count,
        count,
        floats,
    ]

    def quantize(weight: torch.Tensor, kind: BlockType, importance: torch.Tensor | None) -> Blocks:
        values = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        packed = np.zeros((len(values), kind.row_bytes(values.shape[1])), dtype=np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
        library.ggml_quantize_init(kind.number)
        written = library.ggml_quantize_chunk(
            kind.number, values.ctypes.data_as(floats), packed.ctypes.data, 0, *values.shape,
            None if weights is None else weights.ctypes.data_as(floats),
        )  # fmt: skip
        assert written == packed.nbytes
        return unpack(torch.from_numpy(packed), kind)

    return quantize


@by_kind
def test_no_worse_than_llama_cpp(kind: BlockType, theirs: Callable[..., Blocks]) -> None:
    for called, weight, importance in cases():
        for weights in (None, importance):
            ours = squared_error(weight, encode(weight, kind, weights), weights)
            assert ours <= squared_error(weight, theirs(weight, kind, weights), weights), (
                called,
                weights is None,
            )


@by_kind
@pytest.mark.skipif(not REAL.is_file(), reason="SmolLM2 is not at hand")
def test_no_worse_than_llama_cpp_on_real_tensors(kind: BlockType, theirs: Callable[..., Blocks]) -> None:
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(4)
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    with safe_open(REAL, framework="pt") as stream:
        for layer in (0, 9, 18, 27):
            for name in names:
                weight = stream.get_slice(f"model.layers.{layer}.{name}.weight")[:16].float()
                weight = weight[:, : weight.shape[1] // 256 * 256].contiguous()
                importance = torch.randn(weight.shape[1], generator=generator).exp() ** 2
                for weights in (None, importance):
                    ours = squared_error(weight, encode(weight, kind, weights), weights)
                    other = squared_error(weight, theirs(weight, kind, weights), weights)
                    assert ours <= other, (layer, name, weights is None)


def test_the_nearest_level_of_a_table() -> None:
    from quantlab.formats.gguf.levels import Levels

    kind = BLOCK_TYPES["IQ4_NL"]
    table = torch.tensor(kind.table, dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    x = torch.cat([torch.linspace(-400, 400, 20001), middles, middles - 1e-5, middles + 1e-5, table])
    grid = Levels(kind, x.device)
    levels = grid.nearest(x.clone())
    codes = grid.codes(levels)
    assert torch.equal(codes.long(), torch.bucketize(x, middles))  # a tie goes to the lower level
    assert torch.equal(levels, table[codes.long()]) and torch.equal(grid.of(codes), levels)
    assert torch.equal((x - levels).abs(), (x[:, None] - table).abs().amin(dim=1))
