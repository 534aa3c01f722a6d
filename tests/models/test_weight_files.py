"""Which files a model consists of: what plain transformers reads and nothing else, in every layout of a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantlab.errors import DataError
from quantlab.models.safetensors.files import open_files
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.models.safetensors.weight_files import find_weight_files
from quantlab.progress import Silent
from quantlab.quant.jobs import Job
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe

INDEX = "model.safetensors.index.json"


def changed(source: Path, target: Path) -> None:
    """The weights of a file, all of them others."""
    tensors = {name: tensor + 1 for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def shard(folder: Path, weights: Path) -> None:
    """Two shards with the content of ``weights`` and an index that names them."""
    tensors = load_file(weights)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _plain(folder: Path) -> None:
    pass


def _sharded(folder: Path) -> None:
    shard(folder, folder / "model.safetensors")
    (folder / "model.safetensors").unlink()


def _older_shards(folder: Path) -> None:
    changed(folder / "model.safetensors", folder / "older")
    shard(folder, folder / "older")
    (folder / "older").unlink()


def _older_index_alone(folder: Path) -> None:
    _older_shards(folder)
    for file in folder.glob("model-0*"):
        file.unlink()


def _broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def _named_by_the_configuration(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "weights.safetensors")
    changed(folder / "weights.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "weights.safetensors"}))


def _another_form_beside(folder: Path) -> None:
    changed(folder / "model.safetensors", folder / "consolidated.safetensors")
    changed(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def _shards_without_an_index(folder: Path) -> None:
    _older_shards(folder)
    (folder / INDEX).unlink()


LAYOUTS: dict[
    str, tuple[Callable[[Path], None], bool]
] = {  # how it is laid out, and whether there is something to note
    "plain": (_plain, False),
    "sharded": (_sharded, False),
    "older shards": (_older_shards, True),
    "older index alone": (_older_index_alone, True),
    "broken index": (_broken_index, True),
    "named by the configuration": (_named_by_the_configuration, True),
    "another form beside": (_another_form_beside, True),
    "shards without an index": (_shards_without_an_index, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_what_transformers_reads(tiny: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    lay_out, noted = LAYOUTS[layout]
    lay_out(folder)
    files = open_files(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, info in files.tensors.items():
        assert torch.equal(read_tensor(info), loaded[name]), name
    assert bool(files.found.note) == noted, files.found.note
    assert set(files.weight_files) == {info.file for info in files.tensors.values()}


def test_an_older_index_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    """Reading, hashing, planning, verifying: the checkpoint is that of the directory without the older files, byte by
    byte, and it is verified against the newer weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    _older_shards(folder)
    assert open_files(folder).digest == open_files(tiny).digest
    assert open_files(folder).size_bytes == open_files(tiny).size_bytes
    recipe = QuantizeRecipe(method="rtn", bits=8, group_size=32)
    for name, model in (("a", folder), ("b", tiny)):
        quantize([Job(name, recipe, tmp_path / name)], str(model), progress=Silent(), verify=name == "a")
    shards = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert shards and shards == sorted(file.name for file in (tmp_path / "b").glob("*.safetensors"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in shards)
    assert json.loads((tmp_path / "a" / "quantlab.json").read_text())["verification"]["passed"]


def test_the_note_names_what_is_not_read(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    _older_shards(folder)
    note = open_files(folder).found.note
    assert "from model.safetensors, as transformers does" in note
    assert INDEX in note and "model-00001-of-00002.safetensors" in note


@pytest.mark.parametrize(
    ("config", "files", "says"),
    [
        ({"transformers_weights": "../x.safetensors"}, {}, "outside the model's directory"),
        ({"transformers_weights": "x.safetensors"}, {}, "is missing"),
        ({"transformers_weights": "x.bin"}, {"x.bin": b""}, "expected a .safetensors file"),
        ({"transformers_weights": 3}, {}, "expected a .safetensors file"),
        ({}, {"consolidated.safetensors": b""}, "only consolidated.safetensors"),
        ({}, {"model.safetensors": b"", "adapter_config.json": b"{}"}, "adapter_config.json without"),
        ({}, {INDEX: b'{"weight_map": {"a": "model.bin"}}', "model.bin": b""}, "names pickled weights"),
        ({}, {INDEX: b'{"weight_map": []}'}, "has no weight_map"),
        ({}, {INDEX: b'{"weight_map": {"a": "/etc/passwd"}}'}, "outside"),
    ],
)
def test_refusals(tmp_path: Path, config: dict[str, object], files: dict[str, bytes], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        find_weight_files("model", tmp_path, config)


def test_an_adapter_alone_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="an adapter without its base model"):
        open_files(tmp_path)
