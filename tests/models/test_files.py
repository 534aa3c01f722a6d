"""Model directories that are missing, damaged or dangerous end in one clear message, before torch is needed."""

import json
import struct
from pathlib import Path

import pytest

from quantlab.errors import DataError
from quantlab.models.safetensors.files import open_files, read_header


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], cut: int = 0) -> None:
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + body
    path.write_bytes(content[: len(content) - cut])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"embed.weight": ("F32", [4, 2], bytes(32))}
    tensors |= {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", [6, 2], bytes(24)) for i in range(3)}
    tensors |= {f"model.layers.{i}.norm.weight": ("BF16", [2], bytes(4)) for i in range(3)}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_reads_shapes_without_weights(model: Path) -> None:
    files = open_files(model)
    assert files.params == 8 + 3 * 14
    assert files.block_prefix == "model.layers"
    assert files.block_linears() == {f"model.layers.{i}.mlp.up_proj": (6, 2) for i in range(3)}
    assert files.quantized is None and len(files.digest) == 16


def test_digest_follows_content(model: Path) -> None:
    before = open_files(model).digest
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert open_files(model).digest != before


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_cut_file(model: Path, cut: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match="not a sound safetensors file") as caught:
        open_files(model)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"[1]\n",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 10) + b"not json!!",
        struct.pack("<Q", 60)
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'.ljust(60)
        + bytes(4),
    ],
)
def test_garbage_headers(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(DataError, match="sound safetensors"):
        read_header(file)


def test_missing_shard_is_named(model: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="model-00002-of-00002.safetensors"):
        open_files(model)


def test_index_cannot_point_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../other.safetensors"}})
    )
    with pytest.raises(DataError, match="outside"):
        open_files(model)


def test_pickles_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled"):
        open_files(model)


def test_misspelt_names_get_the_nearest(model: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_files(model.parent / "modle")
    assert "did you mean" in caught.value.hint and "model" in caught.value.hint
    with pytest.raises(DataError) as caught:
        open_files("embedded:bse")
    assert "embedded:base" in caught.value.hint
    with pytest.raises(DataError, match="is a file"):
        open_files(model / "config.json")


def test_broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json"):
        open_files(model)
